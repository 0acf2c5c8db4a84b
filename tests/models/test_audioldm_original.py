"""AudioLDM's original .ckpt files against a plain-torch text-to-audio of the original code."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from originals import checkpoints, hifigan, sampling, text, unet
from originals.checkpoints import TINY_AUDIOLDM as SIZES
from originals.checkpoints import Weights

import ptq4adm
from ptq4adm.errors import CheckpointError, ConfigError, MissingComponentError
from ptq4adm.models import AudioLDM
from ptq4adm.models.families import recognize
from ptq4adm.models.noise import initial_noise

PROMPTS = ["a dog barks", "rain"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Weights]:
    """The file, and the state dict in it."""
    path = tmp_path_factory.mktemp("files") / "audioldm-s-full.ckpt"
    return path, checkpoints.write_audioldm(path, SIZES)


@pytest.fixture
def copy(files: tuple[Path, Weights], tmp_path: Path) -> Path:
    """A file to break."""
    return shutil.copytree(files[0].parent, tmp_path / "copy") / files[0].name


def _rewrite(path: Path, change: dict[str, torch.Tensor | None]) -> None:
    weights = dict(torch.load(path, weights_only=True)["state_dict"])
    for name, tensor in change.items():
        if tensor is None:
            del weights[name]
        else:
            weights[name] = tensor
    torch.save({"state_dict": weights}, path)


def _tokens(pipe: AudioLDM, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = pipe.tokenizer(prompts, padding="max_length", max_length=40, return_tensors="pt")
    return tokens.input_ids, tokens.attention_mask


@pytest.mark.parametrize("is_averaged", [False, True], ids=["trained", "averaged"])
@torch.no_grad()
def test_text_to_audio_agrees_with_original_heads(
    files: tuple[Path, Weights], is_averaged: bool
) -> None:
    path, weights = files
    pipe = AudioLDM.from_original(path, heads="original", ema=is_averaged)
    assert tuple(pipe.unet.config.attention_head_dim) == (1, 2, 3, 5)
    noise = initial_noise(2, pipe.latent_shape(0.64), seed=5)
    assert noise.shape == (2, 8, 16, 16)
    ids, masks = zip(_tokens(pipe, [""] * 2), _tokens(pipe, PROMPTS), strict=True)
    latents, waveform = sampling.audioldm(
        weights, SIZES, ids, masks, noise, steps=4, scale=2.5, is_averaged=is_averaged
    )
    got = pipe.denoise(pipe.encode_prompts(PROMPTS), steps=4, guidance=2.5, seed=5, seconds=0.64)
    assert (got - latents).norm() < 1e-4 * latents.norm()
    decoded = pipe.decode(latents)
    assert decoded.shape == waveform.shape
    assert (decoded - waveform).norm() < 1e-4 * waveform.norm()
    assert pipe(PROMPTS, steps=1, seconds=0.64).shape == (2, 10240)


@torch.no_grad()
def test_every_part_agrees(files: tuple[Path, Weights]) -> None:
    path, weights = files
    pipe = AudioLDM.from_original(path, heads="original")
    below = sampling.below
    encoder = below(weights, "cond_stage_model.model.")
    expected = text.clap_text(encoder, SIZES.text, *_tokens(pipe, PROMPTS))
    vectors = pipe.encode_prompts(PROMPTS).arguments["class_labels"]
    assert vectors is not None
    assert (vectors - expected).norm() < 1e-5 * expected.norm()
    x = torch.randn(2, 8, 16, 16)
    own = below(weights, "model.diffusion_model.")
    expected = unet.forward(own, SIZES.unet, x, torch.tensor([7, 7]), y=vectors)
    got = pipe.unet(x, 7, encoder_hidden_states=None, class_labels=vectors).sample
    assert (got - expected).norm() < 1e-5 * expected.norm()
    mel = torch.randn(2, 9, 64)
    own = below(weights, "first_stage_model.vocoder.")
    expected = hifigan.forward(own, SIZES.vocoder, mel.transpose(1, 2))
    assert (pipe.vocoder(mel) - expected).norm() < 1e-5 * expected.norm()


@torch.no_grad()
def test_heads_are_those_of_diffusers_unless_asked(files: tuple[Path, Weights]) -> None:
    pipes = [ptq4adm.load_pipeline(files[0]), ptq4adm.load_pipeline(files[0], heads="original")]
    assert pipes[0].unet.config.attention_head_dim == 8
    x, vectors = torch.randn(1, 8, 16, 16), torch.randn(1, 24)
    first, second = (
        p.unet(x, 7, encoder_hidden_states=None, class_labels=vectors).sample for p in pipes
    )
    assert (first - second).norm() > 1e-4 * first.norm()
    for mine, theirs in zip(pipes[0].unet.parameters(), pipes[1].unet.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    with pytest.raises(ConfigError, match="heads = 'all': expected 'diffusers' or 'original'"):
        ptq4adm.load_pipeline(files[0], heads="all")


def test_defaults_and_recognition(files: tuple[Path, Weights]) -> None:
    for path in (files[0], files[0].parent):
        found = recognize(path)
        assert found.pipeline_class is AudioLDM
        assert found.is_original
    pipe = ptq4adm.load_pipeline(files[0].parent)
    assert (pipe.defaults.steps, pipe.defaults.guidance) == (200, 2.5)
    # as in diffusers' conversion
    assert pipe.seconds == pytest.approx(5.12)
    assert pipe.latent_shape(10.24) == (8, 256, 16)
    assert pipe.tokenizer.model_max_length == 64


def test_a_quantized_pipeline_is_saved_and_loaded(
    files: tuple[Path, Weights], tmp_path: Path
) -> None:
    pipe = ptq4adm.load_pipeline(files[0], heads="original")
    calibration = ptq4adm.calibrate(pipe, PROMPTS[:1], steps=1, progress=False)
    ptq4adm.quantize(pipe, ptq4adm.QuantConfig(), calibration, progress=False)
    expected = pipe(PROMPTS, steps=1, seconds=0.32)
    ptq4adm.save_pipeline(pipe, tmp_path / "out")
    again = ptq4adm.load_pipeline(tmp_path / "out")
    assert torch.equal(again(PROMPTS, steps=1, seconds=0.32), expected)
    assert tuple(again.unet.config.attention_head_dim) == (1, 2, 3, 5)


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.output_blocks.11.0.skip_connection.bias",
        "first_stage_model.encoder.mid.attn_1.k.bias",
        "first_stage_model.vocoder.resblocks.4.convs2.1.weight",
        "cond_stage_model.model.text_projection.2.bias",
        "cond_stage_model.model.text_branch.pooler.dense.bias",
        "cond_stage_model.model.text_branch.embeddings.word_embeddings.weight",
    ],
)
def test_a_missing_tensor_is_named(copy: Path, name: str) -> None:
    _rewrite(copy, {name: None})
    with pytest.raises(CheckpointError, match=f"lacks .*{name}"):
        ptq4adm.load_pipeline(copy)


def test_missing_parts_and_unknown_tensors(copy: Path) -> None:
    name = "first_stage_model.vocoder.ups.5.weight"
    _rewrite(copy, {name: torch.ones(1)})
    with pytest.raises(CheckpointError, match=f"holds 1 unknown tensors .*{name}"):
        ptq4adm.load_pipeline(copy)
    _rewrite(copy, {name: None, "first_stage_model.vocoder.conv_pre.weight": None})
    with pytest.raises(CheckpointError, match="is not the HiFi-GAN of AudioLDM"):
        ptq4adm.load_pipeline(copy)
    shutil.rmtree(copy.parent / "roberta-base")
    with pytest.raises(MissingComponentError, match=r"no tokenizer in .*roberta-base"):
        ptq4adm.load_pipeline(copy)


def test_averaged_weights_that_are_missing(copy: Path) -> None:
    _rewrite(copy, {"model_ema.diffusion_modelout2bias": None})
    assert ptq4adm.load_pipeline(copy).family == "audioldm"
    with pytest.raises(CheckpointError, match="1 are missing, such as 'model_ema"):
        ptq4adm.load_pipeline(copy, ema=True)
