"""What the loaders of original checkpoints share: parts of a state dict, yaml files, tokenizers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptq4adm.errors import CheckpointError, MissingComponentError
from ptq4adm.models import openai_unet
from ptq4adm.models.pickled import few, read_tensors

logger = logging.getLogger(__name__)

# of the training of a diffusion model: constants that follow from its noise schedule, and counters
_SCHEDULE = (
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "betas",
    "cond_ids",
    "log_one_minus_alphas_cumprod",
    "logvar",
    "lvlb_weights",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "posterior_variance",
    "scale_factor",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
)
STATE_ENTRY = "state_dict"  # of a checkpoint: beside it is what training needs to go on
_SUFFIX = ".ckpt"
# a tokenizer has one of them
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model")
_BETA_TOLERANCE = 1e-4  # relative


def has_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a .ckpt file itself."""
    return folder.is_dir() and bool(_checkpoints(folder))


def find_checkpoint(path: Path) -> Path:
    """The .ckpt file of a folder, or the file itself.

    Raises:
        MissingComponentError: if there is none.
        CheckpointError: if there are several.
    """
    if not path.is_dir():
        return path
    found = _checkpoints(path)
    if not found:
        raise MissingComponentError(f"{path}: no {_SUFFIX} file; copy it there, or name the file")
    if len(found) > 1:
        names = ", ".join(p.name for p in found)
        raise CheckpointError(f"{path}: holds {names}; name the file that is meant")
    return found[0]


def checkpoint_names(path: Path) -> frozenset[str]:
    """Names of all tensors of a checkpoint file, or of the only one of a folder; {} without one.

    Raises:
        CheckpointError: if it is broken, or there are several; see its children.
    """
    if not (path.is_file() or has_checkpoint(path)):
        return frozenset()
    return frozenset(read_tensors(find_checkpoint(path), STATE_ENTRY))


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix == _SUFFIX and p.is_file())


def note_unknown(tensors: Mapping[str, Tensor], known: Sequence[str], source: str) -> None:
    """Say which tensors of a checkpoint belong to no known part; they are not used.

    Args:
        tensors: the whole state dict.
        known: prefixes of the parts beside the UNet.
        source: the file, for messages.
    """
    parts = (openai_unet.PREFIX, openai_unet.EMA_PREFIX, *known)
    unknown = [n for n in tensors if not n.startswith(parts) and n not in _SCHEDULE]
    if unknown:
        logger.warning("%s: %d tensors are not used: %s", source, len(unknown), few(unknown))


def read_scale_factor(tensors: Mapping[str, Tensor], source: str) -> float:
    """The factor between latents of the UNet and of the first stage.

    Raises:
        CheckpointError: if it is missing, or no positive number.
    """
    stored = tensors.get("scale_factor")
    if stored is None or stored.numel() != 1:
        raise CheckpointError(
            f"{source}: lacks scale_factor, one number; without it the decoder gets latents of "
            "another size"
        )
    factor = float(stored)
    if not 0.0 < factor < float("inf"):
        raise CheckpointError(f"{source}: scale_factor is {factor}, needs a positive number")
    return factor


def make_scheduler(
    tensors: Mapping[str, Tensor], beta_start: float, beta_end: float, source: str
) -> Any:
    """The DDIM sampler of the latent-diffusion code, after a look at the schedule that is stored.

    Its timesteps are 1, 1 + 1000 / steps, ...; the last step ends at the first noise level.

    Args:
        tensors: the whole state dict; its `betas` are compared if it holds them.
        beta_start: first variance of the family's published schedule.
        beta_end: last variance.
        source: the file, for messages.

    Returns:
        A `DDIMScheduler`.

    Raises:
        CheckpointError: if the model was trained with another schedule.
    """
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=beta_start,
        beta_end=beta_end,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    stored = tensors.get("betas")
    if stored is not None:
        expected = scheduler.betas
        if stored.shape != expected.shape or not torch.allclose(
            stored.float(), expected, rtol=_BETA_TOLERANCE, atol=0
        ):
            raise CheckpointError(
                f"{source}: its betas {list(stored.shape)} from {float(stored.flatten()[0]):.6g} "
                f"to {float(stored.flatten()[-1]):.6g} are not the family's 1000 from "
                f"{beta_start} to {beta_end}; it is another model"
            )
    return scheduler


def fold_norms(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Weights that are stored as direction and length ("weight norm") become one tensor each.

    Raises:
        CheckpointError: if one of the two is missing or has another form.
    """
    found = {}
    for name, tensor in tensors.items():
        if name.endswith(".weight_g") and f"{name.removesuffix('_g')}_v" in tensors:
            continue
        if not name.endswith(".weight_v"):
            found[name] = tensor
            continue
        start = name.removesuffix("_v")
        length = tensors.get(f"{start}_g")
        if length is None or length.shape != (tensor.shape[0], *(1,) * (tensor.dim() - 1)):
            raise CheckpointError(
                f"{source}: {name} {list(tensor.shape)} has no matching {start}_g beside it; "
                "copy it again"
            )
        direction = tensor.float()
        norm = direction.flatten(1).norm(dim=1).view(length.shape)
        found[start] = length.float() * direction / norm
    return found


def make_positions(embeddings: nn.Module) -> None:
    """Make the constant tensors of a BERT that was made on the meta device.

    Args:
        embeddings: those of a BERT or RoBERTa of transformers.
    """
    length = embeddings.get_parameter("position_embeddings.weight").shape[0]
    positions = torch.arange(length)[None]
    values = {"position_ids": positions, "token_type_ids": torch.zeros_like(positions)}
    for name, value in values.items():
        buffer = getattr(embeddings, name, None)
        if buffer is not None and buffer.is_meta:
            is_stored = name not in embeddings._non_persistent_buffers_set
            embeddings.register_buffer(name, value, persistent=is_stored)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one mapping; nothing but plain values.

    Raises:
        MissingComponentError: if there is no such file.
        CheckpointError: if it is not a yaml mapping, or asks for objects.
    """
    # only this needs it; it is installed with transformers
    import yaml  # type: ignore[import-untyped]

    if not path.is_file():
        raise MissingComponentError(f"{path}: missing; copy it beside the weights")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        text = " ".join(str(error).split())
        raise CheckpointError(f"{path}: cannot be read as YAML ({text}); copy it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a mapping, got {type(content).__name__}")
    return content


def tokenizer_places(folder: Path, name: str, given: str | Path | None) -> list[Path]:
    """Where a tokenizer may be: beside the weights, or in the hub's cache; nothing is downloaded.

    Args:
        folder: of the weights.
        name: on the hub.
        given: a folder that someone named, which is the only place then.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if given is not None:
        return [Path(given)]
    try:
        cached = try_to_load_from_cache(name, "tokenizer_config.json")
    except HFValidationError:  # a path, not a name of the hub
        cached = None
    beside = folder / Path(name).name
    return [beside, Path(cached).parent] if isinstance(cached, str) else [beside]


def load_tokenizer(folders: Sequence[Path], what: str, class_name: str = "AutoTokenizer") -> Any:
    """Load the tokenizer from the first of several folders that has one.

    Args:
        folders: where its files may be.
        what: its public name, for messages.
        class_name: its class in transformers, where the files may not say it.

    Raises:
        MissingComponentError: if its files are in none of them.
        CheckpointError: if it cannot be loaded.
    """
    import transformers

    folder = next((f for f in folders if any((f / v).is_file() for v in _VOCABULARIES)), None)
    if folder is None:
        places = " or ".join(str(place) for place in folders)
        raise MissingComponentError(
            f"no tokenizer in {places} (a {', '.join(_VOCABULARIES)}); download {what} into the "
            "folder, or name another (tokenizer=, --tokenizer)"
        )
    try:
        return getattr(transformers, class_name).from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    # by its class, and by what is broken, a tokenizer raises any of these
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: cannot load the tokenizer ({error})") from error


def check_vocabulary(tokenizer: Any, size: int, source: str) -> None:
    """Refuse a tokenizer of another text encoder.

    Args:
        tokenizer: any.
        size: tokens that the text encoder knows.
        source: file of the text encoder, for messages.

    Raises:
        CheckpointError: if there are tokens that the text encoder does not know.
    """
    if len(tokenizer) > size:
        raise CheckpointError(
            f"{source}: its text encoder knows {size} tokens, the tokenizer has {len(tokenizer)}; "
            "it is another model's"
        )
