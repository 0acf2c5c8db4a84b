"""Saving and loading whole pipelines: bit-equal, all or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ptq4adm.calibration import Calibration
from ptq4adm.config import QuantConfig
from ptq4adm.errors import OutputError
from ptq4adm.models import TextToAudioPipeline
from ptq4adm.packing.folders import check_output
from ptq4adm.quantization import load_pipeline, quantize, save_pipeline

PROMPTS = ["a dog barks", "rain"]
FAST: dict[str, Any] = {"weight_observer": "absmax", "activation_observer": "absmax"}


def _latents(pipe: TextToAudioPipeline, steps: int = 4) -> Tensor:
    return pipe.denoise(pipe.encode_prompts(PROMPTS), steps=steps, seed=11)


@pytest.mark.parametrize(
    "config",
    [
        QuantConfig(**FAST),
        QuantConfig(scheme="w8a8", overrides={"mid_block.*": "w4a8", "*.to_q": "float"}, **FAST),
        None,
    ],
    ids=["w4a8", "mixed", "float"],
)
def test_a_round_trip_is_bit_equal(
    pipe: TextToAudioPipeline,
    calibration: Calibration,
    tmp_path: Path,
    config: QuantConfig | None,
) -> None:
    if config is not None:
        quantize(pipe, config, calibration, progress=False)
    out = save_pipeline(pipe, tmp_path / "new" / "model")
    loaded = load_pipeline(out)
    assert torch.equal(_latents(loaded), _latents(pipe))
    assert torch.equal(loaded(PROMPTS[:1], steps=1, seed=5), pipe(PROMPTS[:1], steps=1, seed=5))
    assert [p.name for p in out.parent.iterdir()] == ["model"]


def test_the_quantized_folder_is_smaller(
    quantized: TextToAudioPipeline, tiny_pipeline: Path, tmp_path: Path
) -> None:
    out = save_pipeline(quantized, tmp_path / "model")
    name = "unet/diffusion_pytorch_model.safetensors"
    assert (out / name).stat().st_size < 0.35 * (tiny_pipeline / name).stat().st_size
    assert {p.name for p in out.iterdir()} == {p.name for p in tiny_pipeline.iterdir()}


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupted_save_leaves_what_was_there(
    quantized: TextToAudioPipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overwrite: bool,
) -> None:
    out = tmp_path / "model"
    if overwrite:
        out.mkdir()
        (out / "old").write_text("kept")

    def interrupted(_tensors: object, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("ptq4adm.packing.checkpoint.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_pipeline(quantized, out, overwrite=overwrite)
    assert [p.name for p in tmp_path.iterdir()] == (["model"] if overwrite else [])
    assert not overwrite or (out / "old").read_text() == "kept"


def test_a_disk_error_is_an_output_error_and_leaves_nothing(
    quantized: TextToAudioPipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ptq4adm.packing.checkpoint.save_file", full)
    with pytest.raises(OutputError, match="No space left"):
        save_pipeline(quantized, tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("raised", "seen"), [(OSError("no"), OutputError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_the_last_rename_failing_restores_the_old_folder(
    quantized: TextToAudioPipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    raised: BaseException,
    seen: type[BaseException],
) -> None:
    out = tmp_path / "model"
    out.mkdir()
    (out / "old").touch()
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise raised
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(seen):
        save_pipeline(quantized, out, overwrite=True)
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["model", "model/old"]


def test_overwriting_replaces_the_whole_folder(
    quantized: TextToAudioPipeline, tmp_path: Path
) -> None:
    out = tmp_path / "model"
    out.mkdir()
    (out / "old").touch()
    with pytest.raises(OutputError, match="not empty"):
        save_pipeline(quantized, out)
    save_pipeline(quantized, out, overwrite=True)
    assert not (out / "old").exists()
    assert (out / "unet").is_dir()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_outputs_that_cannot_be_made_are_refused_early(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="not a folder"):
        check_output(tmp_path / "file")
    with pytest.raises(OutputError, match="is a file"):
        check_output(tmp_path / "file" / "below" / "it")
    check_output(tmp_path / "new" / "folder")
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty")
