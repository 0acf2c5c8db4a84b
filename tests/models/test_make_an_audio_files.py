"""Make-An-Audio's published files: what is read of them, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from originals import checkpoints
from originals.checkpoints import TINY_MAKE_AN_AUDIO as SIZES
from originals.checkpoints import Weights

import ptq4adm
from ptq4adm.errors import (
    CheckpointError,
    CheckpointShapeError,
    ConfigError,
    MissingComponentError,
    TruncatedCheckpointError,
    UnsafeCheckpointError,
    UnsupportedModelError,
)
from ptq4adm.models import MakeAnAudio
from ptq4adm.models.families import recognize

PROMPTS = ["a dog barks", "rain"]


@pytest.fixture
def copy(make_an_audio_files: tuple[Path, Weights, Weights], tmp_path: Path) -> Path:
    """A folder to break."""
    return shutil.copytree(make_an_audio_files[0], tmp_path / "copy")


def _rewrite(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    weights = dict(torch.load(folder / "maa1_full.ckpt", weights_only=True)["state_dict"])
    for name, tensor in change.items():
        if tensor is None:
            del weights[name]
        else:
            weights[name] = tensor
    torch.save({"state_dict": weights}, folder / "maa1_full.ckpt")


def test_the_folder_and_the_file_are_recognised(
    make_an_audio_files: tuple[Path, Weights, Weights],
) -> None:
    for path in (make_an_audio_files[0], make_an_audio_files[0] / "maa1_full.ckpt"):
        found = recognize(path)
        assert found.pipeline_class is MakeAnAudio
        assert str(found) == f"{path}: make-an-audio in the original layout"


def test_weights_stay_in_the_file(make_an_audio_files: tuple[Path, Weights, Weights]) -> None:
    """Mapped pages belong to the file: a process needs memory for what it touches alone."""
    name = str(make_an_audio_files[0] / "maa1_full.ckpt")
    pipe: Any = ptq4adm.load_pipeline(make_an_audio_files[0])
    regions = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(name):
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            regions.append(range(start, end))
    assert regions
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        for parameter in module.parameters():
            assert any(parameter.data_ptr() in region for region in regions)


def test_a_config_beside_the_weights_is_compared(copy: Path) -> None:
    config = checkpoints.make_an_audio_yaml(SIZES)
    path = copy / "txt2audio_args.yaml"
    path.write_text(json.dumps(config))
    assert ptq4adm.load_pipeline(copy).unet.config.attention_head_dim == 8
    sections: dict[str, Any] = config["model"]["params"]["unet_config"]["params"]
    for name, value, message in (
        ("channel_mult", [1, 4], r"channel_mult is \[1, 4\], but the weights have \[1\.0, 2\.0\]"),
        ("context_dim", 1024, "context_dim is 1024, but the weights have 48"),
        ("attention_resolutions", [1], "attention_resolutions"),
        ("num_heads", 7, "num_heads is 7, which does not divide"),
    ):
        path.write_text(
            json.dumps(config).replace(
                json.dumps({name: sections[name]})[1:-1], json.dumps({name: value})[1:-1]
            )
        )
        with pytest.raises(CheckpointError, match=message):
            ptq4adm.load_pipeline(copy)
    sections["num_heads"] = 4
    path.write_text(json.dumps(config))
    assert ptq4adm.load_pipeline(copy).unet.config.attention_head_dim == 4
    config["model"]["params"]["linear_end"] = 0.02
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"linear_end is 0\.02, the family's is 0\.012"):
        ptq4adm.load_pipeline(copy)
    path.write_text("{}")
    with pytest.raises(CheckpointError, match=r"no section model\.params"):
        ptq4adm.load_pipeline(copy)


def test_a_tokenizer_may_be_elsewhere(copy: Path, tmp_path: Path) -> None:
    (copy / "bert-base-uncased").rename(tmp_path / "tokens")
    with pytest.raises(MissingComponentError, match=r"no tokenizer in .*bert-base-uncased"):
        ptq4adm.load_pipeline(copy)
    pipe = ptq4adm.load_pipeline(copy, tokenizer=tmp_path / "tokens")
    assert pipe.encode_prompts("rain").batch == 1
    # the vocabulary alone says all: the published folder has little more
    letters = [chr(ord("a") + i) for i in range(26)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{x}" for x in letters)]
    shutil.rmtree(tmp_path / "tokens")
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "vocab.txt").write_text("\n".join(words))
    again = ptq4adm.load_pipeline(copy, tokenizer=tmp_path / "tokens")
    assert again.tokenizer(PROMPTS).input_ids == pipe.tokenizer(PROMPTS).input_ids
    (tmp_path / "tokens" / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot load the tokenizer"):
        ptq4adm.load_pipeline(copy, tokenizer=tmp_path / "tokens")
    checkpoints.write_roberta_tokenizer(tmp_path / "other", 300)
    with pytest.raises(CheckpointError, match=r"knows 64 tokens, the tokenizer has \d+"):
        ptq4adm.load_pipeline(copy, tokenizer=tmp_path / "other")


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.middle_block.1.proj_in.bias",
        "first_stage_model.decoder.up.0.block.1.conv2.weight",
        "cond_stage_model.caption_encoder.projection.layer_norm.bias",
        "cond_stage_model.caption_encoder.base.encoder.layer.1.output.dense.bias",
        "scale_factor",
    ],
)
def test_a_missing_tensor_is_named(copy: Path, name: str) -> None:
    _rewrite(copy, {name: None})
    with pytest.raises(CheckpointError, match=f"lacks .*{name}"):
        ptq4adm.load_pipeline(copy)


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.input_blocks.1.2.weight",
        "first_stage_model.quantize.embedding.weight",
        "cond_stage_model.caption_encoder.base.encoder.layer.1.extra",
    ],
)
def test_an_unknown_tensor_is_named(copy: Path, name: str) -> None:
    _rewrite(copy, {name: torch.ones(2)})
    with pytest.raises(CheckpointError, match=f"holds 1 unknown tensors .*{name}"):
        ptq4adm.load_pipeline(copy)


def test_a_wrong_shape_is_named(copy: Path) -> None:
    _rewrite(copy, {"first_stage_model.decoder.conv_out.bias": torch.ones(2)})
    with pytest.raises(CheckpointShapeError, match=r"conv_out\.bias is \[2\], needs \[1\]"):
        ptq4adm.load_pipeline(copy)


def test_another_noise_schedule_and_a_broken_factor_are_refused(copy: Path) -> None:
    _rewrite(copy, {"betas": torch.linspace(0.0015, 0.0195, 1000)})
    with pytest.raises(CheckpointError, match=r"betas \[1000\] from 0\.0015 to 0\.0195 are not"):
        ptq4adm.load_pipeline(copy)
    _rewrite(copy, {"betas": None, "scale_factor": torch.tensor(-1.0)})
    with pytest.raises(CheckpointError, match=r"scale_factor is -1\.0, needs a positive number"):
        ptq4adm.load_pipeline(copy)


def test_a_vocoder_of_another_model_is_refused(copy: Path) -> None:
    shutil.rmtree(copy / "bigvgan")
    sizes = replace(SIZES, vocoder=replace(SIZES.vocoder, num_mels=64))
    checkpoints.write_make_an_audio(copy / "other", sizes)
    (copy / "other" / "bigvgan").rename(copy / "bigvgan")
    with pytest.raises(CheckpointError, match="makes 80 mel bins, the vocoder takes 64"):
        ptq4adm.load_pipeline(copy)
    shutil.rmtree(copy / "bigvgan")
    with pytest.raises(MissingComponentError, match=r"args\.yml: missing"):
        ptq4adm.load_pipeline(copy)


def test_what_is_not_used_is_said(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    _rewrite(copy, {"loss.logvar": torch.ones(1)})
    ptq4adm.load_pipeline(copy)
    assert "1 tensors are not used: 'loss.logvar'" in caplog.text


def test_broken_and_foreign_files(copy: Path, tmp_path: Path) -> None:
    path = copy / "maa1_full.ckpt"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(TruncatedCheckpointError, match="the end is missing"):
        ptq4adm.load_pipeline(copy)
    torch.save({"state_dict": {"model.weight": torch.ones(1)}}, path)
    with pytest.raises(UnsupportedModelError, match="the original layout of no family"):
        ptq4adm.load_pipeline(copy)
    torch.save({"state_dict": {}, "x": tmp_path}, path)
    with pytest.raises(UnsafeCheckpointError, match="nothing of it was run"):
        ptq4adm.load_pipeline(copy)
    shutil.copy(path, copy / "other.ckpt")
    with pytest.raises(CheckpointError, match=r"holds maa1_full\.ckpt, other\.ckpt; name the file"):
        ptq4adm.load_pipeline(copy)


def test_options_of_other_layouts_are_refused(
    make_an_audio_files: tuple[Path, Weights, Weights], tiny_pipeline: Path
) -> None:
    with pytest.raises(ConfigError, match=r"heads: not for .* make-an-audio"):
        ptq4adm.load_pipeline(make_an_audio_files[0], heads="original")
    with pytest.raises(ConfigError, match=r"tokenizer: not for .* audioldm in diffusers' layout"):
        ptq4adm.load_pipeline(tiny_pipeline, tokenizer="there")


def test_the_commands_take_the_published_folder(
    make_an_audio_files: tuple[Path, Weights, Weights],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from ptq4adm.cli import main

    tokenizer = str(make_an_audio_files[0] / "bert-base-uncased")
    assert (
        main(["quantize", str(make_an_audio_files[0]), "--dry-run", "--tokenizer", tokenizer]) == 0
    )
    shown = capsys.readouterr()
    assert "make-an-audio in the original layout" in shown.err
    assert "181 layers" in shown.out
    out = tmp_path / "rain.wav"
    arguments = ["--prompt", "rain", "--steps", "1", "--seconds", "0.5", "--quiet"]
    assert main(["generate", str(make_an_audio_files[0]), *arguments, "-o", str(out)]) == 0
    assert out.stat().st_size == 44 + 2 * 8000
    assert main(["quantize", str(make_an_audio_files[0]), "--dry-run", "--heads", "original"]) == 1
    assert "heads: not for" in capsys.readouterr().err
