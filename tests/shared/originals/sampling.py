"""Text to audio in plain torch: the DDIM sampler of the latent-diffusion code, and what follows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from originals import bigvgan, hifigan, text, unet, vae
from originals.checkpoints import AudioLDMSizes, MakeAnAudioSizes, Weights


def ddim(
    predict: Callable[[Tensor, Tensor], Tensor], noise: Tensor, alphas: Tensor, steps: int
) -> Tensor:
    """Latents after `steps` steps with eta 0.

    Args:
        predict: noise in latents at timesteps [B].
        noise: the start.
        alphas: cumulated, of 1000 training steps.
        steps: a divisor of 1000.
    """
    times = torch.arange(0, 1000, 1000 // steps) + 1
    previous = torch.cat([alphas[:1], alphas[times[:-1]]])
    x = noise
    for time, before in zip(times.flip(0), previous.flip(0), strict=True):
        e = predict(x, time.expand(x.shape[0]))
        now = alphas[time]
        clean = (x - (1 - now).sqrt() * e) / now.sqrt()
        x = before.sqrt() * clean + (1 - before).sqrt() * e
    return x


def guided(
    w: Weights,
    config: unet.UNetConfig,
    scale: float,
    empty: dict[str, Tensor],
    given: dict[str, Tensor],
) -> Callable[[Tensor, Tensor], Tensor]:
    """Prediction with classifier-free guidance."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        without = unet.forward(w, config, x, t, **empty)
        return without + scale * (unet.forward(w, config, x, t, **given) - without)

    return predict


def make_an_audio(
    w: Weights,
    vocoder: Weights,
    sizes: MakeAnAudioSizes,
    ids: tuple[Tensor, Tensor],
    noise: Tensor,
    *,
    steps: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Latents, and waveforms, of token ids [B, 77]: of empty prompts and of prompts."""
    encoder = below(w, "cond_stage_model.caption_encoder.")
    contexts = [{"context": text.clap_tokens(encoder, sizes.text, i)} for i in ids]
    predict = guided(below(w, "model.diffusion_model."), sizes.unet, scale, *contexts)
    latents = ddim(predict, noise, w["alphas_cumprod"], steps)
    stage = below(w, "first_stage_model.")
    mel = vae.decode(stage, sizes.vae, latents / w["scale_factor"])
    return latents, bigvgan.forward(vocoder, sizes.vocoder, mel[:, 0])[:, 0]


def audioldm(
    w: Weights,
    sizes: AudioLDMSizes,
    ids: tuple[Tensor, Tensor],
    masks: tuple[Tensor, Tensor],
    noise: Tensor,
    *,
    steps: int,
    scale: float,
    is_averaged: bool,
) -> tuple[Tensor, Tensor]:
    """Latents, and waveforms, of token ids [B, L] and their masks."""
    encoder = below(w, "cond_stage_model.model.")
    vectors = [
        {"y": text.clap_text(encoder, sizes.text, i, m)} for i, m in zip(ids, masks, strict=True)
    ]
    weights = below(w, "model.diffusion_model.")
    if is_averaged:
        weights = {n: w[f"model_ema.diffusion_model{n.replace('.', '')}"] for n in weights}
    predict = guided(weights, sizes.unet, scale, *vectors)
    latents = ddim(predict, noise, w["alphas_cumprod"], steps)
    stage = below(w, "first_stage_model.")
    mel = vae.decode(stage, sizes.vae, latents / w["scale_factor"])
    vocoder = below(w, "first_stage_model.vocoder.")
    return latents, hifigan.forward(vocoder, sizes.vocoder, mel[:, 0].transpose(1, 2))


def below(w: Weights, prefix: str) -> Weights:
    """The tensors below a prefix, without it."""
    return {name[len(prefix) :]: tensor for name, tensor in w.items() if name.startswith(prefix)}
