"""The published files of Make-An-Audio, as the parts of a pipeline.

    FOLDER/maa1_full.ckpt            model.diffusion_model, first_stage_model, cond_stage_model
    FOLDER/bigvgan/args.yml, best_netG.pt
    FOLDER/bert-base-uncased/        the tokenizer, which the original code downloads
    FOLDER/txt2audio_args.yaml       its config: compared with the weights, where it is there

The text encoder is in the checkpoint, too: CLAP/CLAP_weights_2022.pth is not needed.

Source of names, shapes and numbers: Text-to-Audio/Make-An-Audio, configs/text_to_audio and ldm.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptq4adm.errors import CheckpointError
from ptq4adm.models import latent_vae, openai_unet
from ptq4adm.models.assign import build
from ptq4adm.models.openai_config import check_config
from ptq4adm.models.original import (
    STATE_ENTRY,
    check_vocabulary,
    find_checkpoint,
    load_tokenizer,
    make_positions,
    make_scheduler,
    note_unknown,
    read_scale_factor,
    tokenizer_places,
)
from ptq4adm.models.pickled import read_tensors, take

HEADS = 8  # of every attention
BETAS = (0.00085, 0.012)
LATENT_SIZE = (10, 80)  # mel bins and frames over 8; a clip of 10 s
VOCODER_FOLDER = "bigvgan"
CONFIG_FILE = "txt2audio_args.yaml"
TOKENIZER = "google-bert/bert-base-uncased"
TEXT_PREFIX = "cond_stage_model.caption_encoder."
# what BERT would need for one vector a text, and a constant of older versions of transformers
_UNUSED_TEXT = ("base.pooler.", "base.embeddings.position_ids")


def load_parts(
    path: str | Path,
    *,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Read every part of the pipeline.

    Args:
        path: the folder, or its .ckpt file.
        tokenizer: folder of bert-base-uncased's tokenizer; None for the one in the folder.
        dtype: of the weights. In float32, which they are stored in, they stay in the file.

    Returns:
        Name to component.

    Raises:
        MissingComponentError: if a file is missing.
        CheckpointError: if a file is broken, or they contradict each other; see its children.
    """
    from ptq4adm.models.bigvgan_files import load_bigvgan

    checkpoint = find_checkpoint(Path(path))
    folder, source = checkpoint.parent, str(checkpoint)
    places = tokenizer_places(folder, TOKENIZER, tokenizer)
    tokens = load_tokenizer(places, TOKENIZER, "BertTokenizerFast")
    vocoder = load_bigvgan(folder / VOCODER_FOLDER, dtype=dtype)
    tensors = read_tensors(checkpoint, STATE_ENTRY)
    note_unknown(tensors, (latent_vae.PREFIX, TEXT_PREFIX), source)
    vae = latent_vae.load_vae(
        take(tensors, latent_vae.PREFIX), read_scale_factor(tensors, source), source, dtype=dtype
    )
    _check_mel(vae, vocoder, source)
    text_encoder = load_text_encoder(take(tensors, TEXT_PREFIX), source, dtype=dtype)
    check_vocabulary(tokens, text_encoder.config.vocab_size, source)
    return {
        "unet": _load_unet(tensors, folder, source, dtype),
        "vae": vae,
        "text_encoder": text_encoder,
        "tokenizer": tokens,
        "scheduler": make_scheduler(tensors, *BETAS, source),
        "vocoder": vocoder,
    }


def load_text_encoder(
    tensors: Mapping[str, Tensor], source: str, *, dtype: torch.dtype = torch.float32
) -> Any:
    """BERT and its projection as a `ClapTokenEncoder`.

    Args:
        tensors: those below `TEXT_PREFIX`, without it.
        source: the file, for messages.
        dtype: of the weights.

    Raises:
        CheckpointError: if tensors are missing or unknown; see its children.
    """
    from ptq4adm.models.clap_tokens import ClapTokenEncoder

    own = {name: t for name, t in tensors.items() if not name.startswith(_UNUSED_TEXT)}
    words = own.get("base.embeddings.word_embeddings.weight")
    positions = own.get("base.embeddings.position_embeddings.weight")
    kinds = own.get("base.embeddings.token_type_embeddings.weight")
    inner = own.get("base.encoder.layer.0.intermediate.dense.weight")
    projected = own.get("projection.linear1.weight")
    if words is None or positions is None or kinds is None or inner is None or projected is None:
        raise CheckpointError(
            f"{source}: its {TEXT_PREFIX} is not a BERT with a projection; it is another model, or "
            "was saved without its text encoder"
        )
    layers = {name.split(".")[3] for name in own if name.startswith("base.encoder.layer.")}
    sizes = {
        "vocab_size": words.shape[0],
        "hidden_size": words.shape[1],
        "num_hidden_layers": len(layers),
        "intermediate_size": inner.shape[0],
        "max_position_embeddings": positions.shape[0],
        "type_vocab_size": kinds.shape[0],
        "projection_dim": projected.shape[0],
    }
    encoder: ClapTokenEncoder = build(
        lambda: ClapTokenEncoder(**sizes),
        {TEXT_PREFIX + name: tensor for name, tensor in own.items()},
        source,
        dtype=dtype,
        file_name=lambda name: TEXT_PREFIX + name,
    )
    make_positions(encoder.base.embeddings)
    return encoder


def _load_unet(
    tensors: Mapping[str, Tensor], folder: Path, source: str, dtype: torch.dtype
) -> nn.Module:
    own = take(tensors, openai_unet.PREFIX)
    layout = openai_unet.read_layout(own, source)
    if layout.context_dim is None:
        raise CheckpointError(
            f"{source}: its UNet takes no text tokens, so it is not Make-An-Audio's"
        )
    config = folder / CONFIG_FILE
    heads = check_config(config, layout, BETAS) if config.is_file() else None
    config_of_unet = layout.config(heads or HEADS, sample_size=LATENT_SIZE)
    return openai_unet.load_unet(own, config_of_unet, source, dtype=dtype)


def _check_mel(vae: Any, vocoder: Any, source: str) -> None:
    """The first stage and the vocoder agree on the number of mel bins."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    bins = LATENT_SIZE[0] * factor
    if vocoder.config.num_mels != bins:
        raise CheckpointError(
            f"{source}: its first stage makes {bins} mel bins, the vocoder takes "
            f"{vocoder.config.num_mels}; they belong to different models"
        )
