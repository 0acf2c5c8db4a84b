"""What layers keep: dtypes, one copy, canonical state dicts, copies and pickles."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ptq4adm.errors import NonFiniteError, RangeError, ShapeError, UnsupportedLayerError
from ptq4adm.nn import (
    HalfConv2d,
    HalfLinear,
    QuantizedLayer,
    StepIndex,
    StorageLayer,
    W4A8Conv2d,
    W4A8Linear,
    W8A8Conv2d,
    W8A8Linear,
    W8Linear,
    resident_bytes,
)
from ptq4adm.ops import backend_report
from ptq4adm.packing.layout import pack_int4, weight_to_rows
from ptq4adm.quant.affine import quantize_rows
from ptq4adm.quant.buckets import TimestepBuckets

BACKENDS = [s.name.value for s in backend_report() if s.available]


def _step() -> StepIndex:
    return StepIndex(TimestepBuckets(10, (True, True)))


def _conv(backend: str = "auto") -> W4A8Conv2d:
    return W4A8Conv2d.from_float(
        nn.Conv2d(72, 20, 3, padding=1),
        x_scale=torch.tensor([[0.04, 0.03], [0.05, 0.06]]),
        step=_step(),
        segments=(40, 32),
        group_size=64,
        backend=backend,
    )


MAKERS: dict[str, Callable[[], StorageLayer]] = {
    "w4a8 linear": lambda: W4A8Linear.from_float(nn.Linear(72, 20)),
    "w8a8 linear": lambda: W8A8Linear.from_float(nn.Linear(72, 20, bias=False)),
    "w4a8 conv": _conv,
    "w8a8 conv": lambda: W8A8Conv2d.from_float(nn.Conv2d(72, 20, 3, padding=1)),
    "w8 linear": lambda: W8Linear.from_float(nn.Linear(72, 20)),
    "half linear": lambda: HalfLinear.from_float(nn.Linear(72, 20)),
    "half conv": lambda: HalfConv2d.from_float(nn.Conv2d(72, 20, 3, padding=1)),
}
EVERY = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def _input(layer: nn.Module) -> Tensor:
    is_conv = "Conv2d" in type(layer).__name__
    return torch.randn(2, 72, 5, 5) if is_conv else torch.randn(3, 72)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_no_dtype_change_touches_what_is_stored(
    make: Callable[[], StorageLayer], dtype: torch.dtype
) -> None:
    layer = make()
    before = {name: tensor.clone() for name, tensor in layer.named_buffers()}
    for change in (lambda: layer.to(dtype), layer.half, layer.float):
        change()
        assert all(
            b.dtype == before[n].dtype and torch.equal(b, before[n])
            for n, b in layer.named_buffers()
        )


@EVERY
def test_the_state_dict_restores_an_equal_layer(make: Callable[[], StorageLayer]) -> None:
    layer, other = make(), make()
    x = _input(layer)
    assert not torch.equal(layer(x), other(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), other(x))
    state = layer.state_dict()
    assert {n: (tuple(t.shape), t.dtype) for n, t in state.items()} == layer.stored_tensors()


@EVERY
def test_copies_and_pickles_are_equal_and_independent(make: Callable[[], StorageLayer]) -> None:
    layer = make()
    x = _input(layer)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(layer(x), twin(x))
        storages = {t.untyped_storage().data_ptr() for t in layer.buffers()}
        assert storages.isdisjoint(t.untyped_storage().data_ptr() for t in twin.buffers())


@EVERY
def test_a_float_layer_is_recovered(
    make: Callable[[], StorageLayer],
) -> None:
    layer = make()
    back = layer.dequantize()  # type: ignore[operator]
    x = _input(layer)
    assert type(back) in (nn.Linear, nn.Conv2d)
    assert back.weight.dtype == torch.float32
    assert (back(x) - layer(x)).norm() <= 0.02 * back(x).norm()


@EVERY
def test_stored_bytes_are_resident_bytes(make: Callable[[], StorageLayer]) -> None:
    """One copy of each tensor; 20 channels pad to 32 in the cpu backend's panels, 64 to 64."""
    layer = make()
    stored = sum(t.numel() * t.element_size() for t in layer.state_dict().values())
    assert stored <= resident_bytes(layer) <= stored * 1.65


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_state_dict_is_canonical_whatever_the_backend(backend: str, bits: int) -> None:
    float_layer = nn.Conv2d(72, 20, 3)
    cls = W4A8Conv2d if bits == 4 else W8A8Conv2d
    layer = cls.from_float(float_layer, backend=backend)
    w_q = quantize_rows(weight_to_rows(float_layer.weight.detach(), layer.layout), bits=bits).w_q
    expected = pack_int4(w_q) if bits == 4 else w_q
    assert torch.equal(layer.state_dict()["qweight"], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_agree_and_read_each_others_state(backend: str) -> None:
    reference, other = _conv("reference"), _conv(backend)
    other.load_state_dict(reference.state_dict())
    x = _input(other)
    torch.testing.assert_close(other(x), reference(x), rtol=1e-5, atol=1e-5)


def test_a_wrong_state_dict_is_refused_key_by_key() -> None:
    layer = W4A8Linear.from_float(nn.Linear(72, 20))
    state = layer.state_dict()
    broken = {**state, "qweight": state["qweight"][:, :-1]}
    with pytest.raises(RuntimeError, match=r"qweight: got torch.uint8 \[20, 63\], needs"):
        layer.load_state_dict(broken)
    with pytest.raises(RuntimeError, match=r"w_scale: got torch.float16"):
        layer.load_state_dict({**state, "w_scale": state["w_scale"].half()})
    with pytest.raises(RuntimeError, match=r"Missing key.*w_scale"):
        layer.load_state_dict({k: v for k, v in state.items() if k != "w_scale"})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*x_scale"):
        layer.load_state_dict({**state, "x_scale": torch.ones(1, 1)})


def test_rows_found_elsewhere_are_taken_and_checked() -> None:
    float_layer = nn.Linear(72, 20)
    layer, other = W4A8Linear.from_float(float_layer), W4A8Linear(72, 20)
    other.set_rows(layer.quantized_rows())
    assert torch.equal(other.dequantize().weight, layer.dequantize().weight)
    grouped = W4A8Linear.from_float(float_layer, group_size=64).quantized_rows()
    with pytest.raises(ShapeError, match="with groups"):
        other.set_rows(grouped)
    with pytest.raises(ShapeError, match=r"rows \[20, 128\]"):
        W4A8Linear(200, 20).set_rows(layer.quantized_rows())


def test_an_automatic_backend_is_chosen_again_on_another_device() -> None:
    layer = _conv("auto")
    state = layer.state_dict()
    layer._apply(lambda t: t)
    meta = copy.deepcopy(layer).to("meta")
    assert meta.qweight.is_meta
    assert meta.backend == "reference"
    assert {n: t.shape for n, t in meta.state_dict().items()} == {
        n: t.shape for n, t in state.items()
    }


def test_layers_of_a_copied_model_share_the_copys_step() -> None:
    step = _step()
    scale = torch.tensor([[0.01, 0.02]])
    model = nn.Sequential(
        W4A8Linear.from_float(nn.Linear(64, 64), x_scale=scale, step=step),
        W4A8Linear.from_float(nn.Linear(64, 64), x_scale=scale, step=step),
    )
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert twin[0].step is twin[1].step
    assert twin[0].step is not step
    twin[0].step.set_timestep(9)
    assert int(step.index) == 0
    assert isinstance(twin[1], QuantizedLayer)
    assert int(twin[1].step.index) == 1  # type: ignore[union-attr]


def test_weight_only_int8_is_accurate_and_follows_the_inputs_dtype() -> None:
    float_layer = nn.Linear(256, 64)
    layer = W8Linear.from_float(float_layer)
    x = torch.randn(10, 256)
    error = (layer(x) - float_layer(x)).norm() / float_layer(x).norm()
    assert error < 0.01
    for dtype in (torch.float16, torch.bfloat16):
        assert layer(x.to(dtype)).dtype == dtype


def test_half_layers_lose_nothing_if_the_weight_was_float16() -> None:
    linear, conv = nn.Linear(72, 20).half().float(), nn.Conv2d(72, 36, 3, 2, 1, groups=4).half()
    conv = conv.float()
    x, image = torch.randn(3, 72), torch.randn(2, 72, 6, 6)
    assert torch.equal(HalfLinear.from_float(linear)(x), linear(x))
    half = HalfConv2d.from_float(conv)
    # the same sums in the same order: torch adds in another one for contiguous memory
    channels_last = image.contiguous(memory_format=torch.channels_last)
    assert torch.equal(half(image), conv(channels_last))
    assert half(image).is_contiguous(memory_format=torch.channels_last)
    assert half(image.bfloat16()).dtype == torch.bfloat16
    assert resident_bytes(half) == 2 * sum(p.numel() for p in conv.parameters())


def test_half_layers_refuse_what_float16_cannot_hold() -> None:
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight[0, 0] = 1e5
    with pytest.raises(NonFiniteError, match="65504"):
        HalfLinear.from_float(layer)
    with pytest.raises(UnsupportedLayerError, match="padding mode"):
        HalfConv2d.from_float(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"))


def test_resident_bytes_counts_shared_storage_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    assert resident_bytes(model) == 4 * 64
    view = nn.Module()
    view.register_buffer("a", torch.zeros(100)[:10])
    assert resident_bytes(view) == 400  # the whole storage is held


@pytest.mark.parametrize("value", [0, 16, 255])
def test_multipliers_that_do_not_fit_are_refused(value: int) -> None:
    layer = W4A8Linear.from_float(nn.Linear(72, 20), group_size=64)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    rows = layer.quantized_rows()
    assert rows.w_mult is not None
    wrong = torch.ones_like(rows.w_mult)
    wrong[3, 1] = value
    told = rf"w_mult: got values in {min(1, value)} \.\. {max(1, value)}, needs 1 \.\. 15"
    with pytest.raises(RangeError, match=told):
        layer.set_rows(replace(rows, w_mult=wrong))
    with pytest.raises(RuntimeError, match=told):
        layer.load_state_dict({**before, "w_mult": wrong})
    state = layer.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    for fitting in (1, 15):
        layer.set_rows(replace(rows, w_mult=torch.full_like(rows.w_mult, fitting)))
        layer.load_state_dict({**before, "w_mult": torch.full_like(rows.w_mult, fitting)})


def _static_pair() -> tuple[QuantizedLayer, QuantizedLayer]:
    step, scale = _step(), torch.tensor([[0.01, 0.02]])
    first, second = (
        W4A8Linear.from_float(nn.Linear(64, 64), x_scale=scale, step=step) for _ in range(2)
    )
    assert first.quantizes_like(second)
    return first, second


def test_a_changed_table_or_step_is_compared_again() -> None:
    first, second = _static_pair()
    assert second.x_scale is not None
    second.x_scale[0, 1] = 0.03
    assert not first.quantizes_like(second)
    second.x_scale[0, 1] = 0.02
    assert first.quantizes_like(second)
    kept, second.step = second.step, _step()
    assert not first.quantizes_like(second)
    second.step = kept
    assert first.quantizes_like(second)
    second.set_activation_scale(torch.tensor([[0.01, 0.05]]))
    assert not first.quantizes_like(second)


def test_equal_tables_are_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = _static_pair()
    monkeypatch.setattr(torch, "equal", lambda *_: pytest.fail("compared again"))
    assert first.quantizes_like(second)


def test_tables_of_inference_tensors_are_compared() -> None:
    with torch.inference_mode():
        first, second = _static_pair()
    assert first.quantizes_like(second)


def test_what_was_compared_is_not_copied() -> None:
    model = nn.ModuleList(_static_pair())
    assert model[0]._compared
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), [copy.copy(model[0])]):
        assert twin[0]._compared == {}
    assert model[0]._compared
