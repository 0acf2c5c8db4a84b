"""Every bad input has an error of its own class, before anything is changed or written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ptq4adm
from ptq4adm import errors
from ptq4adm.cli import main
from ptq4adm.packing.checkpoint import WEIGHTS_FILE, is_quantized

PROMPTS = ["a dog barks", "rain on a roof"]


@pytest.fixture(scope="module")
def calibration(tiny_pipeline: Path) -> ptq4adm.Calibration:
    pipe = ptq4adm.load_pipeline(tiny_pipeline)
    return ptq4adm.calibrate(pipe, PROMPTS, steps=2, buckets=10, progress=False)


@pytest.fixture(scope="module")
def packed(
    tiny_pipeline: Path,
    calibration: ptq4adm.Calibration,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    pipe = ptq4adm.load_pipeline(tiny_pipeline)
    ptq4adm.quantize(pipe, ptq4adm.QuantConfig(), calibration, progress=False)
    return ptq4adm.save_pipeline(pipe, tmp_path_factory.mktemp("packed") / "w4a8")


@pytest.fixture
def broken(packed: Path, tmp_path: Path) -> Path:
    """A copy of the packed model to be damaged."""
    return shutil.copytree(packed, tmp_path / "broken")


def _edit_config(folder: Path, edit: Callable[[dict], None]) -> None:
    path = folder / "unet" / "config.json"
    config = json.loads(path.read_text())
    edit(config["quantization_config"])
    path.write_text(json.dumps(config))


def _edit_tensors(folder: Path, edit: Callable[[dict], None]) -> None:
    path = folder / "unet" / WEIGHTS_FILE
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


# --- what to quantize ---------------------------------------------------------------------------


def test_unknown_layer_pattern(tiny_pipeline: Path, calibration: ptq4adm.Calibration) -> None:
    pipe = ptq4adm.load_pipeline(tiny_pipeline)
    config = ptq4adm.QuantConfig(overrides={"*.conv_shortcutt": "w8a8"})
    with pytest.raises(errors.PatternError, match=r"conv_shortcutt.*closest are.*conv_shortcut'"):
        ptq4adm.quantize(pipe, config, calibration, progress=False)
    assert not is_quantized(pipe.unet)


def test_calibration_of_another_model(
    other_tiny_pipeline: Path, calibration: ptq4adm.Calibration
) -> None:
    pipe = ptq4adm.load_pipeline(other_tiny_pipeline)
    with pytest.raises(errors.CalibrationMismatchError, match="calibrate this model"):
        ptq4adm.quantize(pipe, ptq4adm.QuantConfig(), calibration, progress=False)
    assert not is_quantized(pipe.unet)


def test_no_calibration(tiny_pipeline: Path) -> None:
    pipe = ptq4adm.load_pipeline(tiny_pipeline)
    with pytest.raises(errors.CalibrationError, match="activation='dynamic'"):
        ptq4adm.quantize(pipe, ptq4adm.QuantConfig(), progress=False)


def test_broken_calibration_file(
    calibration: ptq4adm.Calibration, tiny_pipeline: Path, tmp_path: Path
) -> None:
    path = tmp_path / "calibration.safetensors"
    calibration.save(path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(errors.CalibrationError, match="truncated"):
        ptq4adm.Calibration.load(path)
    with pytest.raises(errors.CalibrationError, match="no such file"):
        ptq4adm.Calibration.load(tmp_path / "missing")
    with pytest.raises(errors.CalibrationError, match="not a calibration"):
        ptq4adm.Calibration.load(tiny_pipeline / "unet" / WEIGHTS_FILE)


def test_nan_weights(tiny_pipeline: Path) -> None:
    pipe = ptq4adm.load_pipeline(tiny_pipeline)
    pipe.unet.mid_block.resnets[0].conv1.weight[3, 2, 1, 0] = float("nan")
    config = ptq4adm.QuantConfig(activation="dynamic")
    with pytest.raises(errors.NonFiniteError, match=r"mid_block\.resnets\.0\.conv1"):
        ptq4adm.quantize(pipe, config, progress=False)
    with pytest.raises(errors.NonFiniteError, match=r"mid_block\.resnets\.0\.conv1"):
        ptq4adm.calibrate(pipe, PROMPTS, steps=1, buckets=1, progress=False)
    assert not is_quantized(pipe.unet)


def test_nan_activations_while_calibrating_name_the_layer_and_the_prompt(
    tiny_pipeline: Path,
) -> None:
    pipe = ptq4adm.load_pipeline(tiny_pipeline)

    def poison(_: torch.nn.Module, __: object, output: torch.Tensor) -> torch.Tensor:
        output[1] = float("inf")
        return output

    pipe.unet.mid_block.resnets[1].norm1.register_forward_hook(poison)
    with pytest.raises(errors.NonFiniteError, match=r"'mid_block\.resnets\.1\.conv1'.*rain"):
        ptq4adm.calibrate(pipe, PROMPTS, steps=1, guidance=1.0, buckets=1, progress=False)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_nan_activations_while_generating(packed: Path, backend: str) -> None:
    pipe = ptq4adm.load_pipeline(packed, backend=backend)
    conditioning = pipe.encode_prompts(PROMPTS)
    conditioning.tensors["class_labels"][0, 0] = float("nan")
    with pytest.raises(errors.NonFiniteError, match="NaN"):
        pipe.denoise(conditioning, steps=2)


def test_quantizing_twice(packed: Path, calibration: ptq4adm.Calibration) -> None:
    pipe = ptq4adm.load_pipeline(packed)
    with pytest.raises(errors.ConfigError, match="quantized already"):
        ptq4adm.quantize(pipe, ptq4adm.QuantConfig(), calibration, progress=False)


# --- files --------------------------------------------------------------------------------------


def test_truncated_weights(broken: Path) -> None:
    path = broken / "unet" / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(errors.TruncatedCheckpointError, match="copy the model again"):
        ptq4adm.load_pipeline(broken)


def test_truncated_config(broken: Path) -> None:
    path = broken / "unet" / "config.json"
    path.write_text(path.read_text()[:-200])
    with pytest.raises(errors.CheckpointError, match=r"config\.json"):
        ptq4adm.load_pipeline(broken)


def test_wrong_version(broken: Path) -> None:
    _edit_config(broken, lambda c: c.update(format_version=99))
    with pytest.raises(errors.CheckpointVersionError, match=r"99.*upgrade ptq4adm"):
        ptq4adm.load_pipeline(broken)


def test_another_method(broken: Path) -> None:
    _edit_config(broken, lambda c: c.update(quant_method="gptq"))
    with pytest.raises(errors.CheckpointVersionError, match="gptq"):
        ptq4adm.load_pipeline(broken)


def test_wrong_shape(broken: Path) -> None:
    name = "mid_block.resnets.0.conv1.qweight"
    _edit_tensors(broken, lambda t: t.update({name: t[name][:, :-32].clone()}))
    with pytest.raises(errors.CheckpointShapeError, match=r"mid_block\.resnets\.0\.conv1\.qweight"):
        ptq4adm.load_pipeline(broken)


def test_missing_tensor(broken: Path) -> None:
    _edit_tensors(broken, lambda t: t.pop("mid_block.resnets.0.conv1.w_scale"))
    with pytest.raises(errors.CheckpointError, match=r"lacks 'mid_block\.resnets\.0\.conv1"):
        ptq4adm.load_pipeline(broken)


def test_missing_component(broken: Path) -> None:
    shutil.rmtree(broken / "vocoder")
    with pytest.raises(errors.MissingComponentError, match="'vocoder' is missing"):
        ptq4adm.load_pipeline(broken)


def test_missing_unet_weights(broken: Path) -> None:
    (broken / "unet" / WEIGHTS_FILE).unlink()
    with pytest.raises(errors.MissingComponentError, match=WEIGHTS_FILE):
        ptq4adm.load_pipeline(broken)


def test_unwritable_output(packed: Path, tmp_path: Path) -> None:
    pipe = ptq4adm.load_pipeline(packed)
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.OutputError, match="choose another output"):
        ptq4adm.save_pipeline(pipe, tmp_path / "file" / "out")
    with pytest.raises(errors.OutputError, match="not a folder"):
        ptq4adm.save_pipeline(pipe, tmp_path / "file")
    # a file system that refuses even the superuser
    with pytest.raises(errors.OutputError, match="choose another output"):
        ptq4adm.save_pipeline(pipe, "/proc/ptq4adm-out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_disk_full_while_saving_leaves_nothing(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    pipe = ptq4adm.load_pipeline(packed)
    monkeypatch.setattr("ptq4adm.packing.checkpoint.save_file", full)
    with pytest.raises(errors.OutputError, match="No space left"):
        ptq4adm.save_pipeline(pipe, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- running ------------------------------------------------------------------------------------


def test_unknown_and_unavailable_backend(packed: Path, tiny_pipeline: Path) -> None:
    with pytest.raises(errors.UnknownBackendError, match="'gpu' is unknown; use one of"):
        ptq4adm.load_pipeline(packed, backend="gpu")
    with pytest.raises(errors.BackendUnavailableError, match="cuda"):
        ptq4adm.load_pipeline(packed, backend="cuda")
    pipe = ptq4adm.load_pipeline(tiny_pipeline)
    config = ptq4adm.QuantConfig(activation="dynamic", backend="gpu")
    with pytest.raises(errors.UnknownBackendError):
        ptq4adm.quantize(pipe, config, progress=False)
    assert not is_quantized(pipe.unet)


def test_empty_prompt(packed: Path, tiny_pipeline: Path) -> None:
    with pytest.raises(errors.PromptError, match="prompt 1 is empty"):
        ptq4adm.load_pipeline(packed)(["a dog", " "], steps=2)
    with pytest.raises(errors.PromptError, match="prompt 0 is empty"):
        ptq4adm.calibrate(ptq4adm.load_pipeline(tiny_pipeline), [""], progress=False)


def test_steps_outside_the_calibrated_range(packed: Path) -> None:
    pipe = ptq4adm.load_pipeline(packed)
    assert pipe(PROMPTS[0], steps=2).isfinite().all()
    # two steps reached two of ten buckets; a third step lies between them
    with pytest.raises(errors.UncalibratedStepError, match="calibrate with more steps"):
        pipe(PROMPTS[0], steps=3)
    sample = torch.zeros(1, 8, 8, 8)
    conditioning = pipe.encode_prompts(PROMPTS[0])
    with pytest.raises(errors.UncalibratedStepError, match=r"outside 0 \.\. 999"):
        pipe.unet(sample, 1000, **conditioning.arguments)
    with pytest.raises(errors.MixedTimestepError, match="one batch"):
        pipe.unet(
            sample.expand(2, -1, -1, -1),
            torch.tensor([999, 499]),
            **conditioning.expand(2).arguments,
        )


# --- all of them --------------------------------------------------------------------------------


def test_every_bad_input_has_its_own_class() -> None:
    classes = [
        errors.PatternError,
        errors.CalibrationMismatchError,
        errors.TruncatedCheckpointError,
        errors.CheckpointVersionError,
        errors.CheckpointShapeError,
        errors.MissingComponentError,
        errors.NonFiniteError,
        errors.OutputError,
        errors.UnknownBackendError,
        errors.BackendUnavailableError,
        errors.PromptError,
        errors.UncalibratedStepError,
    ]
    for cls in classes:
        assert issubclass(cls, errors.Ptq4admError)
        assert issubclass(cls, (ValueError, TypeError, RuntimeError))
        assert not any(issubclass(cls, other) for other in classes if other is not cls)


def test_the_command_line_says_one_line_and_exits_with_1(
    tiny_pipeline: Path,
    other_tiny_pipeline: Path,
    broken: Path,
    calibration: ptq4adm.Calibration,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kept = tmp_path / "calibration.safetensors"
    calibration.save(kept)
    (tmp_path / "file").write_text("")
    (tmp_path / "none.txt").write_text("# nothing\n")
    _edit_config(broken, lambda c: c.update(format_version=99))
    quantize = ["quantize", str(tiny_pipeline), "-o", str(tmp_path / "out")]
    other = ["quantize", str(other_tiny_pipeline), "-o", str(tmp_path / "out")]
    generate = ["generate", str(tiny_pipeline), "-o", str(tmp_path / "a.wav")]
    cases = {
        "matches none": [*quantize, "--override", "*.nothing=w8a8"],
        "another": [*other, "--calibration", str(kept)],
        "checkpoint format 99": ["inspect", str(broken)],
        "no such folder": ["inspect", str(tmp_path / "nowhere")],
        "choose another output": ["quantize", str(tiny_pipeline), "-o", str(tmp_path / "file")],
        "'gpu' is unknown": [*quantize, "--backend", "gpu"],
        "'cuda' is not available": [*quantize, "--backend", "cuda"],
        "device 'meow' cannot be used": [*quantize, "--device", "meow"],
        "device 'nonsense' cannot be used": [*generate, "--prompt", "x", "--device", "nonsense"],
        "group_size": [*quantize, "--group-size", "7"],
        "activation_observer": [*quantize, "--observer", "magic"],
        "no prompts": [*quantize, "--prompts", str(tmp_path / "none.txt")],
        "cannot read prompts": [*quantize, "--prompts", str(tmp_path / "missing.txt")],
        "prompt 0 is empty": [*generate, "--prompt", " "],
        "no prompt given": generate,
        "steps = 2000": [*generate, "--prompt", "x", "--steps", "2000"],
        "seed = -1": [*generate, "--prompt", "x", "--seed", "-1"],
        "cannot be made": [*generate[:-1], str(tmp_path / "file" / "a.wav"), "--prompt", "x"],
    }
    for expected, arguments in cases.items():
        assert main(arguments) == 1, expected
        printed = capsys.readouterr()
        assert printed.out == "", expected
        lines = printed.err.strip().splitlines()
        assert len(lines) == 1, printed.err
        assert lines[0].startswith("ptq4adm: error: "), expected
        if expected != "another":
            assert expected in lines[0], lines[0]
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "a.wav").exists()
