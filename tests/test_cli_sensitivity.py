"""`ptq4adm sensitivity`, and a size budget and a step correction of `ptq4adm quantize`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import ptq4adm
from ptq4adm.cli import main
from ptq4adm.models.correction import StepCorrection
from ptq4adm.sensitivity import Sensitivity

PROMPTS = ["a dog barks", "rain on a roof"]
# most layers decided beforehand: the rest is measured in a second
FEW = [
    "--weight-observer",
    "absmax",
    "--override",
    "*.attentions.*=w4a8",
    "--override",
    "down_blocks.*=w4a8",
]


@pytest.fixture
def _no_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that gets as far as calibrating."""

    def ran(*_: object, **__: object) -> None:
        raise AssertionError("calibrated before everything was looked at")

    monkeypatch.setattr("ptq4adm.quantization.calibrate", ran)


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def file(tiny_pipeline: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sensitivity") / "s.json"
    arguments = [
        "-o",
        str(out),
        "--prompts",
        str(prompts_file),
        "--steps",
        "2",
        "--pairs",
        "2",
        *FEW,
    ]
    assert main(["sensitivity", str(tiny_pipeline), *arguments, "--budget", "0.4", "--quiet"]) == 0
    return out


def test_sensitivity_writes_errors_choice_and_curve(
    file: Path, float_pipe: ptq4adm.TextToAudioPipeline
) -> None:
    found = Sensitivity.load(file)
    found.check(float_pipe.unet)
    assert found.pairs == 2
    assert all(layer.error["w4a8"] > 0 for layer in found.layers)
    assert found.chosen is not None
    assert found.size_of(found.chosen) <= 0.4 * found.float16_bytes
    assert len(found.pareto) > 5


def test_a_budget_is_planned_from_the_file_with_its_reason(
    file: Path, tiny_pipeline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--dry-run", "--json", "--budget", "0.38", "--sensitivity", str(file)]
    assert main(["quantize", str(tiny_pipeline), *arguments, *FEW]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["bytes_after"] <= 0.38 * planned["bytes_before"]
    reasons = {row["name"]: row["reason"] for row in planned["rows"]}
    schemes = {row["scheme"] for row in planned["rows"]}
    assert {"w4a8", "w8a8"} <= schemes
    for layer in Sensitivity.load(file).layers:
        assert reasons[layer.name].startswith("integer program")
    assert not reasons["conv_in"].startswith("integer program")


def test_a_budget_that_sensitive_layers_at_8_bits_would_not_fit_can_be_met(
    file: Path, tiny_pipeline: Path, float_pipe: ptq4adm.TextToAudioPipeline
) -> None:
    overrides = {"*.attentions.*": "w4a8", "down_blocks.*": "w4a8"}
    uniform, protected = (
        ptq4adm.plan(
            float_pipe, ptq4adm.QuantConfig(overrides=overrides, protect_sensitive=protects)
        ).bytes_after
        for protects in (False, True)
    )
    assert uniform < protected
    budget = str(uniform / 1e6)  # in MB
    arguments = ["--dry-run", "--budget", budget, "--sensitivity", str(file)]
    assert main(["quantize", str(tiny_pipeline), *arguments, *FEW]) == 0


def test_quantize_measures_assigns_corrects_and_writes(
    tiny_pipeline: Path, prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run = ["--prompts", str(prompts_file), "--steps", "2", "--json", "--quiet"]
    arguments = ["-o", str(out), "--budget", "0.37", "--correction", *run, *FEW]
    assert main(["quantize", str(tiny_pipeline), *arguments]) == 0
    # nothing but the result is on standard output, whatever the solver prints
    done = json.loads(capsys.readouterr().out)
    assert done["unet_bytes"] <= 0.37 * done["unet_bytes_float16"]
    assert done["layers"]["w8a8"] > 0
    pipe = ptq4adm.load_pipeline(out)
    assert isinstance(pipe.correction, StepCorrection)
    assert len(pipe.correction.timesteps) == 2
    assert torch.isfinite(pipe.denoise(pipe.encode_prompts(PROMPTS), steps=2)).all()


@pytest.mark.usefixtures("_no_calibration")
def test_a_budget_that_cannot_be_met_is_refused_before_anything_runs(
    tiny_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["-o", str(tmp_path / "out"), "--budget", "0.1", "--quiet"]
    for command in ("quantize", "sensitivity"):
        assert main([command, str(tiny_pipeline), *out]) == 1
        error = capsys.readouterr().err
        assert "cannot be reached; the smallest that can is 0." in error
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("_no_calibration")
def test_what_cannot_end_well_is_refused_before_anything_runs(
    tiny_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        (["-o", str(tmp_path)], "is a folder; name a file"),
        (["-o", str(tmp_path / "s.json"), "--backend", "nonsense"], "nonsense"),
    ):
        assert main(["sensitivity", str(tiny_pipeline), *arguments, "--quiet"]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.usefixtures("_no_calibration")
def test_a_calibration_that_cannot_be_kept_is_refused_before_it_is_made(
    tiny_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["-o", str(tmp_path / "out"), "--save-calibration", str(tmp_path), "--quiet"]
    assert main(["quantize", str(tiny_pipeline), *options]) == 1
    assert "is a folder; name a file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_options_that_do_not_fit_are_wrong_command_lines(
    file: Path, tiny_pipeline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        (["--sensitivity", str(file)], "give --budget, too"),
        (["--budget", "0.4"], "give --sensitivity FILE"),
    ):
        assert main(["quantize", str(tiny_pipeline), "--dry-run", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_errors_of_another_model_are_refused(
    file: Path, other_tiny_pipeline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--dry-run", "--budget", "0.45", "--sensitivity", str(file)]
    assert main(["quantize", str(other_tiny_pipeline), *arguments]) == 1
    assert "measure this model" in capsys.readouterr().err


def test_layers_that_were_not_measured_are_named(
    file: Path, tiny_pipeline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # the file's overrides are not given again: more layers may take several schemes
    arguments = ["--dry-run", "--budget", "0.45", "--sensitivity", str(file)]
    assert main(["quantize", str(tiny_pipeline), *arguments]) == 1
    assert "measure with the same overrides" in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--budget", "0.3"], ["--bits", "w8a8"]])
def test_uniform_is_of_four_bits_without_a_budget(
    more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", "-o", "nowhere", "--uniform", *more]) == 2
    assert "--uniform is of one scheme of 4 bits" in capsys.readouterr().err
