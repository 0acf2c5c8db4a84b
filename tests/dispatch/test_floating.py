"""Whole models: which units run in float16, what it costs, and that it can be undone."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ptq4adm
from ptq4adm import TextToAudioPipeline
from ptq4adm.dispatch import DispatchTable, LayerKey, Times, save_table
from ptq4adm.errors import CheckpointError, ConfigError, DispatchTableError
from ptq4adm.nn import (
    QuantizedLayer,
    fusion_report,
    prepared,
    resident_bytes,
    use_packed_everywhere,
)

DEVICE = "Test CPU 1"
RUN = dict.fromkeys(("date", "commit", "torch", "triton", "cuda", "driver"), "x")


@pytest.fixture(autouse=True)
def _named_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptq4adm.nn.floating.device_name", lambda _: DEVICE)


@pytest.fixture
def packed(quantized: TextToAudioPipeline) -> TextToAudioPipeline:
    twin = copy.copy(quantized)
    twin.unet = copy.deepcopy(quantized.unet)
    return twin


def _layers(unet: nn.Module) -> dict[str, QuantizedLayer]:
    return {n: m for n, m in unet.named_modules() if isinstance(m, QuantizedLayer)}


def _table(unet: nn.Module, faster: Callable[[str], bool]) -> DispatchTable:
    """All layers measured with their own backend: float16 is faster for some names."""
    found: dict[LayerKey, dict[int, Times]] = {}
    for name, layer in _layers(unet).items():
        if layer.key is not None:
            half = 1.0 if faster(name) else 9.0
            backend = layer.backend
            times = Times(0, half, {backend: 3.0}, {backend: 4.0})
            found.setdefault(layer.key, {})[layer.rows or 1] = times
    return DispatchTable(DEVICE, (RUN,), found)


def _run(unet: Any) -> Tensor:
    x, labels = torch.ones(2, 8, 8, 8), torch.linspace(-1, 1, 128).view(2, 64)
    with torch.no_grad():
        return unet(x, 500, encoder_hidden_states=None, class_labels=labels).sample


def test_nothing_runs_in_float_unless_someone_asks(packed: TextToAudioPipeline) -> None:
    assert not any(layer.is_float for layer in _layers(packed.unet).values())


def test_every_layer_where_float_is_faster_everywhere(
    packed: TextToAudioPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    unet = packed.unet
    state, before, output = copy.deepcopy(unet.state_dict()), resident_bytes(unet), _run(unet)
    with caplog.at_level(logging.INFO):
        report = ptq4adm.use_float_where_faster(packed, _table(unet, lambda _: True))
    layers = _layers(unet)
    assert all(layer.is_float for layer in layers.values() if layer.key is not None)
    assert sorted(name for unit in report.units for name in unit.layers) == sorted(layers)
    # the cost is said: one float16 copy of each weight, and its bias
    assert (report.bytes_before, report.bytes_after) == (before, resident_bytes(unet))
    assert report.bytes_after > 2 * before
    assert report.summary() in caplog.text
    assert f"{before / 1e6:.2f} MB resident before" in str(report)
    # blocks say why they are not fused, and the numbers are those of the quantized weights
    assert "runs in float16 (float16 1 us, cpu 3 us" in str(fusion_report(unet))
    exact = copy.deepcopy(unet)
    _replace_by_float(exact)
    changed, expected = _run(unet), _run(exact)
    assert (changed - expected).norm() / expected.norm() < 1e-3
    assert (changed - output).norm() / output.norm() > 1e-3
    # saved as ever
    now = unet.state_dict()
    assert list(now) == list(state)
    assert all(torch.equal(now[name], state[name]) for name in state)
    # undone
    use_packed_everywhere(unet)
    assert resident_bytes(unet) == before
    assert torch.equal(_run(unet), output)


def _replace_by_float(unet: nn.Module) -> None:
    """The layers as nn.Linear and nn.Conv2d of the quantized weights."""
    from ptq4adm.nn import unfuse_blocks

    unfuse_blocks(unet)
    for name, layer in _layers(unet).items():
        parent, _, child = name.rpartition(".")
        setattr(unet.get_submodule(parent), child, layer.dequantize())  # type: ignore[operator]


def test_a_unit_is_decided_as_a_whole(packed: TextToAudioPipeline) -> None:
    unet = packed.unet
    for layer in _layers(unet).values():
        layer.expect_rows(None)
    report = ptq4adm.use_float_where_faster(
        unet, _table(unet, lambda name: name.endswith(("conv2", "conv_shortcut")))
    )
    units = {unit.name: unit for unit in report.units}
    block = "down_blocks.0.resnets.0"
    assert units[f"{block}.conv2"].layers == (f"{block}.conv2",)
    attention = next(unit for name, unit in units.items() if name.endswith("attn1"))
    assert [name.rpartition("attn1.")[2] for name in attention.layers] == [
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
    ]
    assert not attention.is_float
    # three products, and one product with its quantizer
    assert attention.reason == "float16 36 us, cpu 13 us at M 1"
    for unit in report.units:
        are_float = {layer.is_float for n, layer in _layers(unet).items() if n in unit.layers}
        assert are_float == {unit.is_float}
    # what shares a shape with conv2 shares its times
    assert 0 < sum(unit.is_float for unit in report.units) < len(report.units)


def test_a_second_call_decides_anew(packed: TextToAudioPipeline) -> None:
    unet = packed.unet
    slower, faster = _table(unet, lambda _: False), _table(unet, lambda _: True)
    before = resident_bytes(unet)
    ptq4adm.use_float_where_faster(unet, faster)
    report = ptq4adm.use_float_where_faster(unet, slower)
    assert not any(unit.is_float for unit in report.units)
    assert report.bytes_before == report.bytes_after == before == resident_bytes(unet)


def test_without_times_a_unit_stays_packed_and_says_why(
    packed: TextToAudioPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PTQ4ADM_DISPATCH", "off")
    report = ptq4adm.use_float_where_faster(packed)
    assert {unit.reason for unit in report.units} == {"no table for this device"}
    empty = DispatchTable(DEVICE, (), {})
    report = ptq4adm.use_float_where_faster(packed, empty)
    assert not any(unit.is_float for unit in report.units)
    assert any("no times of w4a8 conv3x3" in unit.reason for unit in report.units)


def test_a_weight_that_float16_cannot_hold_stays_packed(packed: TextToAudioPipeline) -> None:
    unet = packed.unet
    table = _table(unet, lambda _: True)
    name = next(n for n in _layers(unet) if n.endswith("attn1.to_v"))
    _layers(unet)[name].w_scale[0] = 1e-12
    report = ptq4adm.use_float_where_faster(unet, table)
    unit = next(unit for unit in report.units if name in unit.layers)
    assert not unit.is_float
    assert "cannot be found again" in unit.reason
    assert not any(_layers(unet)[other].is_float for other in unit.layers)


def test_the_table_has_to_be_the_device_s(packed: TextToAudioPipeline, tmp_path: Path) -> None:
    table = _table(packed.unet, lambda _: True)
    path = tmp_path / "table.json"
    save_table(path, DispatchTable("another", (RUN,), table.layers))
    with pytest.raises(DispatchTableError, match="measured on 'another', the model is on 'Test CP"):
        ptq4adm.use_float_where_faster(packed, path)
    save_table(path, table)
    assert any(unit.is_float for unit in ptq4adm.use_float_where_faster(packed, path).units)


def test_a_float_model_and_a_prepared_one_are_refused(
    packed: TextToAudioPipeline, float_pipe: TextToAudioPipeline
) -> None:
    with pytest.raises(ConfigError, match="has no packed layer; quantize it first"):
        ptq4adm.use_float_where_faster(float_pipe)
    labels = torch.zeros(2, 64)
    with prepared(packed.unet, torch.tensor([5]), class_labels=labels):
        with pytest.raises(ConfigError, match="leave the `prepared` block first"):
            ptq4adm.use_float_where_faster(packed)


# --- rows of a call -----------------------------------------------------------------------------


def test_the_calibration_tells_each_layer_its_rows_and_a_checkpoint_keeps_them(
    quantized: TextToAudioPipeline, tmp_path: Path
) -> None:
    """One prompt with guidance: latents [2, 8, 8, 8]."""
    seen: dict[str, int] = {}

    def hook(name: str) -> Callable[..., None]:
        def run(layer: Any, args: tuple[Any, ...], y: Tensor) -> None:
            del args
            seen[name] = y.numel() // layer.out_features

        return run

    unet = copy.deepcopy(quantized.unet)
    for name, layer in _layers(unet).items():
        layer.register_forward_hook(hook(name))
    _run(unet)
    rows = {name: layer.rows for name, layer in _layers(quantized.unet).items()}
    assert rows == seen
    assert set(rows.values()) == {32, 128}  # all 64 pixels of two samples, and a quarter
    ptq4adm.save_pipeline(quantized, tmp_path / "packed")
    loaded = ptq4adm.load_pipeline(tmp_path / "packed")
    assert {name: layer.rows for name, layer in _layers(loaded.unet).items()} == rows


@pytest.mark.parametrize(
    ("name", "value"),
    [("conv_in", 5), ("nowhere", 5), (None, 0), (None, "7"), (None, True), (None, 1.5)],
)
def test_a_checkpoint_with_wrong_rows_is_refused(
    quantized: TextToAudioPipeline, tmp_path: Path, name: str | None, value: object
) -> None:
    folder = ptq4adm.save_pipeline(quantized, tmp_path / "packed") / "unet"
    config = json.loads((folder / "config.json").read_text())
    name = name or next(iter(_layers(quantized.unet)))
    config["quantization_config"]["rows"][name] = value
    (folder / "config.json").write_text(json.dumps(config))
    what = "which `schemes` does not" if name == "nowhere" else f"= {value!r}, needs a whole"
    with pytest.raises(CheckpointError, match=f"rows of layer {name!r}.*{what}"):
        ptq4adm.load_pipeline(tmp_path / "packed")
