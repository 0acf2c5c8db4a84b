"""`calibrate` with a strategy, on the small pipeline: from prompts to a quantized model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ptq4adm
from ptq4adm.calibration import STRATEGIES, ChosenInputs, SelectionSettings
from ptq4adm.cli import main
from ptq4adm.errors import ConfigError
from ptq4adm.protocols import SamplingDefaults

PROMPTS = ["a dog barks", "a bell rings", "rain"]


def _calibrate(pipe: Any, **arguments: Any) -> ptq4adm.Calibration:
    return ptq4adm.calibrate(pipe, PROMPTS, progress=False, **arguments)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_chosen_set_quantizes_the_pipeline(
    pipe: ptq4adm.TextToAudioPipeline, strategy: str
) -> None:
    calibration = _calibrate(pipe, strategy=strategy, size=6)
    assert calibration.selection is not None
    assert calibration.selection.strategy == strategy
    assert len(calibration.selection.pairs) == 6
    config = ptq4adm.QuantConfig(weight_observer="absmax")
    ptq4adm.quantize(pipe, config, calibration, progress=False)
    assert torch.isfinite(pipe.denoise(pipe.encode_prompts("a dog barks"))).all()


def test_the_cache_finds_signatures_and_calibration_again(
    float_pipe: ptq4adm.TextToAudioPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _calibrate(float_pipe, strategy="activation-aware", size=6, cache=tmp_path)

    def runs(*_: object, **__: object) -> None:
        raise AssertionError("the model runs again")

    monkeypatch.setattr(type(float_pipe), "denoise", runs)
    again = _calibrate(float_pipe, strategy="activation-aware", size=6, cache=tmp_path)
    assert again.digest() == first.digest()
    with pytest.raises(AssertionError, match="runs again"):
        _calibrate(float_pipe, strategy="activation-aware", size=6, cache=tmp_path, seed=1)


def test_inputs_give_the_ranges_that_were_recorded(
    float_pipe: ptq4adm.TextToAudioPipeline, tmp_path: Path
) -> None:
    path = tmp_path / "inputs.safetensors"
    calibration = _calibrate(float_pipe, strategy="random", size=5, inputs=path)
    found = ChosenInputs.load(path)
    found.check(float_pipe.unet)
    assert found.sample.shape == (5, 2, *float_pipe.latent_shape())
    assert set(found.arguments) == {"class_labels"}
    # replayed one by one, they show the last layer what it saw
    seen: dict[int, float] = {}
    buckets = calibration.buckets

    def look(_: object, args: tuple[torch.Tensor, ...]) -> None:
        value = float(args[0].abs().max())
        seen[bucket] = max(seen.get(bucket, 0.0), value)

    handle = float_pipe.unet.conv_out.register_forward_pre_hook(look)
    with torch.no_grad():
        for i, t in enumerate(found.timesteps.tolist()):
            bucket = buckets.bucket_of(t)
            arguments = {name: tensor[i] for name, tensor in found.arguments.items()}
            float_pipe.unet(found.sample[i], t, encoder_hidden_states=None, **arguments)
    handle.remove()
    (record,) = calibration.records["conv_out"]
    recorded = record.absmax()
    for bucket, value in seen.items():
        assert value == pytest.approx(float(recorded[bucket]), rel=1e-4)


def test_what_contradicts_itself_is_refused_before_anything_runs(
    float_pipe: ptq4adm.TextToAudioPipeline, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="size: is of a choice of pairs"):
        _calibrate(float_pipe, size=6)
    with pytest.raises(ConfigError, match="inputs: is of a choice of pairs"):
        _calibrate(float_pipe, inputs=tmp_path / "inputs")
    with pytest.raises(ConfigError, match="give it there"):
        _calibrate(float_pipe, strategy=SelectionSettings("random"), size=6)
    with pytest.raises(ConfigError, match="'best', needs one of"):
        _calibrate(float_pipe, strategy="best")
    with pytest.raises(ConfigError, match=r"got 13 pairs, needs 4 .* to 12 \(3 prompts of 4 steps"):
        _calibrate(float_pipe, strategy="random", size=13)


class TestCommand:
    """`ptq4adm quantize --strategy`."""

    def test_it_chooses_and_says_so(
        self, tiny_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("\n".join(PROMPTS))
        arguments = ["quantize", str(tiny_pipeline), "-o", str(tmp_path / "out")]
        arguments += ["--prompts", str(prompts), "--strategy", "activation-aware", "--size", "6"]
        arguments += ["--save-calibration", str(tmp_path / "c"), "--inputs", str(tmp_path / "i")]
        assert main(arguments) == 0
        told = capsys.readouterr().err
        assert "activation-aware chose 6 of 12 pairs: " in told
        selection = ptq4adm.Calibration.load(tmp_path / "c").selection
        assert selection is not None
        assert len(selection.pairs) == 6
        assert ChosenInputs.load(tmp_path / "i").sample.shape[0] == 6

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--strategy", "best"], "invalid choice: 'best'"),
            (["--size", "6"], "--size"),
            (["--inputs", "file"], "--inputs"),
            (["--strategy", "random", "--calibration", "file"], "--calibration"),
            (["--strategy", "random", "--activation", "dynamic"], "dynamic"),
        ],
    )
    def test_options_that_contradict_each_other_are_refused(
        self,
        tiny_pipeline: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        options: list[str],
        message: str,
    ) -> None:
        assert main(["quantize", str(tiny_pipeline), "-o", str(tmp_path / "out"), *options]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_command_knows_every_strategy() -> None:
    from ptq4adm.cli.quantize_options import _STRATEGIES

    assert tuple(STRATEGIES) == _STRATEGIES


def test_of_many_steps_twenty_five_stand_for_all(pipe: ptq4adm.TextToAudioPipeline) -> None:
    pipe = replace(pipe, defaults=SamplingDefaults(steps=200, guidance=1.0))
    found = ptq4adm.calibrate(pipe, ["a dog barks"], progress=False)
    assert (found.meta.steps, found.meta.buckets) == (25, 10)
    # every bucket of the 200 steps has scales
    assert all(found.buckets.calibrated)
