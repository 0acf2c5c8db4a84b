"""Which family a model is of: a loaded one, or a folder."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ptq4adm.errors import (
    CheckpointError,
    ConfigError,
    MissingComponentError,
    UnsupportedModelError,
)
from ptq4adm.models import make_an_audio_files, openai_unet
from ptq4adm.models.adapter import PipelineAdapter
from ptq4adm.models.audioldm import AudioLDM
from ptq4adm.models.components import COMPONENTS, INDEX_FILE, read_index
from ptq4adm.models.make_an_audio import MakeAnAudio
from ptq4adm.models.original import STATE_ENTRY, find_checkpoint, has_checkpoint
from ptq4adm.models.pickled import few, read_tensors
from ptq4adm.models.pipeline import TextToAudioPipeline
from ptq4adm.models.unet2d import UNet2DAdapter
from ptq4adm.protocols import DenoiserAdapter

logger = logging.getLogger(__name__)

FAMILIES: tuple[type[TextToAudioPipeline], ...] = (AudioLDM, MakeAnAudio)


def find_adapter(pipe: Any) -> DenoiserAdapter:
    """Find the adapter of a model.

    Args:
        pipe: a `TextToAudioPipeline`, a `diffusers.AudioLDMPipeline`, or a bare
            `UNet2DConditionModel`.

    Raises:
        MissingComponentError: if it has a UNet of a family, but not every other component.
        UnsupportedModelError: if it is something else.
    """
    if isinstance(pipe, TextToAudioPipeline):
        return PipelineAdapter(type(pipe))
    if _is_unet(pipe):
        return UNet2DAdapter()
    if _is_unet(getattr(pipe, "unet", None)):
        missing = [name for name in COMPONENTS if getattr(pipe, name, None) is None]
        if missing:
            raise MissingComponentError(
                f"{type(pipe).__name__} has no {', '.join(missing)}: a text-to-audio pipeline "
                f"needs {', '.join(COMPONENTS)}; to quantize its UNet alone, pass pipe.unet"
            )
        if getattr(pipe.unet.config, "class_embed_type", None) is not None:
            return PipelineAdapter(AudioLDM)
    raise UnsupportedModelError(
        f"{type(pipe).__name__} is not a supported model: expected a ptq4adm TextToAudioPipeline, "
        "a diffusers AudioLDMPipeline or a UNet2DConditionModel; single layers of other models can "
        "be replaced with ptq4adm.W4A8Linear.from_float and ptq4adm.W4A8Conv2d.from_float"
    )


def load_pipeline(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    **original: Any,
) -> TextToAudioPipeline:
    """Read a pipeline of any family; see `ptq4adm.load_pipeline`."""
    path = Path(path)
    family = _original_family(path)
    if family is not None:
        logger.info("%s: %s, in its original layout", path, family.family)
        _check_options(family, original)
        return family.from_original(path, device=device, dtype=dtype, **original)
    name = read_index(path).get("_class_name")
    if original:
        raise ConfigError(
            f"{', '.join(original)}: only for files in their original layout; {path} is a folder "
            "in diffusers' layout, which says it itself"
        )
    for family in FAMILIES:
        if family.index_class == name:
            logger.info("%s: %s, in diffusers' layout", path, family.family)
            return family.from_folder(path, device=device, dtype=dtype, backend=backend)
    raise UnsupportedModelError(
        f"{path / INDEX_FILE}: a {name!r} is of no family that is known here; expected one of "
        f"{', '.join(family.index_class for family in FAMILIES)}"
    )


def _original_family(path: Path) -> Any:
    """The family whose own files these are; None if it is a folder in diffusers' layout, or none.

    Raises:
        CheckpointError: if a checkpoint is broken, or of no family that is known.
    """
    if (path / INDEX_FILE).is_file() or not (path.is_file() or has_checkpoint(path)):
        return None
    checkpoint = find_checkpoint(path)
    names = read_tensors(checkpoint, STATE_ENTRY).keys()
    if any(name.startswith(make_an_audio_files.TEXT_PREFIX) for name in names):
        return MakeAnAudio
    if f"{openai_unet.PREFIX}film_emb.weight" in names:
        return AudioLDM
    raise CheckpointError(
        f"{checkpoint}: is no checkpoint of a known family: it holds {few(names)}; expected "
        "Make-An-Audio's or AudioLDM's original layout"
    )


def _check_options(family: Any, options: Mapping[str, Any]) -> None:
    known = inspect.signature(family.from_original).parameters
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ConfigError(
            f"{', '.join(unknown)}: unknown for the original layout of {family.family}"
        )


def _is_unet(module: Any) -> bool:
    # without this guard, a question about a plain module would import diffusers
    if "diffusers" not in sys.modules:
        return False
    from diffusers import UNet2DConditionModel

    return isinstance(module, UNet2DConditionModel)
