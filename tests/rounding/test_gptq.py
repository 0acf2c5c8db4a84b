"""GPTQ over a denoiser: the moments it sees, that it helps, and what it leaves as it was."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from rounding_inputs import make_task, record_inputs
from torch import Tensor, nn
from torch.nn import functional

import ptq4adm
from ptq4adm import Calibration, QuantConfig, TextToAudioPipeline
from ptq4adm.calibration import ChosenInputs
from ptq4adm.config import ROUNDINGS
from ptq4adm.errors import CalibrationError, CalibrationMismatchError, ConfigError, NonFiniteError
from ptq4adm.packing.layout import KLayout, rows_to_weight, weight_to_rows
from ptq4adm.quant.affine import QuantizedRows, quantize_rows
from ptq4adm.rounding import LayerTask, Replay, ShiftedRows
from ptq4adm.rounding.activations import columns, fake_quantize
from ptq4adm.rounding.gptq import GptqSettings, gptq
from ptq4adm.rounding.hessian import MomentSum, groups_within
from ptq4adm.rounding.methods import ROUNDERS
from ptq4adm.rounding.twin import Twin, call_order

PROMPTS = ["a dog barks", "a bell rings"]
# a few layers of each kind: all of them take half a minute
FEW = {"*": "float", "down_blocks.0.resnets.*.conv*": "w4a8", "up_blocks.1.resnets.0.*": "w4a8"}
FEW |= {"mid_block.attentions.*": "w4a8", "*.time_emb_proj": "float"}


@pytest.fixture(scope="module")
def recorded(
    float_pipe: TextToAudioPipeline, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Calibration, Path]:
    return record_inputs(float_pipe, tmp_path_factory.mktemp("inputs"))


LAYERS = [
    (nn.Conv2d(5, 3, 3, stride=2, padding=1), (2, 3), (2, 5, 7, 6)),
    (nn.Conv2d(70, 3, (3, 1), padding=(1, 0), dilation=(2, 1)), (70,), (2, 70, 8, 3)),
    (nn.Conv2d(6, 3, 1), (6,), (1, 6, 2, 2)),
    (nn.Conv2d(6, 3, 3, padding="same", dilation=2), (6,), (1, 6, 5, 4)),
    (nn.Conv2d(6, 3, 3, padding="valid"), (6,), (1, 6, 5, 4)),
    (nn.Linear(65, 4), (65,), (2, 5, 65)),
    (nn.Linear(6, 4), (4, 2), (3, 6)),
]


@pytest.mark.parametrize(("layer", "segments", "shape"), LAYERS)
def test_moments_are_those_of_what_the_weight_multiplies(
    layer: nn.Linear | nn.Conv2d, segments: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    task, z, x = make_task(layer, segments), torch.randn(shape), torch.randn(shape)
    total = MomentSum(task, has_cross=True, most=10**6)
    total.add(z, x, 0)
    found = total.result()
    assert found.cross is not None
    # an oracle without columns: |W Z|^2 and <V X, W Z> for any weights, through the layer itself
    twin, other = copy.deepcopy(layer), copy.deepcopy(layer)
    twin.bias = other.bias = None
    W, V = (weight_to_rows(m.weight.detach(), task.layout).double() for m in (twin, other))
    with torch.no_grad():
        torch.nn.init.normal_(other.weight)
        V = weight_to_rows(other.weight.detach(), task.layout).double()
        # in float64: the rounding that is left is that of the moments, which are float32
        energy = twin.double()(z.double()).square().sum()
        product = (other.double()(x.double()) * twin(z.double())).sum()
    M = found.count
    torch.testing.assert_close(
        ((W @ found.hessian.double()) * W).sum() * M, energy, rtol=1e-6, atol=0.0
    )
    torch.testing.assert_close(
        ((V @ found.cross.double()) * W).sum() * M, product, rtol=0.0, atol=5e-6 * float(energy)
    )
    padding = weight_to_rows(torch.ones_like(layer.weight), task.layout)[0] == 0
    assert not bool(found.hessian[padding].any())


def test_kept_positions_are_the_same_for_both_inputs_and_bounded() -> None:
    task, x = make_task(nn.Conv2d(4, 2, 1), (4,)), torch.randn(3, 4, 8, 8)
    kept = columns(task, x, 5, 7)
    assert kept.shape == (15, 4)
    assert torch.equal(columns(task, 2 * x, 5, 7), 2 * kept)
    assert torch.equal(columns(task, x, 64, 7), columns(task, x, 1000, 8))


@pytest.mark.parametrize("scheme", ["w4a8", "w8a8"])
def test_a_fake_quantized_input_is_the_packed_layer_s(
    pipe: TextToAudioPipeline, recorded: tuple[Calibration, Path], scheme: str
) -> None:
    calibration, path = recorded
    seen: list[LayerTask] = []

    def keep(_: nn.Module, tasks: list[LayerTask], *__: Any, **___: Any) -> Any:
        seen.extend(tasks)
        return {task.name: task.start for task in tasks}

    unet = copy.deepcopy(pipe.unet)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ROUNDERS, "gptq", keep)  # type: ignore[arg-type]
        ptq4adm.quantize(
            pipe,
            QuantConfig(scheme=scheme, rounding="gptq", weight_observer="absmax"),
            calibration,
            inputs=path,
            progress=False,
        )
    replay = Replay(ChosenInputs.load(path), batch=2)
    twin = Twin(unet, seen)
    for task in seen:
        twin.set_rows(task, task.start)
    batch = next(replay.batches())
    with torch.no_grad():
        # embeddings that are W8 or float16 in the packed model are float in the twin
        torch.testing.assert_close(
            twin.call(replay, batch), replay.call(pipe.unet, batch), rtol=0.05, atol=0.05
        )


def test_an_input_in_segments_has_two_scales() -> None:
    scales = torch.tensor([[0.1, 1.0], [0.5, 2.0]])
    task = make_task(nn.Conv2d(5, 2, 1), (2, 3), scales)
    x = torch.randn(1, 5, 3, 3) * 5
    found = fake_quantize(task, x, 60.0)
    expected = torch.cat([x[:, :2].round(), 2 * (x[:, 2:] / 2).round()], dim=1)
    torch.testing.assert_close(found, expected)


def test_an_input_that_is_not_finite_names_its_layer() -> None:
    task = make_task(nn.Linear(6, 4), (6,), torch.ones(1, 2))
    with pytest.raises(NonFiniteError, match="layer 'x'"):
        fake_quantize(task, torch.full((1, 6), torch.inf), 0.0)


def test_groups_fit_the_budget_and_keep_the_order() -> None:
    tasks = [make_task(nn.Linear(k, 2), (k,)) for k in (10, 10, 100, 10, 10)]
    groups = groups_within(tasks, 4 * 2 * 250, per_layer=2)
    assert [[t.layout.k for t in group] for group in groups] == [[10, 10], [100], [10, 10]]
    assert [t for group in groups for t in group] == tasks


class Chain(nn.Module):
    """Three layers, registered in another order than they are called in."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(24, 8, bias=False)
        self.first = nn.Linear(16, 24, bias=False)
        self.unused = nn.Linear(3, 3)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        del timestep
        return self.last(torch.relu(self.first(sample.flatten(1)))).reshape(-1, 2, 2, 2)  # type: ignore[no-any-return]


def _chain(pairs: int = 64) -> tuple[Chain, list[LayerTask], Replay]:
    net = Chain().requires_grad_(False)
    mixing = torch.randn(4, 16)
    sample = torch.randn(pairs * 2, 4) @ mixing + 0.1 * torch.randn(pairs * 2, 16)
    inputs = ChosenInputs(
        fingerprint="",
        pairs=torch.stack([torch.arange(pairs), torch.zeros(pairs).long()], dim=1),
        timesteps=torch.full((pairs,), 7.0, dtype=torch.float64),
        sample=sample.reshape(pairs, 2, 4, 2, 2),
        arguments={},
    )
    tasks = []
    for name in ("last", "first", "unused"):
        layer = net.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        layout = KLayout((layer.in_features,))
        start = quantize_rows(weight_to_rows(layer.weight, layout), bits=4)
        tasks.append(LayerTask(name, layer, layout, 4, start, None, None))
    return net, tasks, Replay(inputs)


def _error(
    net: Chain, tasks: list[LayerTask], rows: dict[str, QuantizedRows], replay: Replay
) -> float:
    rounded = copy.deepcopy(net)
    for task in tasks:
        weight = rows_to_weight(rows[task.name].dequantize(), task.layout).flatten(1)
        rounded.get_submodule(task.name).weight.copy_(weight)
    total = 0.0
    for batch in replay.batches():
        total += float((replay.call(net, batch) - replay.call(rounded, batch)).square().sum())
    return total


def test_layers_are_taken_in_the_order_of_their_calls() -> None:
    net, tasks, replay = _chain()
    assert [task.name for task in call_order(net, tasks, replay)] == ["first", "last", "unused"]


def test_it_lowers_the_output_error_and_changes_no_model() -> None:
    symmetric, asymmetric, plain = 0.0, 0.0, 0.0
    for seed in range(4):
        torch.manual_seed(seed)
        net, tasks, replay = _chain()
        before = {k: v.clone() for k, v in net.state_dict().items()}
        plain += _error(net, tasks, {t.name: t.start for t in tasks}, replay)
        one = gptq(net, tasks, replay, progress=False)
        # one layer a group: the second knows what became of the first
        settings = GptqSettings(is_asymmetric=True, budget=1)
        two = gptq(net, tasks, replay, settings=settings, progress=False)
        assert two["unused"] is one["unused"] is tasks[2].start
        symmetric += _error(net, tasks, one, replay)
        asymmetric += _error(net, tasks, two, replay)
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
        again = gptq(net, tasks, replay, settings=settings, progress=False)
        assert all(torch.equal(again[k].w_q, two[k].w_q) for k in two)
    assert symmetric < 0.5 * plain
    assert asymmetric < 0.9 * symmetric


def test_settings_out_of_range() -> None:
    with pytest.raises(ConfigError, match="damp"):
        GptqSettings(damp=0.0)


class TestQuantize:
    """`quantize(rounding=, inputs=)`."""

    @pytest.mark.parametrize("group_size", [None, 64])
    def test_the_prediction_comes_closer(
        self,
        float_pipe: TextToAudioPipeline,
        recorded: tuple[Calibration, Path],
        group_size: int | None,
    ) -> None:
        calibration, path = recorded
        inputs = ChosenInputs.load(path)
        errors = []
        for rounding in ("nearest", "gptq"):
            twin = copy.copy(float_pipe)
            twin.unet = copy.deepcopy(float_pipe.unet)
            config = QuantConfig(
                rounding=rounding, group_size=group_size, overrides=FEW, weight_observer="absmax"
            )
            given = inputs if rounding == "gptq" else None
            ptq4adm.quantize(twin, config, calibration, inputs=given, progress=False)
            replay = Replay(inputs)
            errors.append(0.0)
            with torch.no_grad():
                for batch in replay.batches():
                    error = replay.call(twin.unet, batch) - replay.call(float_pipe.unet, batch)
                    errors[-1] += float(error.square().sum())
        assert errors[1] < 0.8 * errors[0]

    def test_what_it_is_not_given(
        self,
        pipe: TextToAudioPipeline,
        calibration: Calibration,
        other_tiny_pipeline: Path,
        recorded: tuple[Calibration, Path],
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        config = QuantConfig(rounding="gptq", overrides=FEW)
        with pytest.raises(CalibrationError, match=r"ptq4adm\.calibrate\(.*inputs=FILE"):
            ptq4adm.quantize(pipe, config, calibration, progress=False)
        with pytest.raises(CalibrationError, match="missing, truncated"):
            ptq4adm.quantize(pipe, config, calibration, inputs=tmp_path / "no", progress=False)
        other = ptq4adm.load_pipeline(other_tiny_pipeline)
        with pytest.raises(CalibrationMismatchError, match="inputs were recorded on model"):
            ptq4adm.quantize(
                other,
                QuantConfig(rounding="gptq", activation="dynamic"),
                inputs=recorded[1],
                progress=False,
            )
        assert not ptq4adm.packing.checkpoint.is_quantized(pipe.unet)
        ptq4adm.quantize(
            pipe,
            QuantConfig(weight_observer="absmax", overrides=FEW),
            calibration,
            inputs=recorded[1],
            progress=False,
        )
        assert "they are not used" in caplog.text

    def test_a_failing_method_leaves_the_model_as_it_was(
        self,
        pipe: TextToAudioPipeline,
        recorded: tuple[Calibration, Path],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}

        def interrupt(*_: Any, **__: Any) -> Any:
            raise KeyboardInterrupt

        monkeypatch.setattr("ptq4adm.rounding.gptq.round_layer", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ptq4adm.quantize(
                pipe,
                QuantConfig(rounding="gptq", weight_observer="absmax", overrides=FEW),
                recorded[0],
                inputs=recorded[1],
                progress=False,
            )
        after = pipe.unet.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[k], before[k]) for k in before)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.unet.modules())


def test_every_method_has_a_name_in_the_config() -> None:
    assert set(ROUNDINGS) == {"nearest", *ROUNDERS}


def test_a_bias_takes_the_mean_of_the_error() -> None:
    net, tasks, replay = _chain()
    net.last.bias = nn.Parameter(torch.randn(8), requires_grad=False)
    settings = GptqSettings(is_asymmetric=True, budget=1)
    found = gptq(net, tasks, replay, settings=settings, progress=False)
    assert not isinstance(found["first"], ShiftedRows)  # it has no bias
    last = found["last"]
    assert isinstance(last, ShiftedRows)
    twin = Twin(net, tasks)
    for task in tasks:
        twin.set_rows(task, found[task.name])
    errors = []
    for batch in replay.batches():
        errors.append(replay.call(net, batch) - twin.call(replay, batch))
    mean = torch.cat(errors).flatten(1).mean(dim=0)
    assert float(mean.abs().max()) < 1e-4 * float(torch.cat(errors).abs().max())
    assert last.bias_shift is not None
    assert bool(last.bias_shift.abs().max() > 0.001)


def test_a_bias_takes_the_mean_of_a_layers_own_error_by_default() -> None:
    net, tasks, replay = _chain()
    net.last.bias = nn.Parameter(torch.randn(8), requires_grad=False)
    inputs: list[Tensor] = []
    with net.last.register_forward_hook(lambda _, args, __: inputs.append(args[0])):
        for batch in replay.batches():
            replay.call(net, batch)
    found = gptq(net, tasks, replay, progress=False)["last"]
    assert isinstance(found, ShiftedRows)
    weight = rows_to_weight(found.dequantize(), tasks[0].layout).flatten(1)
    x = torch.cat([fake_quantize(tasks[0], x, 7.0) for x in inputs])
    error = functional.linear(x, net.last.weight - weight).mean(dim=0)
    torch.testing.assert_close(found.bias_shift, error, rtol=1e-4, atol=1e-6)
    assert float(error.abs().max()) > 0.001
