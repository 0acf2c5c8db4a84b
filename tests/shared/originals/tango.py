"""TANGO's published folder with random weights, at tiny and at real size, and its plain forward.

PYTHONPATH=tests/shared python -m originals.tango FOLDER     writes one at real size (5 GB)
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from originals import hifigan, stable_unet, t5, vae
from originals.weights import random_weights

Weights = dict[str, Tensor]
SCALE_FACTOR = 0.9227914214134216


@dataclass(frozen=True)
class TangoSizes:
    """Architecture of one TANGO; the default is the published one."""

    unet: stable_unet.StableConfig = field(default_factory=stable_unet.StableConfig)
    text: t5.T5Sizes = field(default_factory=t5.T5Sizes)
    vae: vae.VaeConfig = vae.AUDIOLDM
    vocoder: hifigan.HifiGanConfig = field(default_factory=hifigan.HifiGanConfig)


TINY_TANGO = TangoSizes(
    unet=stable_unet.StableConfig(8, (32, 64), (2, 4), 1, 48, (1, 2)),
    text=t5.T5Sizes(300, 48, 16, 3, 80, 2),
    vae=vae.VaeConfig(8, 32, (1, 1, 2), 256, num_res_blocks=1),
    vocoder=hifigan.HifiGanConfig(upsample_initial_channel=32, resblock_kernel_sizes=(3, 5, 7)),
)


def main_weights(sizes: TangoSizes, seed: int = 0) -> Weights:
    """The state dict of pytorch_model_main.bin."""
    found = random_weights(stable_unet.shapes(sizes.unet), seed, "unet.")
    found |= random_weights(t5.shapes(sizes.text), seed + 1, "text_encoder.")
    words = found["text_encoder.shared.weight"]
    # as T5 is made: embeddings are not scaled by their width, and queries are instead of scores
    words *= sizes.text.width**0.5
    for name, tensor in found.items():
        if name.endswith("SelfAttention.q.weight"):
            tensor /= sizes.text.head**0.5
    return found | {"text_encoder.encoder.embed_tokens.weight": words}


def vae_weights(sizes: TangoSizes, seed: int = 0) -> Weights:
    """The state dict of pytorch_model_vae.bin."""
    found = random_weights(vae.shapes(sizes.vae), seed + 2)
    return found | random_weights(hifigan.shapes(sizes.vocoder), seed + 3, "vocoder.")


def write_tango(folder: Path, sizes: TangoSizes, seed: int = 0) -> tuple[Weights, Weights]:
    """Write the published folder, and the tokenizer that the original code downloads.

    Returns:
        The state dicts of pytorch_model_main.bin and pytorch_model_vae.bin.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights, first_stage = main_weights(sizes, seed), vae_weights(sizes, seed)
    torch.save(weights, folder / "pytorch_model_main.bin")
    torch.save(first_stage, folder / "pytorch_model_vae.bin")
    for name, content in configs(sizes).items():
        (folder / name).write_text(json.dumps(content))
    if sizes.unet != stable_unet.StableConfig():
        (folder / "diffusion_model_config.json").write_text(json.dumps(sizes.unet.to_json()))
    write_t5_tokenizer(folder / "flan-t5-large")
    return weights, first_stage


def configs(sizes: TangoSizes) -> dict[str, dict[str, object]]:
    """The three published configs."""
    return {
        "main_config.json": {
            "text_encoder_name": "google/flan-t5-large",
            "scheduler_name": "stabilityai/stable-diffusion-2-1",
            "unet_model_name": None,
            "unet_model_config_path": "configs/diffusion_model_config.json",
            "snr_gamma": 5.0,
        },
        "vae_config.json": {
            "image_key": "fbank",
            "subband": 1,
            "embed_dim": 8,
            "time_shuffle": 1,
            "ddconfig": {
                "double_z": True,
                "z_channels": sizes.vae.z_channels,
                "resolution": sizes.vae.resolution,
                "downsample_time": False,
                "in_channels": 1,
                "out_ch": 1,
                "ch": sizes.vae.ch,
                "ch_mult": list(sizes.vae.ch_mult),
                "num_res_blocks": sizes.vae.num_res_blocks,
                "attn_resolutions": [],
                "dropout": 0.0,
            },
            "scale_factor": SCALE_FACTOR,
        },
        "stft_config.json": {
            "filter_length": 1024,
            "hop_length": 160,
            "win_length": 1024,
            "n_mel_channels": 64,
            "sampling_rate": 16000,
            "mel_fmin": 0,
            "mel_fmax": 8000,
        },
    }


def write_t5_tokenizer(folder: Path) -> None:
    """A tokenizer of single letters that ends each text with </s>, as T5's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = [chr(ord("a") + i) for i in range(26)]
    words = ["<pad>", "</s>", "<unk>", "▁", *letters]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=512,
    ).save_pretrained(folder)


def denoise(
    weights: Weights,
    sizes: TangoSizes,
    ids: Tensor,
    mask: Tensor,
    noise: list[Tensor],
    steps: int,
    guidance: float,
) -> Tensor:
    """Latents of the original sampler: DDPM, v-prediction, guidance with the empty text.

    Args:
        weights: of pytorch_model_main.bin.
        sizes: of the model.
        ids: tokens [B, L], padded.
        mask: 1 for tokens.
        noise: `steps` + 1 unit tensors [B, C, H, W]: the first latents, then that of each step.
        steps: denoising steps.
        guidance: scale, above 1.
    """
    unet = _below(weights, "unet.")
    empty, empty_mask = torch.zeros_like(ids), torch.zeros_like(mask)
    empty[:, 0], empty_mask[:, 0] = 1, 1  # </s> alone
    both_masks = torch.cat([empty_mask, mask])
    text = t5.encode(
        _below(weights, "text_encoder."), sizes.text, torch.cat([empty, ids]), both_masks
    )
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    products = (1 - betas).cumprod(0)
    x, stride = noise[0], 1000 // steps
    for step in range(steps):
        t = (steps - 1 - step) * stride + 1
        before = t - stride
        a_t = products[t]
        a_before = products[before] if step + 1 < steps else torch.tensor(1.0)
        v = stable_unet.forward(unet, sizes.unet, torch.cat([x, x]), t, text, both_masks)
        free, told = v.chunk(2)
        v = free + guidance * (told - free)
        clean = a_t.sqrt() * x - (1 - a_t).sqrt() * v
        alpha = a_t / a_before
        x = (
            a_before.sqrt() * (1 - alpha) / (1 - a_t) * clean
            + alpha.sqrt() * (1 - a_before) / (1 - a_t) * x
        )
        variance = ((1 - a_before) / (1 - a_t) * (1 - alpha)).clamp_min(1e-20)
        x = x + variance.sqrt() * noise[step + 1]
    return x


def decode(weights: Weights, sizes: TangoSizes, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Log-mel [B, T, bins] and waveform [B, S] of latents; weights of pytorch_model_vae.bin."""
    mel = vae.decode(weights, sizes.vae, latents / SCALE_FACTOR)[:, 0]
    wave = hifigan.forward(_below(weights, "vocoder."), sizes.vocoder, mel.transpose(1, 2))
    return mel, wave.flatten(1)


def _below(weights: Weights, prefix: str) -> Weights:
    return {name[len(prefix) :]: t for name, t in weights.items() if name.startswith(prefix)}


if __name__ == "__main__":
    write_tango(Path(sys.argv[1]), TangoSizes())
