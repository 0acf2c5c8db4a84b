"""Output errors of single layers, against the formula; the model afterwards."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rounding_inputs import record_inputs
from torch import Tensor, nn

import ptq4adm
from ptq4adm import Calibration, QuantConfig, Sensitivity, TextToAudioPipeline
from ptq4adm.calibration import ChosenInputs
from ptq4adm.errors import (
    CalibrationError,
    CalibrationMismatchError,
    ConfigError,
    NonFiniteError,
    UncalibratedStepError,
)
from ptq4adm.sensitivity import assign_schemes, measure_sensitivity, output_error
from ptq4adm.sensitivity.measure import spread

CONFIG = QuantConfig(
    weight_observer="absmax",
    overrides={"*.attentions.*": "float", "*.downsamplers.*": "w8a8", "down_blocks.*": "float"},
)
PROMPTS = ["a dog barks", "a bell rings"]


@pytest.fixture(scope="module")
def inputs(
    float_pipe: TextToAudioPipeline, tmp_path_factory: pytest.TempPathFactory
) -> ChosenInputs:
    folder = tmp_path_factory.mktemp("inputs")
    _, path = record_inputs(float_pipe, folder, steps=4, strategy="uniform-steps", size=8)
    return ChosenInputs.load(path)


@pytest.fixture(scope="module")
def measured(
    float_pipe: TextToAudioPipeline, calibration: Calibration, inputs: ChosenInputs
) -> Sensitivity:
    return measure_sensitivity(float_pipe, calibration, inputs, CONFIG, pairs=4, progress=False)


def predictions(unet: nn.Module, inputs: ChosenInputs, guidance: float) -> Tensor:
    """Equation (1)'s e, one pair at a time, float64 [N, ...]."""
    found = []
    for i in range(len(inputs.pairs)):
        with torch.no_grad():
            out = unet(
                inputs.sample[i],
                torch.tensor(int(inputs.timesteps[i])),
                encoder_hidden_states=None,
                class_labels=inputs.arguments["class_labels"][i],
            ).sample.double()
        found.append(out[0] + guidance * (out[1] - out[0]))
    return torch.stack(found)


@pytest.mark.parametrize("scheme", ["w4a8", "w8a8"])
def test_an_error_is_that_of_the_model_with_this_layer_quantized(
    pipe: TextToAudioPipeline,
    calibration: Calibration,
    inputs: ChosenInputs,
    measured: Sensitivity,
    scheme: str,
) -> None:
    layer = measured.layers[3]
    chosen = spread(inputs, 4)
    guidance = calibration.meta.guidance
    expected = predictions(pipe.unet, chosen, guidance)
    everything = {"*": "float", layer.name: scheme}
    ptq4adm.quantize(pipe, replace(CONFIG, overrides=everything), calibration, progress=False)
    # the pipeline's weights are float16 numbers, so its layers that stay float lose nothing
    found = predictions(pipe.unet, chosen, guidance)
    noise = (found - expected).square().flatten(1).sum(1)
    error = float((noise / expected.square().flatten(1).sum(1)).mean())
    assert layer.error[scheme] == pytest.approx(error, rel=0.02)


def test_fixed_layers_are_not_measured_and_sizes_are_the_plans(
    float_pipe: TextToAudioPipeline, calibration: Calibration, measured: Sensitivity
) -> None:
    names = [layer.name for layer in measured.layers]
    assert names
    assert not any(".attentions." in n or n.startswith("down_blocks") for n in names)
    assert "conv_in" not in names
    assert not any("time_emb" in n for n in names)
    for scheme in ("w4a8", "w8a8", "float"):
        config = replace(CONFIG, scheme=scheme, protect_sensitive=False)
        planned = ptq4adm.plan(float_pipe, config, calibration)
        assert measured.size_of(dict.fromkeys(names, scheme)) == planned.bytes_after
        assert measured.float16_bytes == planned.bytes_before
    for layer in measured.layers:
        assert 0 < layer.error["w8a8"] < layer.error["w4a8"] < 0.1


def test_all_layers_together_are_measured_alike(
    float_pipe: TextToAudioPipeline,
    calibration: Calibration,
    inputs: ChosenInputs,
    measured: Sensitivity,
) -> None:
    def error(schemes: dict[str, str]) -> float:
        return output_error(float_pipe, calibration, inputs, schemes, CONFIG, pairs=4)

    first = measured.layers[0]
    assert error({first.name: "w8a8"}) == first.error["w8a8"]
    assert error({}) == 0.0
    assert error({first.name: "float"}) == 0.0
    names = [layer.name for layer in measured.layers]
    assert error(dict.fromkeys(names, "w4a8")) > error(dict.fromkeys(names, "w8a8")) > 0
    with pytest.raises(ConfigError, match="'conv_in' is no layer"):
        error({"conv_in": "w4a8"})


def test_the_model_is_as_it_was_even_after_an_error(
    pipe: TextToAudioPipeline,
    calibration: Calibration,
    inputs: ChosenInputs,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = {name: id(module) for name, module in pipe.unet.named_modules()}
    hooks = len(pipe.unet._forward_pre_hooks)

    def check() -> None:
        assert {name: id(module) for name, module in pipe.unet.named_modules()} == before
        assert len(pipe.unet._forward_pre_hooks) == hooks

    measure_sensitivity(pipe, calibration, inputs, CONFIG, pairs=1, progress=False)
    check()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ptq4adm.W4A8Conv2d, "forward", stop)
    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(pipe, calibration, inputs, CONFIG, pairs=1, progress=False)
    check()


def test_pairs_are_spread_over_the_timesteps(inputs: ChosenInputs) -> None:
    assert sorted(spread(inputs, 4).timesteps.tolist()) == sorted(
        inputs.timesteps.unique().tolist()
    )
    assert len(spread(inputs, 100).pairs) == len(inputs.pairs)
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(ConfigError, match="pairs"):
            spread(inputs, wrong)  # type: ignore[arg-type]


def test_other_models_missing_scales_and_nothing_to_choose_are_refused(
    float_pipe: TextToAudioPipeline, calibration: Calibration, inputs: ChosenInputs
) -> None:
    def measure(**changes: object) -> Sensitivity:
        given = {"calibration": calibration, "inputs": inputs, "config": CONFIG} | changes
        return measure_sensitivity(float_pipe, **given, progress=False)  # type: ignore[arg-type]

    with pytest.raises(CalibrationMismatchError, match="inputs were recorded"):
        measure(inputs=replace(inputs, fingerprint="0" * 64))
    with pytest.raises(CalibrationError, match="need a calibration"):
        measure(calibration=None)
    with pytest.raises(CalibrationError, match="no layer can take several schemes"):
        measure(config=QuantConfig(overrides={"*": "w8a8", "conv_out": "float"}))
    with pytest.raises(UncalibratedStepError):
        measure(inputs=replace(inputs, timesteps=inputs.timesteps + 1000))


def test_an_error_that_is_no_number_is_refused(
    pipe: TextToAudioPipeline, inputs: ChosenInputs
) -> None:
    torch.nn.init.zeros_(pipe.unet.conv_out.weight)
    torch.nn.init.zeros_(pipe.unet.conv_out.bias)
    given = replace(inputs, fingerprint=ptq4adm.calibration.fingerprint(pipe.unet))
    config = replace(CONFIG, activation="dynamic")
    with pytest.raises(NonFiniteError, match="the float model's prediction"):
        measure_sensitivity(pipe, None, given, config, pairs=1, progress=False)


def test_dynamic_scales_need_no_calibration(
    float_pipe: TextToAudioPipeline, inputs: ChosenInputs
) -> None:
    config = replace(CONFIG, activation="dynamic")
    found = measure_sensitivity(float_pipe, None, inputs, config, pairs=1, progress=False)
    assert all(layer.error["w4a8"] > 0 for layer in found.layers)


def test_an_assignment_is_what_quantize_does(
    pipe: TextToAudioPipeline, calibration: Calibration, measured: Sensitivity
) -> None:
    low = measured.size_of({layer.name: "w4a8" for layer in measured.layers})
    high = measured.size_of({layer.name: "w8a8" for layer in measured.layers})
    budget = (low + high) / 2 / measured.float16_bytes
    chosen = assign_schemes(measured, budget)
    assert len(set(chosen.values())) > 1
    done = ptq4adm.quantize(pipe, CONFIG, calibration, progress=False, assignment=chosen)
    assert done.bytes_after == measured.size_of(chosen) <= budget * measured.float16_bytes
    rows = {row.name: row for row in done.rows}
    for name, scheme in chosen.items():
        assert rows[name].scheme == scheme
        assert rows[name].reason.startswith("integer program")
