"""Reconstruction: its gradients against formulas, that it helps, and what it leaves as it was."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from rounding_inputs import make_task, record_inputs
from torch import nn

import ptq4adm
from ptq4adm import Calibration, QuantConfig, TextToAudioPipeline
from ptq4adm.calibration import ChosenInputs
from ptq4adm.errors import CalibrationError, ConfigError, NonFiniteError
from ptq4adm.packing.layout import weight_to_rows
from ptq4adm.rounding import LayerTask, Replay
from ptq4adm.rounding.activations import fake_quantize
from ptq4adm.rounding.methods import ROUNDERS
from ptq4adm.rounding.reconstruct import ReconstructSettings, reconstruct
from ptq4adm.rounding.straight_through import round_input, round_weight
from ptq4adm.rounding.trained import TrainedTwin, TrainedWeight

PROMPTS = ["a dog barks", "a bell rings"]
# a few layers of each kind, and one of 8 bits: all of them take longer than a test should
FEW = {"*": "float", "down_blocks.0.resnets.0.conv*": "w4a8", "up_blocks.1.resnets.0.*": "w4a8"}
FEW |= {"mid_block.attentions.*": "w4a8", "*.time_emb_proj": "float"}
FEW |= {"mid_block.resnets.0.conv1": "w8a8"}
SHORT = ReconstructSettings(steps=24, rate=3e-3)


@pytest.fixture(scope="module")
def recorded(
    float_pipe: TextToAudioPipeline, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Calibration, ChosenInputs]:
    calibration, path = record_inputs(float_pipe, tmp_path_factory.mktemp("inputs"))
    return calibration, ChosenInputs.load(path)


def make_tasks(
    pipe: TextToAudioPipeline, recorded: tuple[Calibration, ChosenInputs], **config: object
) -> list[LayerTask]:
    """The tasks that `quantize` makes of a copy."""
    seen: list[LayerTask] = []

    def keep(_: nn.Module, tasks: list[LayerTask], *__: object, **___: object) -> object:
        seen.extend(tasks)
        return {task.name: task.start for task in tasks}

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ROUNDERS, "reconstruct", keep)  # type: ignore[arg-type]
        ptq4adm.quantize(
            copy.deepcopy(pipe),
            QuantConfig(rounding="reconstruct", overrides=FEW, **config),  # type: ignore[arg-type]
            recorded[0],
            inputs=recorded[1],
            progress=False,
        )
    layers = dict(pipe.unet.named_modules())
    return [replace(task, layer=layers[task.name]) for task in seen]


# --- gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("has_groups", [False, True])
def test_a_weight_s_gradients_are_those_of_the_formula(has_groups: bool) -> None:
    N, K = 5, 128
    position = 4.0 * torch.randn(N, K)
    position[0, :3] = torch.tensor([7.4, -8.3, 100.0])  # beyond what an integer can be
    position[1, :3] = torch.tensor([0.5, 1.5, -2.5])  # ties
    scale, out = torch.rand(N) + 0.1, torch.randn(N, K)
    mult = torch.randint(1, 16, (N, K)).float() if has_groups else None
    position.requires_grad_()
    scale.requires_grad_()
    weight = round_weight(position, scale, mult, 4)
    (weight * out).sum().backward()
    m = torch.ones(N, K, dtype=torch.float64) if mult is None else mult.double()
    q = torch.clamp(torch.round(position.detach().double()), -8, 7)
    s = scale.detach().double()[:, None]
    assert torch.equal(q[1, :3], torch.tensor([0.0, 2.0, -2.0], dtype=torch.float64))
    torch.testing.assert_close(weight.detach().double(), q * m * s, rtol=1e-6, atol=1e-9)
    assert position.grad is not None
    assert scale.grad is not None
    torch.testing.assert_close(position.grad.double(), out.double() * m * s, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(
        scale.grad.double(), (out.double() * m * q).sum(1), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Conv2d(5, 3, 3, padding=1), (2, 5, 4, 3)), (nn.Linear(5, 3), (2, 7, 5))],
)
def test_an_input_s_gradient_stops_where_it_is_clipped(
    layer: nn.Linear | nn.Conv2d, shape: tuple[int, ...]
) -> None:
    # bucket 1 is of timesteps 50 .. 99; the segments have 2 and 3 channels
    x_scale = torch.tensor([[9.0, 0.004], [9.0, 0.02]])
    task, x = make_task(layer, (2, 3), x_scale), torch.randn(shape, requires_grad=True)
    out = torch.randn(shape)
    y = round_input(task, x, 60.0)
    (y * out).sum().backward()
    assert torch.equal(y.detach(), fake_quantize(task, x.detach(), 60.0))
    scales = torch.tensor([0.004, 0.004, 0.02, 0.02, 0.02], dtype=torch.float64)
    if isinstance(layer, nn.Conv2d):
        scales = scales[:, None, None]
    is_inside = torch.round(x.detach().double() / scales).abs() <= 127
    assert 0 < int(is_inside.sum()) < is_inside.numel()
    assert x.grad is not None
    assert torch.equal(x.grad, out * is_inside)


def test_a_measured_input_is_not_clipped() -> None:
    task, x = make_task(nn.Linear(5, 3)), torch.randn(4, 5, requires_grad=True)
    round_input(task, x, 1.0).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones(4, 5))


# --- the weight ---------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [None, 64])
def test_a_weight_starts_as_plain_rounding(group_size: int | None) -> None:
    task = make_task(nn.Conv2d(70, 6, 3), group_size=group_size)
    rows = TrainedWeight(task).rows()
    assert torch.equal(rows.w_q, task.start.w_q)
    torch.testing.assert_close(rows.w_scale, task.start.w_scale)
    assert (rows.w_mult is None) == (group_size is None)
    assert task.layer.weight.grad is None


def test_padding_stays_zero_and_positions_stay_in_reach() -> None:
    task = make_task(nn.Conv2d(5, 6, 3))
    trained = TrainedWeight(task)
    optimizer = torch.optim.Adam([trained.position], lr=3.0)
    for _ in range(5):
        optimizer.zero_grad()
        (trained.weight() * torch.randn(6, 5, 3, 3)).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        trained.keep_in_reach()
    w_q = trained.rows().w_q
    padding = weight_to_rows(torch.ones_like(task.layer.weight), task.layout) == 0
    assert not bool(w_q[padding].any())
    assert not torch.equal(w_q, task.start.w_q)
    assert int(w_q.min()) >= -8
    assert int(w_q.max()) <= 7
    reach = trained.position.detach()
    assert float(reach.min()) >= -8.49
    assert float(reach.max()) <= 7.49


# --- the model ----------------------------------------------------------------------------------


def output_error(
    pipe: TextToAudioPipeline, tasks: list[LayerTask], rows: object, replay: Replay
) -> float:
    """Equation (1) of the module, through a twin that has the rows, in float64."""
    twin = TrainedTwin(
        pipe.unet,
        [replace(task, start=rows[task.name], bits=8) for task in tasks],  # type: ignore[index]
    )
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in replay.batches():
            u, c = replay.call(pipe.unet, batch).double().unflatten(0, (-1, 2)).unbind(1)
            p, q = twin.call(replay, batch).double().unflatten(0, (-1, 2)).unbind(1)
            noise = (p + 3.0 * (q - p)) - (u + 3.0 * (c - u))
            total += float(noise.square().sum())
            count += noise.numel()
    return total / count


@pytest.mark.parametrize("config", [{}, {"group_size": 64}, {"activation": "dynamic"}])
def test_it_brings_the_output_nearer_and_changes_no_format(
    float_pipe: TextToAudioPipeline,
    recorded: tuple[Calibration, ChosenInputs],
    config: dict[str, object],
) -> None:
    tasks = make_tasks(float_pipe, recorded, **config)
    assert {task.bits for task in tasks} == {4, 8}
    replay = Replay(recorded[1], guidance=3.0)
    before = {name: value.clone() for name, value in float_pipe.unet.state_dict().items()}
    found = reconstruct(float_pipe.unet, tasks, replay, progress=False, settings=SHORT)
    plain = {task.name: task.start for task in tasks}
    assert output_error(float_pipe, tasks, found, replay) < 0.5 * output_error(
        float_pipe, tasks, plain, replay
    )
    for task in tasks:
        rows = found[task.name]
        if task.bits == 8:
            assert rows is task.start
            continue
        assert rows.w_q.dtype == torch.int8
        assert rows.w_q.shape == task.start.w_q.shape
        assert int(rows.w_q.min()) >= -8
        assert int(rows.w_q.max()) <= 7
        assert float(rows.w_scale.min()) > 0
        assert not rows.w_scale.requires_grad
        assert (rows.w_mult is None) == (task.start.w_mult is None)
    for name, value in float_pipe.unet.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.grad is None for p in float_pipe.unet.parameters())
    assert all("forward" not in vars(m) for m in float_pipe.unet.modules())


def test_a_seed_decides_and_no_grad_does_not(
    float_pipe: TextToAudioPipeline, recorded: tuple[Calibration, ChosenInputs]
) -> None:
    tasks, replay = make_tasks(float_pipe, recorded), Replay(recorded[1], batch=1, guidance=3.0)
    runs = []
    for seed in (0, 0, 1):
        settings = replace(SHORT, steps=3, seed=seed)
        with torch.no_grad():
            runs.append(
                reconstruct(float_pipe.unet, tasks, replay, progress=False, settings=settings)
            )
    names = [task.name for task in tasks if task.bits == 4]
    assert all(torch.equal(runs[0][n].w_scale, runs[1][n].w_scale) for n in names)
    assert all(torch.equal(runs[0][n].w_q, runs[1][n].w_q) for n in names)
    assert any(not torch.equal(runs[0][n].w_scale, runs[2][n].w_scale) for n in names)


def test_a_model_of_half_precision_is_trained_in_float32(
    pipe: TextToAudioPipeline, recorded: tuple[Calibration, ChosenInputs]
) -> None:
    inputs = recorded[1]
    tasks = make_tasks(pipe, recorded)
    half = pipe.unet.to(torch.bfloat16)
    arguments = {name: t.to(torch.bfloat16) for name, t in inputs.arguments.items()}
    given = replace(inputs, sample=inputs.sample.to(torch.bfloat16), arguments=arguments)
    replay = Replay(given, guidance=3.0)
    found = reconstruct(half, tasks, replay, progress=False, settings=replace(SHORT, steps=3))
    trained = [task for task in tasks if task.bits == 4]
    assert all(found[task.name].w_scale.dtype == torch.float32 for task in trained)
    assert any(not torch.equal(found[t.name].w_scale, t.start.w_scale) for t in trained)


def test_quantize_puts_in_what_was_trained(
    pipe: TextToAudioPipeline, recorded: tuple[Calibration, ChosenInputs]
) -> None:
    kept: dict[str, object] = {}

    def short(*args: object, **options: object) -> object:
        assert args[2].guidance == recorded[0].meta.guidance  # type: ignore[attr-defined]
        kept.update(reconstruct(*args, settings=replace(SHORT, steps=4), **options))  # type: ignore[arg-type]
        return kept

    ptq4adm.quantize(
        pipe,
        QuantConfig(rounding="reconstruct", overrides=FEW),
        recorded[0],
        inputs=recorded[1],
        rounder=short,  # type: ignore[arg-type]
        progress=False,
    )
    modules = dict(pipe.unet.named_modules())
    assert kept
    for name, rows in kept.items():
        packed = modules[name].quantized_rows()
        assert torch.equal(packed.w_q, rows.w_q)  # type: ignore[attr-defined]
        assert torch.equal(packed.w_scale, rows.w_scale)  # type: ignore[attr-defined]


# --- what is refused ----------------------------------------------------------------------------


def test_a_rounder_needs_a_rounding_that_has_one(
    pipe: TextToAudioPipeline, recorded: tuple[Calibration, ChosenInputs]
) -> None:
    with pytest.raises(ConfigError, match=r"rounder: .* 'nearest', which has none"):
        ptq4adm.quantize(pipe, QuantConfig(), recorded[0], rounder=reconstruct, progress=False)
    longer = partial(reconstruct, settings=SHORT)
    with pytest.raises(ConfigError, match="is that of rounding='reconstruct', and config"):
        ptq4adm.quantize(
            pipe,
            QuantConfig(rounding="gptq"),
            recorded[0],
            inputs=recorded[1],
            rounder=longer,
            progress=False,
        )
    assert isinstance(pipe.unet.conv_in, nn.Conv2d)


def test_halves_need_their_guidance(
    float_pipe: TextToAudioPipeline, recorded: tuple[Calibration, ChosenInputs]
) -> None:
    tasks = make_tasks(float_pipe, recorded)
    with pytest.raises(CalibrationError, match="guidance scale that combines them is not known"):
        reconstruct(float_pipe.unet, tasks, Replay(recorded[1]), progress=False, settings=SHORT)


def test_a_prediction_is_combined_as_the_sampler_does(
    recorded: tuple[Calibration, ChosenInputs],
) -> None:
    inputs, flat = recorded[1], torch.randn(6, 2, 3, 3)
    guided = Replay(inputs, guidance=2.5).guided(flat)
    torch.testing.assert_close(guided, -1.5 * flat[0::2] + 2.5 * flat[1::2])
    one = replace(inputs, sample=inputs.sample[:, :1])
    assert torch.equal(Replay(one).guided(flat), flat)
    three = replace(inputs, sample=inputs.sample[:, [0, 1, 1]])
    with pytest.raises(CalibrationError, match="3 samples a pair"):
        Replay(three).guided(flat)


def test_a_poisoned_target_is_named(
    float_pipe: TextToAudioPipeline, recorded: tuple[Calibration, ChosenInputs]
) -> None:
    tasks = make_tasks(float_pipe, recorded)
    sample = recorded[1].sample.clone()
    sample[:, 0, 0, 0, 0] = float("nan")
    replay = Replay(replace(recorded[1], sample=sample), guidance=3.0)
    with pytest.raises(NonFiniteError, match="timestep"):
        reconstruct(float_pipe.unet, tasks, replay, progress=False, settings=SHORT)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps: got 0"),
        ({"steps": True}, "steps: got True"),
        ({"rate": 0.0}, "rate: got 0.0"),
        ({"scale_rate": float("nan")}, "scale_rate: got nan"),
        ({"minutes": float("inf")}, "minutes: got inf"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ReconstructSettings(**settings)  # type: ignore[arg-type]


def test_a_budget_of_no_time_keeps_plain_rounding(
    float_pipe: TextToAudioPipeline, recorded: tuple[Calibration, ChosenInputs]
) -> None:
    tasks, replay = make_tasks(float_pipe, recorded), Replay(recorded[1], guidance=3.0)
    settings = ReconstructSettings(minutes=1e-9)
    found = reconstruct(float_pipe.unet, tasks, replay, progress=False, settings=settings)
    assert all(torch.equal(found[t.name].w_q, t.start.w_q) for t in tasks)
