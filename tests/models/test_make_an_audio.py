"""Make-An-Audio from its published files, against a plain-torch text-to-audio of the original."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from originals import sampling, text, unet
from originals.checkpoints import TINY_MAKE_AN_AUDIO as SIZES
from originals.checkpoints import Weights

import ptq4adm
from ptq4adm.errors import (
    ConfigError,
)
from ptq4adm.models import MakeAnAudio, find_adapter
from ptq4adm.models.families import recognize
from ptq4adm.models.noise import initial_noise

PROMPTS = ["a dog barks", "rain"]


@pytest.fixture(scope="module")
def pipe(make_an_audio_files: tuple[Path, Weights, Weights]) -> MakeAnAudio:
    loaded = ptq4adm.load_pipeline(make_an_audio_files[0])
    assert isinstance(loaded, MakeAnAudio)
    return loaded


# --- against the original -----------------------------------------------------------------------


def _ids(pipe: MakeAnAudio, prompts: list[str]) -> torch.Tensor:
    tokens = pipe.tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt")
    return tokens.input_ids


@torch.no_grad()
def test_every_part_agrees(
    pipe: MakeAnAudio, make_an_audio_files: tuple[Path, Weights, Weights]
) -> None:
    _, weights, _ = make_an_audio_files
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
def test_text_to_audio_agrees(
    pipe: MakeAnAudio, make_an_audio_files: tuple[Path, Weights, Weights]
) -> None:
    _, weights, vocoder = make_an_audio_files
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
    pipe: MakeAnAudio,
    make_an_audio_files: tuple[Path, Weights, Weights],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert _text_projections(pipe, 1, monkeypatch) == 22
    assert _text_projections(pipe, 4, monkeypatch) == 22
    packed = ptq4adm.load_pipeline(make_an_audio_files[0])
    assert isinstance(packed, MakeAnAudio)
    calibration = ptq4adm.calibrate(packed, PROMPTS[:1], steps=4, buckets=4, progress=False)
    ptq4adm.quantize(packed, ptq4adm.QuantConfig(), calibration, progress=False)
    assert _text_projections(packed, 4, monkeypatch) == 22


@pytest.mark.parametrize("scheme", ["w4a8", "w8a8"])
def test_a_quantized_pipeline_is_saved_and_loaded(
    make_an_audio_files: tuple[Path, Weights, Weights], tmp_path: Path, scheme: str
) -> None:
    pipe = ptq4adm.load_pipeline(make_an_audio_files[0])
    expected = pipe(PROMPTS, steps=2, seconds=0.6)
    calibration = ptq4adm.calibrate(pipe, PROMPTS, steps=2, buckets=2, progress=False)
    plan = ptq4adm.quantize(pipe, ptq4adm.QuantConfig(scheme=scheme), calibration, progress=False)
    # shortcuts are sensitive: 8 bits with either
    assert {row.scheme for row in plan.rows} == {scheme, "w8a8", "w8", "float"}
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
    make_an_audio_files: tuple[Path, Weights, Weights], columns: int, backend: str
) -> None:
    """10 x 78 halves to 5 x 39; from 5 x 40 to 10 x 79 is not a doubling."""
    pipe = ptq4adm.load_pipeline(make_an_audio_files[0])
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
        weights = make_an_audio_files[1]
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
