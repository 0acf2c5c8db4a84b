"""AudioLDM's original checkpoints, one .ckpt file each, as the parts of a pipeline.

    model.diffusion_model            the UNet; model_ema holds its averaged weights
    first_stage_model                the first stage, and below .vocoder a HiFi-GAN
    cond_stage_model.model           CLAP: of text_branch and text_projection the text vectors are
    FOLDER/roberta-base/             the tokenizer, which the original code downloads

Two things are as in diffusers' published conversion unless a caller asks for the original:

- heads: the original UNet has attention heads of 32 channels (64 in the large model), diffusers'
  configuration says 8 heads at every level. The same weights give another result.
- averages: the original code samples with the averaged weights, diffusers converts the others.

Source of names, shapes and numbers: haoheliu/AudioLDM, audioldm/utils.py and the modules it names;
huggingface/diffusers, scripts/convert_original_audioldm_to_diffusers.py.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptq4adm.errors import CheckpointError, ConfigError
from ptq4adm.models import latent_vae, openai_unet
from ptq4adm.models.assign import build
from ptq4adm.models.original import (
    STATE_ENTRY,
    check_vocabulary,
    find_checkpoint,
    fold_norms,
    load_tokenizer,
    make_positions,
    make_scheduler,
    note_unknown,
    read_scale_factor,
    tokenizer_places,
)
from ptq4adm.models.pickled import read_tensors, take

logger = logging.getLogger(__name__)

BETAS = (0.0015, 0.0195)
# diffusers' conversion: latents of 128 rows, 5.12 s, when a caller names no length
SAMPLE_SIZE = 128
HEADS = ("diffusers", "original")
TOKENIZER = "FacebookAI/roberta-base"
TEXT_PREFIX = "cond_stage_model.model."
VOCODER_PREFIX = "first_stage_model.vocoder."
_DIFFUSERS_HEADS = 8
# model_channels from which on heads are 64 wide, not 32
_LARGE = 256
_TEXT_PARTS = ("text_branch.", "text_projection.")
# constants of older versions of transformers
_CONSTANTS = ("embeddings.position_ids", "embeddings.token_type_ids")
_UPSAMPLE_RATES = (5, 4, 2, 2, 2)
_DILATIONS = ((1, 3, 5),) * 3


def load_parts(
    path: str | Path,
    *,
    tokenizer: str | Path | None = None,
    heads: str = "diffusers",
    ema: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Read every part of the pipeline.

    Args:
        path: the .ckpt file, or a folder with no other.
        tokenizer: folder of roberta-base's tokenizer; None for the one beside the file.
        heads: "diffusers" for 8 attention heads at every level, as diffusers' conversion has them;
            "original" for heads of the original width.
        ema: whether to take the averaged weights of the UNet, as the original code does.
        dtype: of the weights. In float32, which they are stored in, they stay in the file.

    Returns:
        Name to component.

    Raises:
        ConfigError: if `heads` is unknown.
        MissingComponentError: if the file or the tokenizer is missing.
        CheckpointError: if the file is broken, or of another model; see its children.
    """
    if heads not in HEADS:
        raise ConfigError(f"heads = {heads!r}: expected {' or '.join(map(repr, HEADS))}")
    path = find_checkpoint(Path(path))
    source = str(path)
    places = tokenizer_places(path.parent, TOKENIZER, tokenizer)
    tokens = load_tokenizer(places, TOKENIZER, "RobertaTokenizerFast")
    tensors = read_tensors(path, STATE_ENTRY)
    note_unknown(tensors, (latent_vae.PREFIX, TEXT_PREFIX), source)
    text_encoder = load_text_encoder(take(tensors, TEXT_PREFIX), source, dtype=dtype)
    check_vocabulary(tokens, text_encoder.config.vocab_size, source)
    # RoBERTa counts positions from behind the id of its padding
    longest = text_encoder.config.max_position_embeddings - 2
    tokens.model_max_length = min(tokens.model_max_length, longest)
    return {
        "unet": _load_unet(tensors, source, heads, ema, dtype),
        "vae": latent_vae.load_vae(
            take(tensors, latent_vae.PREFIX),
            read_scale_factor(tensors, source),
            source,
            dtype=dtype,
        ),
        "text_encoder": text_encoder,
        "tokenizer": tokens,
        "scheduler": make_scheduler(tensors, *BETAS, source),
        "vocoder": load_vocoder(take(tensors, VOCODER_PREFIX), source, dtype=dtype),
    }


def original_heads(layout: openai_unet.UNetLayout) -> tuple[int, ...]:
    """Attention heads of every level in the original code."""
    width = 64 if layout.model_channels >= _LARGE else 32
    return tuple(channels // width for channels in layout.channels)


def load_text_encoder(
    tensors: Mapping[str, Tensor], source: str, *, dtype: torch.dtype = torch.float32
) -> Any:
    """The text half of CLAP as a `ClapTextModelWithProjection`.

    Its norms have RoBERTa's epsilon of 1e-5, as in the original code.

    Args:
        tensors: those below `TEXT_PREFIX`, without it; the other half is left out.
        source: the file, for messages.
        dtype: of the weights.

    Raises:
        CheckpointError: if tensors are missing or unknown; see its children.
    """
    from transformers import ClapTextModelWithProjection

    own = {
        name: tensor
        for name, tensor in tensors.items()
        if name.startswith(_TEXT_PARTS) and not name.endswith(_CONSTANTS)
    }
    config = _text_config(own, source)
    with torch.device("meta"):
        needed = ClapTextModelWithProjection(config).state_dict()
    # some versions of transformers store them: they are made here
    constants = {
        _text_name(name): torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in needed.items()
        if name.endswith(_CONSTANTS)
    }
    encoder: Any = build(
        lambda: ClapTextModelWithProjection(config),
        {TEXT_PREFIX + name: tensor for name, tensor in {**own, **constants}.items()},
        source,
        dtype=dtype,
        file_name=lambda name: TEXT_PREFIX + _text_name(name),
    )
    make_positions(encoder.text_model.embeddings)
    return encoder


def load_vocoder(
    tensors: Mapping[str, Tensor],
    source: str,
    *,
    prefix: str = VOCODER_PREFIX,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """The HiFi-GAN as a `SpeechT5HifiGan`.

    Args:
        tensors: those below `prefix`, without it.
        source: the file, for messages.
        prefix: of the names in the file, for messages.
        dtype: of the weights.

    Raises:
        CheckpointError: if tensors are missing or unknown; see its children.
    """
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    own = fold_norms(tensors, source)
    first = own.get("conv_pre.weight")
    ups = [own.get(f"ups.{i}.weight") for i in range(len(_UPSAMPLE_RATES))]
    if first is None or any(up is None for up in ups):
        raise CheckpointError(
            f"{source}: its {prefix} is not the HiFi-GAN of AudioLDM, with "
            f"{len(_UPSAMPLE_RATES)} levels; it is another model, or was saved without a vocoder"
        )
    blocks = (own.get(f"resblocks.{i}.convs1.0.weight") for i in range(len(_DILATIONS)))
    config = SpeechT5HifiGanConfig(
        model_in_dim=first.shape[1],
        sampling_rate=16000,
        upsample_initial_channel=first.shape[0],
        upsample_rates=list(_UPSAMPLE_RATES),
        upsample_kernel_sizes=[up.shape[2] for up in ups if up is not None],
        resblock_kernel_sizes=[0 if block is None else block.shape[2] for block in blocks],
        resblock_dilation_sizes=[list(dilations) for dilations in _DILATIONS],
        normalize_before=False,
    )
    # unused without normalize_before
    own |= {"mean": torch.zeros(first.shape[1]), "scale": torch.ones(first.shape[1])}
    vocoder: nn.Module = build(
        lambda: SpeechT5HifiGan(config),
        {prefix + name: tensor for name, tensor in own.items()},
        source,
        dtype=dtype,
        file_name=lambda name: prefix + name.replace("upsampler.", "ups."),
    )
    return vocoder


def _load_unet(
    tensors: Mapping[str, Tensor], source: str, heads: str, ema: bool, dtype: torch.dtype
) -> nn.Module:
    if ema:
        own = openai_unet.averaged(tensors, source)
    else:
        own = take(tensors, openai_unet.PREFIX)
        if openai_unet.has_averaged(tensors):
            logger.info("%s: has averaged weights, too; ema=True takes them", source)
    layout = openai_unet.read_layout(own, source)
    if layout.film_dim is None:
        raise CheckpointError(f"{source}: its UNet takes no text vector, so it is not AudioLDM's")
    count = original_heads(layout) if heads == "original" else _DIFFUSERS_HEADS
    config = layout.config(count, sample_size=SAMPLE_SIZE)
    return openai_unet.load_unet(own, config, source, dtype=dtype)


def _text_config(tensors: Mapping[str, Tensor], source: str) -> Any:
    from transformers import ClapTextConfig

    names = (
        "text_branch.embeddings.word_embeddings.weight",
        "text_branch.embeddings.position_embeddings.weight",
        "text_branch.embeddings.token_type_embeddings.weight",
        "text_branch.encoder.layer.0.intermediate.dense.weight",
        "text_projection.0.weight",
    )
    missing = [name for name in names if name not in tensors]
    if missing:
        raise CheckpointError(
            f"{source}: lacks {TEXT_PREFIX}{missing[0]}; it is another model, or was saved without "
            "its text encoder"
        )
    words, positions, kinds, inner, projected = (tensors[name].shape for name in names)
    layers = {n.split(".")[3] for n in tensors if n.startswith("text_branch.encoder.layer.")}
    return ClapTextConfig(
        vocab_size=words[0],
        hidden_size=words[1],
        num_hidden_layers=len(layers),
        num_attention_heads=words[1] // 64,
        intermediate_size=inner[0],
        max_position_embeddings=positions[0],
        type_vocab_size=kinds[0],
        projection_dim=projected[0],
        layer_norm_eps=1e-5,
    )


def _text_name(name: str) -> str:
    """Name in the file, without `TEXT_PREFIX`, of a tensor of the `ClapTextModelWithProjection`."""
    name = name.replace("text_projection.linear1.", "text_projection.0.")
    name = name.replace("text_projection.linear2.", "text_projection.2.")
    return name.replace("text_model.", "text_branch.", 1)
