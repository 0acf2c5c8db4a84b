"""The published files of TANGO, as the parts of a pipeline.

    FOLDER/main_config.json          names of text encoder, scheduler and UNet config
    FOLDER/pytorch_model_main.bin    unet.*, text_encoder.*
    FOLDER/vae_config.json           with the factor between latents of UNet and first stage
    FOLDER/pytorch_model_vae.bin     AudioLDM's first stage, and vocoder.*, its HiFi-GAN
    FOLDER/stft_config.json          of the log-mels; its .bin file is for training alone
    FOLDER/flan-t5-large/            the tokenizer, which the original code downloads

The UNet's config and the scheduler are not among the files: main_config.json names them, and the
published ones are written down here. Each may lie beside the weights instead
(configs/diffusion_model_config.json, scheduler/scheduler_config.json).

Source of names, shapes and numbers: declare-lab/tango, tango.py, models.py, configs and
mustango/configs; the scheduler of stabilityai/stable-diffusion-2-1.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptq4adm.errors import CheckpointError, MissingComponentError, UnsupportedModelError
from ptq4adm.models import latent_vae
from ptq4adm.models.assign import build
from ptq4adm.models.audioldm_files import load_vocoder
from ptq4adm.models.components import read_json
from ptq4adm.models.original import check_vocabulary, load_tokenizer, tokenizer_places
from ptq4adm.models.pickled import few, read_tensors, take

MAIN_CONFIG, VAE_CONFIG, STFT_CONFIG = "main_config.json", "vae_config.json", "stft_config.json"
MAIN_WEIGHTS, VAE_WEIGHTS = "pytorch_model_main", "pytorch_model_vae"
UNET_PREFIX, TEXT_PREFIX, VOCODER_PREFIX = "unet.", "text_encoder.", "vocoder."
TOKENIZER = "google/flan-t5-large"
MAX_TOKENS = 512  # what the text encoder was trained with
_SUFFIXES = (".safetensors", ".bin")

UNET_CONFIG_NAME = "diffusion_model_config.json"
UNET_CONFIG: dict[str, Any] = {
    # of 8 rows and columns each: latents are 256 x 16
    "sample_size": (32, 2),
    "in_channels": 8,
    "out_channels": 8,
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    # numbers of heads, in spite of the name: every head is 64 wide
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "upcast_attention": True,
}
_SIZE_UNIT = 8

SCHEDULER_NAME = "stabilityai/stable-diffusion-2-1"
SCHEDULER_CONFIG: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "prediction_type": "v_prediction",
    # timesteps 1, 1 + 1000 / steps, ...: since diffusers 0.18, which the authors ask for
    "steps_offset": 1,
}


def is_published(path: Path) -> bool:
    """Whether a folder has the layout, by the names of its files."""
    return (path / MAIN_CONFIG).is_file() or any(
        (path / f"{MAIN_WEIGHTS}{suffix}").is_file() for suffix in _SUFFIXES
    )


def load_parts(
    folder: Path, *, tokenizer: str | Path | None = None, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Read every part of the pipeline.

    Args:
        folder: of the published files.
        tokenizer: folder of FLAN-T5's tokenizer; None for the one in the folder, or in the cache of
            the Hugging Face hub.
        dtype: of all modules but the text encoder, which stays float32. Weights that are stored in
            it stay in the file.

    Returns:
        Name to component.

    Raises:
        MissingComponentError: if a file is missing.
        CheckpointError: if a file is broken, or they contradict each other; see its children.
        UnsupportedModelError: if the configs ask for parts that are not TANGO's.
    """
    main, vae_config = _read_config(folder, MAIN_CONFIG), _read_config(folder, VAE_CONFIG)
    stft_config = _read_config(folder, STFT_CONFIG)
    unet_config = _unet_config(folder, main)
    scheduler = _load_scheduler(folder, main)
    tokens = _load_tokenizer(folder, main, tokenizer)
    vae_path = _find_weights(folder, VAE_WEIGHTS)
    tensors = read_tensors(vae_path)
    vae = _load_vae(tensors, vae_config, str(vae_path), dtype)
    vocoder = load_vocoder(
        take(tensors, VOCODER_PREFIX), str(vae_path), prefix=VOCODER_PREFIX, dtype=dtype
    )
    _check_mel(stft_config, vocoder, folder)
    main_path = _find_weights(folder, MAIN_WEIGHTS)
    tensors = read_tensors(main_path)
    _check_parts(tensors, str(main_path))
    text_encoder = _load_text_encoder(tensors, str(main_path))
    check_vocabulary(tokens, text_encoder.config.vocab_size, str(main_path))
    return {
        "unet": _load_unet(tensors, unet_config, str(main_path), dtype),
        "vae": vae,
        "text_encoder": text_encoder,
        "tokenizer": tokens,
        "scheduler": scheduler,
        "vocoder": vocoder,
    }


# --- configs --------------------------------------------------------------------------------------


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    if not (folder / name).is_file():
        raise MissingComponentError(f"{folder}: no {name}; copy the whole folder of the model")
    return read_json(folder / name)


def _find_weights(folder: Path, stem: str) -> Path:
    for suffix in _SUFFIXES:
        if (folder / f"{stem}{suffix}").is_file():
            return folder / f"{stem}{suffix}"
    raise MissingComponentError(f"{folder}: no {stem}.bin; copy the whole folder of the model")


def _unet_config(folder: Path, main: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the UNet."""
    named = main.get("unet_model_config_path")
    if not isinstance(named, str):
        raise UnsupportedModelError(
            f"{folder / MAIN_CONFIG}: names no unet_model_config_path (unet_model_name is "
            f"{main.get('unet_model_name')!r}); TANGO's published models do"
        )
    name = Path(named).name
    for place in (folder / "configs" / name, folder / name):
        if place.is_file():
            config = {k: v for k, v in read_json(place).items() if not k.startswith("_")}
            break
    else:
        if name != UNET_CONFIG_NAME:
            raise MissingComponentError(
                f"{folder}: no {name}, which {MAIN_CONFIG} names; copy it there (known without a "
                f"file is {UNET_CONFIG_NAME})"
            )
        config = dict(UNET_CONFIG)
    size = config.get("sample_size")
    if not (isinstance(size, list | tuple) and len(size) == 2):
        raise CheckpointError(f"{name}: sample_size is {size!r}, needs [rows, columns]")
    config["sample_size"] = tuple(_SIZE_UNIT * int(part) for part in size)
    return config


def _load_scheduler(folder: Path, main: Mapping[str, Any]) -> Any:
    from diffusers import DDPMScheduler

    place = folder / "scheduler" / "scheduler_config.json"
    if place.is_file():
        return DDPMScheduler.from_config(read_json(place))
    if main.get("scheduler_name") != SCHEDULER_NAME:
        raise MissingComponentError(
            f"{folder / MAIN_CONFIG}: scheduler_name is {main.get('scheduler_name')!r}, known "
            f"without a file is {SCHEDULER_NAME!r}; copy its scheduler_config.json to {place}"
        )
    return DDPMScheduler(**SCHEDULER_CONFIG)


def _load_tokenizer(folder: Path, main: Mapping[str, Any], tokenizer: str | Path | None) -> Any:
    name = main.get("text_encoder_name")
    if not isinstance(name, str) or "t5" not in name.lower():
        raise UnsupportedModelError(
            f"{folder / MAIN_CONFIG}: text_encoder_name is {name!r}, TANGO's is {TOKENIZER!r}"
        )
    tokens = load_tokenizer(tokenizer_places(folder, name, tokenizer), name)
    # a tokenizer without a limit of its own says 10^30
    tokens.model_max_length = min(tokens.model_max_length, MAX_TOKENS)
    return tokens


def _check_mel(stft: Mapping[str, Any], vocoder: Any, folder: Path) -> None:
    """Hold the log-mels of training against those that the vocoder takes."""
    hop = 1
    for rate in vocoder.config.upsample_rates:
        hop *= rate
    found = {
        "sampling_rate": vocoder.config.sampling_rate,
        "hop_length": hop,
        "n_mel_channels": vocoder.config.model_in_dim,
    }
    wrong = {name: stft.get(name) for name, value in found.items() if stft.get(name) != value}
    if wrong:
        raise CheckpointError(
            f"{folder / STFT_CONFIG}: says {wrong}, the vocoder needs "
            f"{ ({name: found[name] for name in wrong}) }; the files belong to different models"
        )


# --- weights --------------------------------------------------------------------------------------


def _check_parts(tensors: Mapping[str, Tensor], source: str) -> None:
    for prefix in (UNET_PREFIX, TEXT_PREFIX):
        if not any(name.startswith(prefix) for name in tensors):
            raise CheckpointError(f"{source}: holds no {prefix}*; it is not TANGO's")
    unknown = [name for name in tensors if not name.startswith((UNET_PREFIX, TEXT_PREFIX))]
    if unknown:
        raise CheckpointError(
            f"{source}: holds {len(unknown)} unknown tensors ({few(unknown)}) beside "
            f"{UNET_PREFIX}* and {TEXT_PREFIX}*; it is another model"
        )


def _load_unet(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], source: str, dtype: torch.dtype
) -> nn.Module:
    from diffusers import UNet2DConditionModel

    def make() -> nn.Module:
        try:
            unet: nn.Module = UNet2DConditionModel.from_config(dict(config))
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"{source}: no UNet can be made from its config ({error})"
            ) from error
        return unet

    own = {name: t for name, t in tensors.items() if name.startswith(UNET_PREFIX)}
    return build(make, own, source, dtype=dtype, file_name=lambda name: UNET_PREFIX + name)


def _load_text_encoder(tensors: Mapping[str, Tensor], source: str) -> Any:
    """The encoder of a FLAN-T5, whose sizes its weights say."""
    from transformers import T5EncoderModel

    own = {name: t for name, t in tensors.items() if name.startswith(TEXT_PREFIX)}
    config = _text_config(take(tensors, TEXT_PREFIX), source)
    encoder: Any = build(
        lambda: T5EncoderModel(config),
        own,
        source,
        dtype=torch.float32,
        file_name=lambda name: TEXT_PREFIX + name,
    )
    # the embedding has two names: one tensor again, whatever the file holds
    encoder.tie_weights()
    return encoder


def _text_config(tensors: Mapping[str, Tensor], source: str) -> Any:
    from transformers import T5Config

    first = "encoder.block.0.layer"
    names = (
        "shared.weight",
        f"{first}.0.SelfAttention.q.weight",
        f"{first}.0.SelfAttention.relative_attention_bias.weight",
        f"{first}.1.DenseReluDense.wi_0.weight",
    )
    missing = [name for name in names if name not in tensors]
    if missing:
        raise CheckpointError(
            f"{source}: lacks {TEXT_PREFIX}{missing[0]}; its text encoder is no FLAN-T5"
        )
    (words, width), inner, (distances, heads), hidden = (tensors[name].shape for name in names)
    layers = {name.split(".")[2] for name in tensors if name.startswith("encoder.block.")}
    return T5Config(
        vocab_size=words,
        d_model=width,
        d_kv=inner[0] // heads,
        d_ff=hidden[0],
        num_layers=len(layers),
        num_heads=heads,
        relative_attention_num_buckets=distances,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )


def _load_vae(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], source: str, dtype: torch.dtype
) -> nn.Module:
    factor = config.get("scale_factor")
    if not isinstance(factor, int | float) or not 0.0 < factor < float("inf"):
        raise CheckpointError(f"{VAE_CONFIG}: scale_factor is {factor!r}, needs a positive number")
    if config.get("subband", 1) != 1:
        raise UnsupportedModelError(
            f"{VAE_CONFIG}: subband is {config['subband']!r}; TANGO's first stage has 1"
        )
    vae: Any = latent_vae.load_vae(tensors, float(factor), source, prefix="", dtype=dtype)
    made, said = vae.config, config.get("ddconfig") or {}
    channels = list(made.block_out_channels)
    found = {
        "ch": channels[0],
        "ch_mult": [width // channels[0] for width in channels],
        "z_channels": made.latent_channels,
        "num_res_blocks": made.layers_per_block,
        "in_channels": made.in_channels,
        "out_ch": made.out_channels,
    }
    wrong = [name for name in found if name in said and said[name] != found[name]]
    if wrong:
        raise CheckpointError(
            f"{VAE_CONFIG}: {wrong[0]} is {said[wrong[0]]!r}, the weights in {source} have "
            f"{found[wrong[0]]!r}; the files belong to different models"
        )
    return vae
