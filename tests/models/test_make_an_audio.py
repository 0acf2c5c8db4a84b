"""Make-An-Audio from its published files, against a plain-torch text-to-audio of the original."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from originals import checkpoints, sampling, text, unet
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
from ptq4adm.models import MakeAnAudio, find_adapter
from ptq4adm.models.families import recognize
from ptq4adm.models.noise import initial_noise

PROMPTS = ["a dog barks", "rain"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Weights, Weights]:
    """The published folder, and the state dicts in it."""
    folder = tmp_path_factory.mktemp("files") / "useful_ckpts"
    return folder, *checkpoints.write_make_an_audio(folder, SIZES)


@pytest.fixture(scope="module")
def pipe(files: tuple[Path, Weights, Weights]) -> MakeAnAudio:
    loaded = ptq4adm.load_pipeline(files[0])
    assert isinstance(loaded, MakeAnAudio)
    return loaded


@pytest.fixture
def copy(files: tuple[Path, Weights, Weights], tmp_path: Path) -> Path:
    """A folder to break."""
    return shutil.copytree(files[0], tmp_path / "copy")


def _rewrite(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    weights = dict(torch.load(folder / "maa1_full.ckpt", weights_only=True)["state_dict"])
    for name, tensor in change.items():
        if tensor is None:
            del weights[name]
        else:
            weights[name] = tensor
    torch.save({"state_dict": weights}, folder / "maa1_full.ckpt")


# --- against the original -----------------------------------------------------------------------


def _ids(pipe: MakeAnAudio, prompts: list[str]) -> torch.Tensor:
    tokens = pipe.tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt")
    return tokens.input_ids


@torch.no_grad()
def test_every_part_agrees(pipe: MakeAnAudio, files: tuple[Path, Weights, Weights]) -> None:
    _, weights, _ = files
    ids = _ids(pipe, PROMPTS)
    below = sampling.below
    encoder = below(weights, "cond_stage_model.caption_encoder.")
    expected = text.clap_tokens(encoder, SIZES.text, ids)
    context = pipe.encode_prompts(PROMPTS).arguments["encoder_hidden_states"]
    assert context is not None
    assert context.shape == (2, 77, SIZES.projected)
    assert (context - expected).norm() < 1e-5 * expected.norm()
    x = torch.randn(2, 4, 10, 76)
    expected = unet.forward(
        below(weights, "model.diffusion_model."),
        SIZES.unet,
        x,
        torch.tensor([991, 991]),
        context=context,
    )
    got = pipe.unet(x, 991, encoder_hidden_states=context).sample
    assert (got - expected).norm() < 1e-5 * expected.norm()


@torch.no_grad()
def test_text_to_audio_agrees(pipe: MakeAnAudio, files: tuple[Path, Weights, Weights]) -> None:
    _, weights, vocoder = files
    noise = initial_noise(2, pipe.latent_shape(1.5), seed=5)
    assert noise.shape == (2, 4, 10, 12)
    latents, waveform = sampling.make_an_audio(
        weights,
        vocoder,
        SIZES,
        (_ids(pipe, [""] * 2), _ids(pipe, PROMPTS)),
        noise,
        steps=4,
        scale=3.0,
    )
    got = pipe.denoise(pipe.encode_prompts(PROMPTS), steps=4, guidance=3.0, seed=5, seconds=1.5)
    assert (got - latents).norm() < 1e-4 * latents.norm()
    mel = pipe.decode_mel(latents)
    assert mel.shape == (2, 96, 80)
    decoded = pipe.decode(latents)
    assert decoded.shape == waveform.shape == (2, 96 * 256)
    assert (decoded - waveform).norm() < 1e-4 * waveform.norm()
    audio = pipe(PROMPTS, steps=4, guidance=3.0, seed=5, seconds=1.5)
    assert audio.shape == (2, 24000)


def test_padding_is_seen(pipe: MakeAnAudio) -> None:
    """No token is masked: what a prompt is filled up with is part of the context."""
    context = pipe.encode_prompts(["rain"]).arguments["encoder_hidden_states"]
    assert context is not None
    ids = _ids(pipe, ["rain"])[:, :20]
    with torch.no_grad():
        shorter = pipe.text_encoder(ids)
    assert (shorter - context[:, :20]).norm() > 1e-3 * shorter.norm()


# --- the pipeline -------------------------------------------------------------------------------


def test_defaults_and_lengths(pipe: MakeAnAudio) -> None:
    assert (pipe.defaults.steps, pipe.defaults.guidance) == (100, 3.0)
    assert (pipe.sampling_rate, pipe.hop, pipe.vae_factor) == (16000, 256, 8)
    assert pipe.seconds == pytest.approx(10.24)
    # as published: int(7.8 * seconds), up to a multiple of 4
    for seconds, columns in ((None, 80), (10, 80), (9.5, 76), (20, 156), (1, 8), (0.1, 4)):
        assert pipe.latent_shape(seconds) == (4, 10, columns)
    for seconds in (0.0, 0.01, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=r"expected at least 0\.016"):
            pipe.latent_shape(seconds)


def test_a_clip_that_ends_before_its_length_is_filled_with_silence(pipe: MakeAnAudio) -> None:
    # 4 columns are 8192 samples, one less than asked for
    audio = pipe(PROMPTS[0], steps=1, seconds=8193 / 16000)
    assert audio.shape == (1, 8193)
    assert audio[0, -1] == 0
    assert audio[0, -2] != 0


def test_timesteps_are_the_published_ones(pipe: MakeAnAudio) -> None:
    seen: list[int] = []
    pipe.denoise(
        pipe.encode_prompts("rain"),
        steps=5,
        seconds=0.5,
        callback=lambda *step: seen.append(step[1]),
    )
    assert seen == [801, 601, 401, 201, 1]


def _text_projections(pipe: MakeAnAudio, steps: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often keys or values of the text are computed in a run."""
    layers = [m for n, m in pipe.unet.named_modules() if n.endswith(("attn2.to_k", "attn2.to_v"))]
    assert len(layers) == 22
    calls: list[torch.nn.Module] = []
    cls = type(layers[0])
    forward = cls.forward

    def count(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        calls.extend(known for known in layers if known is layer)
        return forward(layer, x)

    with monkeypatch.context() as patch:
        patch.setattr(cls, "forward", count)
        pipe.denoise(pipe.encode_prompts(PROMPTS), steps=steps, seconds=0.5)
    return len(calls)


def test_keys_and_values_of_the_text_are_computed_once(
    pipe: MakeAnAudio, files: tuple[Path, Weights, Weights], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _text_projections(pipe, 1, monkeypatch) == 22
    assert _text_projections(pipe, 4, monkeypatch) == 22
    packed = ptq4adm.load_pipeline(files[0])
    assert isinstance(packed, MakeAnAudio)
    calibration = ptq4adm.calibrate(packed, PROMPTS[:1], steps=4, buckets=4, progress=False)
    ptq4adm.quantize(packed, ptq4adm.QuantConfig(), calibration, progress=False)
    assert _text_projections(packed, 4, monkeypatch) == 22


@pytest.mark.parametrize("scheme", ["w4a8", "w8a8"])
def test_a_quantized_pipeline_is_saved_and_loaded(
    files: tuple[Path, Weights, Weights], tmp_path: Path, scheme: str
) -> None:
    pipe = ptq4adm.load_pipeline(files[0])
    expected = pipe(PROMPTS, steps=2, seconds=0.6)
    calibration = ptq4adm.calibrate(pipe, PROMPTS, steps=2, buckets=2, progress=False)
    plan = ptq4adm.quantize(pipe, ptq4adm.QuantConfig(scheme=scheme), calibration, progress=False)
    assert {row.scheme for row in plan.rows} == {scheme, "w8", "float"}
    got = pipe(PROMPTS, steps=2, seconds=0.6)
    assert 0 < (got - expected).norm() < 1.5 * expected.norm()
    ptq4adm.save_pipeline(pipe, tmp_path / "out")
    found = recognize(tmp_path / "out")
    assert found.pipeline_class is MakeAnAudio
    assert not found.is_original
    again = ptq4adm.load_pipeline(tmp_path / "out")
    assert isinstance(again, MakeAnAudio)
    assert again.defaults == pipe.defaults
    assert torch.equal(again(PROMPTS, steps=2, seconds=0.6), got)
    assert find_adapter(again).family == "make-an-audio"


@pytest.mark.parametrize("columns", [78, 79])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@torch.no_grad()
def test_odd_latents_quantized_and_fused(
    files: tuple[Path, Weights, Weights], columns: int, backend: str
) -> None:
    """10 x 78 halves to 5 x 39; from 5 x 40 to 10 x 79 is not a doubling."""
    pipe = ptq4adm.load_pipeline(files[0])
    x, context = torch.randn(2, 4, 10, columns), torch.randn(2, 77, SIZES.projected)
    expected = pipe.unet(x, 501, encoder_hidden_states=context).sample
    config = ptq4adm.QuantConfig(scheme="w8a8", activation="dynamic", backend=backend)
    ptq4adm.quantize(pipe.unet, config, progress=False)
    fused = [block for block in pipe.unet.modules() if hasattr(block, "fusion")]
    assert len(fused) == 35
    assert all(block.fusion.fused for block in fused)
    got = pipe.unet(x, 501, encoder_hidden_states=context).sample
    assert got.shape == expected.shape
    assert (got - expected).norm() < 0.1 * expected.norm()
    if columns == 78:
        weights = files[1]
        original = unet.forward(
            sampling.below(weights, "model.diffusion_model."),
            SIZES.unet,
            x,
            torch.tensor([501, 501]),
            context=context,
        )
        assert (expected - original).norm() < 1e-5 * original.norm()
    # the same packed layers in diffusers' own blocks: another order of float sums, which decides
    # other roundings, so that the two differ as much from each other as from float
    for block in fused:
        block.__class__ = next(c for c in type(block).__mro__ if "diffusers" in c.__module__)
    unfused = pipe.unet(x, 501, encoder_hidden_states=context).sample
    assert (got - expected).norm() < 1.1 * (unfused - expected).norm()


# --- files --------------------------------------------------------------------------------------


def test_the_folder_and_the_file_are_recognised(files: tuple[Path, Weights, Weights]) -> None:
    for path in (files[0], files[0] / "maa1_full.ckpt"):
        found = recognize(path)
        assert found.pipeline_class is MakeAnAudio
        assert str(found) == f"{path}: make-an-audio in the original layout"


def test_weights_stay_in_the_file(pipe: MakeAnAudio, files: tuple[Path, Weights, Weights]) -> None:
    """Mapped pages belong to the file: a process needs memory for what it touches alone."""
    name = str(files[0] / "maa1_full.ckpt")
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
    files: tuple[Path, Weights, Weights], tiny_pipeline: Path
) -> None:
    with pytest.raises(ConfigError, match=r"heads: not for .* make-an-audio"):
        ptq4adm.load_pipeline(files[0], heads="original")
    with pytest.raises(ConfigError, match=r"tokenizer: not for .* audioldm in diffusers' layout"):
        ptq4adm.load_pipeline(tiny_pipeline, tokenizer="there")


def test_the_commands_take_the_published_folder(
    files: tuple[Path, Weights, Weights], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ptq4adm.cli import main

    tokenizer = str(files[0] / "bert-base-uncased")
    assert main(["quantize", str(files[0]), "--dry-run", "--tokenizer", tokenizer]) == 0
    shown = capsys.readouterr()
    assert "make-an-audio in the original layout" in shown.err
    assert "181 layers" in shown.out
    out = tmp_path / "rain.wav"
    arguments = ["--prompt", "rain", "--steps", "1", "--seconds", "0.5", "--quiet"]
    assert main(["generate", str(files[0]), *arguments, "-o", str(out)]) == 0
    assert out.stat().st_size == 44 + 2 * 8000
    assert main(["quantize", str(files[0]), "--dry-run", "--heads", "original"]) == 1
    assert "heads: not for" in capsys.readouterr().err
