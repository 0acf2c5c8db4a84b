"""Files of the published layouts with random weights, at tiny and at real sizes.

PYTHONPATH=tests/shared python -m originals make-an-audio FOLDER     writes one at real size
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from originals import bigvgan, hifigan, text, unet, vae
from originals.weights import random_weights

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class MakeAnAudioSizes:
    """Architecture of one Make-An-Audio; the default is the published one."""

    unet: unet.UNetConfig = unet.MAKE_AN_AUDIO
    vae: vae.VaeConfig = vae.MAKE_AN_AUDIO
    text: text.BertConfig = text.BERT_BASE
    projected: int = 1024
    vocoder: bigvgan.BigVGANConfig = field(default_factory=bigvgan.BigVGANConfig)
    betas: tuple[float, float] = (0.00085, 0.012)


TINY_MAKE_AN_AUDIO = MakeAnAudioSizes(
    unet=unet.UNetConfig(4, 4, 32, (1, 2), (1, 2), num_heads=8, context_dim=48),
    vae=vae.VaeConfig(4, 32, (1, 1, 1, 2), 624, (78, 156), num_res_blocks=1),
    text=text.BertConfig(64, 128, 2, 128, 96),
    projected=48,
    vocoder=bigvgan.BigVGANConfig(
        upsample_initial_channel=64,
        resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=((1, 3),),
    ),
)


@dataclass(frozen=True)
class AudioLDMSizes:
    """Architecture of one AudioLDM; the default is the published small one."""

    unet: unet.UNetConfig = unet.AUDIOLDM_S
    vae: vae.VaeConfig = vae.AUDIOLDM
    text: text.BertConfig = text.ROBERTA_BASE
    vocoder: hifigan.HifiGanConfig = field(default_factory=hifigan.HifiGanConfig)
    betas: tuple[float, float] = (0.0015, 0.0195)


TINY_AUDIOLDM = AudioLDMSizes(
    unet=unet.UNetConfig(
        8, 8, 32, (1, 2, 3, 5), (8, 4, 2), num_head_channels=32, extra_film_condition_dim=24
    ),
    vae=vae.VaeConfig(8, 32, (1, 1, 2), 256, num_res_blocks=1),
    text=text.BertConfig(300, 128, 1, 128, 80, types=1, eps=1e-5, first_position=2),
    vocoder=hifigan.HifiGanConfig(upsample_initial_channel=32, resblock_kernel_sizes=(3, 5, 7)),
)


def make_an_audio_weights(sizes: MakeAnAudioSizes, seed: int = 0) -> Weights:
    """The state dict of the .ckpt file, with what training leaves in it."""
    found = random_weights(unet.shapes(sizes.unet), seed, "model.diffusion_model.")
    found |= random_weights(vae.shapes(sizes.vae), seed + 1, "first_stage_model.")
    shapes = text.clap_token_shapes(sizes.text, sizes.projected)
    found |= random_weights(shapes, seed + 2, "cond_stage_model.caption_encoder.")
    positions = torch.arange(sizes.text.positions)[None]
    found["cond_stage_model.caption_encoder.base.embeddings.position_ids"] = positions
    return found | _training(sizes.betas)


def write_make_an_audio(
    folder: Path, sizes: MakeAnAudioSizes, seed: int = 0
) -> tuple[Weights, Weights]:
    """Write `useful_ckpts` of the original repository, and the tokenizer that it downloads.

    Returns:
        The state dicts of the checkpoint and of the vocoder.
    """
    weights = make_an_audio_weights(sizes, seed)
    vocoder = bigvgan.fill(random_weights(bigvgan.shapes(sizes.vocoder), seed + 3))
    (folder / "bigvgan").mkdir(parents=True)
    torch.save({"epoch": 3, "state_dict": weights}, folder / "maa1_full.ckpt")
    torch.save({"generator": vocoder}, folder / "bigvgan" / "best_netG.pt")
    # JSON is YAML
    (folder / "bigvgan" / "args.yml").write_text(json.dumps(asdict(sizes.vocoder)))
    write_bert_tokenizer(folder / "bert-base-uncased", sizes.text.vocab)
    return weights, vocoder


def make_an_audio_yaml(sizes: MakeAnAudioSizes) -> dict[str, Any]:
    """The sections of txt2audio_args.yaml that say something of the architecture."""
    config = asdict(sizes.unet)
    for name in ("num_head_channels", "extra_film_condition_dim"):
        del config[name]
    params = {"linear_start": sizes.betas[0], "linear_end": sizes.betas[1]}
    return {"model": {"params": {**params, "unet_config": {"params": config}}}}


def audioldm_weights(sizes: AudioLDMSizes, seed: int = 0) -> Weights:
    """The state dict of a .ckpt file, with averaged weights and what training leaves in it."""
    shapes = unet.shapes(sizes.unet)
    found = random_weights(shapes, seed, "model.diffusion_model.")
    averages = random_weights(shapes, seed + 9)
    found |= {
        f"model_ema.diffusion_model{name.replace('.', '')}": tensor
        for name, tensor in averages.items()
    }
    found |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    found |= random_weights(vae.shapes(sizes.vae), seed + 1, "first_stage_model.")
    film = sizes.unet.extra_film_condition_dim
    assert film is not None
    shapes = text.clap_text_shapes(sizes.text, film)
    found |= random_weights(shapes, seed + 2, "cond_stage_model.model.")
    positions = torch.arange(sizes.text.positions)[None]
    found["cond_stage_model.model.text_branch.embeddings.position_ids"] = positions
    shapes = hifigan.shapes(sizes.vocoder)
    found |= random_weights(shapes, seed + 3, "first_stage_model.vocoder.")
    return found | _training(sizes.betas)


def write_audioldm(path: Path, sizes: AudioLDMSizes, seed: int = 0) -> Weights:
    """Write a .ckpt file, and the tokenizer that the original code downloads beside it."""
    weights = audioldm_weights(sizes, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"global_step": 5, "state_dict": weights}, path)
    write_roberta_tokenizer(path.parent / "roberta-base", sizes.text.vocab)
    return weights


def write_bert_tokenizer(folder: Path, size: int) -> None:
    """A WordPiece tokenizer of single letters."""
    from transformers import BertTokenizerFast

    letters = [chr(ord("a") + i) for i in range(26)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{x}" for x in letters)]
    assert len(words) <= size
    vocab = {word: i for i, word in enumerate(words)}
    BertTokenizerFast(vocab=vocab).save_pretrained(folder)


def write_roberta_tokenizer(folder: Path, size: int) -> None:
    """A byte-level tokenizer of single bytes."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import RobertaTokenizerFast

    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(ByteLevel.alphabet())]
    assert len(words) <= size
    vocab = {word: i for i, word in enumerate(words)}
    RobertaTokenizerFast(vocab=vocab, merges=[], model_max_length=64).save_pretrained(folder)


def _training(betas: tuple[float, float]) -> Weights:
    start, end = betas
    values = torch.linspace(start**0.5, end**0.5, 1000, dtype=torch.float64) ** 2
    products = (1 - values).cumprod(0)
    return {
        "scale_factor": torch.tensor(0.9),
        "betas": values.float(),
        "alphas_cumprod": products.float(),
        "logvar": torch.zeros(1000),
    }
