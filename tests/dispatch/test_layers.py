"""Layers that choose: when they are made, moved or told their rows; one copy, the same state."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from torch import nn

from ptq4adm import ops
from ptq4adm.dispatch import LayerKey, Times
from ptq4adm.errors import DispatchTableError
from ptq4adm.nn import QuantizedLayer, W4A8Conv2d, W4A8Linear, W8A8Linear, resident_bytes

pytestmark = pytest.mark.usefixtures("fake_device")
UseTable = Callable[..., object]
LINEAR, CONV = LayerKey("linear", 4, 20, 72), LayerKey("conv3x3", 4, 20, 648)


def _linear(**options: object) -> W4A8Linear:
    torch.manual_seed(3)
    return W4A8Linear.from_float(nn.Linear(72, 20), **options)  # type: ignore[arg-type]


def _times(cuda: float, triton: float, half: float | None = None) -> Times:
    both = {"cuda": cuda, "triton": triton}
    return Times(0, half, both, {name: us + 1 for name, us in both.items()})


def test_without_a_table_auto_is_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PTQ4ADM_DISPATCH", raising=False)
    layer = _linear()
    assert (layer.backend, layer.backend_reason) == ("triton", "no table for this device")


def test_each_layer_takes_the_faster_one_and_says_so(
    use_table: UseTable, caplog: pytest.LogCaptureFixture
) -> None:
    use_table({LINEAR: {18: _times(3, 4)}, CONV: {18: _times(6, 5)}})
    with caplog.at_level(logging.INFO):
        linear, again = _linear(), _linear()
    conv = W4A8Conv2d.from_float(nn.Conv2d(72, 20, 3, padding=1))
    other = W8A8Linear.from_float(nn.Linear(72, 20))
    assert [x.backend for x in (linear, again, conv, other)] == ["cuda", "cuda", "triton", "triton"]
    assert "backend=cuda (cuda 3 us, triton 4 us at M 18)" in repr(linear)
    assert "backend=triton (the table has no w8a8 linear 20x72)" in repr(other)
    said = [r.message for r in caplog.records if "w4a8 linear 20x72" in r.message]
    assert said == [
        "backend auto of w4a8 linear 20x72 on Test GPU 1: cuda (cuda 3 us, triton 4 us at M 18)"
    ]


@pytest.mark.parametrize(
    ("conv", "kind"),
    [
        (nn.Conv2d(72, 20, 1), "conv1x1"),
        (nn.Conv2d(72, 20, 3, padding=1), "conv3x3"),
        (nn.Conv2d(72, 20, 3, stride=2, padding=1), "conv3x3-stride2"),
        (nn.Conv2d(72, 20, 3, dilation=2), None),
        (nn.Conv2d(72, 20, 3, stride=(1, 2)), None),
        (nn.Conv2d(72, 20, 1, stride=2), None),
        (nn.Conv2d(72, 20, (3, 1)), None),
    ],
)
def test_convolutions_are_looked_up_by_window_and_stride(conv: nn.Conv2d, kind: str | None) -> None:
    layer = W4A8Conv2d.from_float(conv)
    K = 72 * conv.kernel_size[0] * conv.kernel_size[1]
    assert layer.key == (None if kind is None else LayerKey(kind, 4, 20, K))


def test_groups_are_not_looked_up(use_table: UseTable) -> None:
    use_table({LINEAR: {18: _times(3, 4)}})
    layer = _linear(group_size=64)
    assert layer.key is None
    assert layer.backend == "triton"


def test_a_named_backend_asks_no_table(
    use_table: UseTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_table({LINEAR: {18: _times(3, 4)}})
    layer = _linear(backend="triton")
    assert (layer.backend, layer.backend_reason) == ("triton", "")
    monkeypatch.setenv("PTQ4ADM_DISPATCH", "/nowhere/at/all")
    assert _linear(backend="cuda").backend == "cuda"
    with pytest.raises(DispatchTableError, match="no such file"):
        _linear()


def test_rows_change_the_choice_and_the_order_of_the_one_copy(use_table: UseTable) -> None:
    use_table({LINEAR: {16: _times(3, 4), 8192: _times(40, 30)}})
    layer = _linear()
    assert layer.backend == "triton"  # 43 against 34 together
    canonical = layer.qweight.clone()
    state = copy.deepcopy(layer.state_dict())
    before = resident_bytes(layer)
    layer.expect_rows(16)
    assert layer.backend == "cuda"
    assert layer.qweight.shape == (2, 16 * 128 // 2)  # in units of 16 channels
    assert torch.equal(layer.canonical_qweight(), canonical)
    # 20 channels are padded to 32, and nothing else is kept
    assert resident_bytes(layer) - before == 12 * 64
    after = layer.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], state[name]) for name in state)
    layer.expect_rows(None)
    assert layer.backend == "triton"
    assert torch.equal(layer.qweight, canonical)


def test_a_moved_layer_chooses_anew(use_table: UseTable, monkeypatch: pytest.MonkeyPatch) -> None:
    use_table({LINEAR: {16: _times(3, 4)}})
    layer = _linear()
    canonical = layer.canonical_qweight()
    monkeypatch.setenv("PTQ4ADM_DISPATCH", "off")
    layer.to("cpu")
    assert (layer.backend, layer.backend_reason) == ("triton", "no table for this device")
    assert torch.equal(layer.canonical_qweight(), canonical)
    use_table({LINEAR: {16: _times(3, 4)}})
    layer.half()
    assert layer.backend == "cuda"
    assert torch.equal(layer.canonical_qweight(), canonical)


def test_a_state_is_loaded_into_the_chosen_order(use_table: UseTable) -> None:
    use_table({LINEAR: {16: _times(3, 4)}})
    plain, chosen = _linear(backend="triton"), W4A8Linear(72, 20)
    assert chosen.backend == "cuda"
    chosen.load_state_dict(plain.state_dict())
    assert torch.equal(chosen.canonical_qweight(), plain.qweight)


def test_layers_of_cuda_and_triton_share_their_input(use_table: UseTable) -> None:
    use_table({LINEAR: {16: _times(3, 4)}, LayerKey("linear", 4, 24, 72): {16: _times(4, 3)}})
    first, second = _linear(), W4A8Linear.from_float(nn.Linear(72, 24))
    assert (first.backend, second.backend) == ("cuda", "triton")
    assert first.quantizes_like(second)
    assert second.quantizes_like(first)
    assert not first.quantizes_like(_linear(backend="reference"))
    assert [ops.quantizers_of(n) for n in ("cuda", "triton", "cpu")] == ["triton", "triton", "cpu"]


def test_a_layer_that_does_not_choose_has_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptq4adm.ops.backends._CANDIDATES", {})
    layer: QuantizedLayer = _linear(backend="reference")
    assert repr(layer).endswith("backend=reference)")


def test_what_failed_is_warned_of(use_table: UseTable, caplog: pytest.LogCaptureFixture) -> None:
    use_table({LINEAR: {18: Times(0, None, {"cuda": 3.0}, {}, {"triton": "2 results differ"})}})
    assert _linear().backend == "cuda"
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "w4a8 linear 20x72" in record.message
    assert "triton failed when measured" in record.message
