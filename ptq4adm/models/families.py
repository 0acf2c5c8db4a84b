"""Which family a model is of: a loaded one, or a folder."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import torch

from ptq4adm.errors import MissingComponentError, UnsupportedModelError
from ptq4adm.models.adapter import PipelineAdapter
from ptq4adm.models.audioldm import AudioLDM
from ptq4adm.models.audioldm2 import AudioLDM2
from ptq4adm.models.components import INDEX_FILE, read_index
from ptq4adm.models.pipeline import TextToAudioPipeline
from ptq4adm.models.unet2d import UNet2DAdapter
from ptq4adm.protocols import DenoiserAdapter

logger = logging.getLogger(__name__)

_AUDIOLDM2_UNET = "AudioLDM2UNet2DConditionModel"

FAMILIES: tuple[type[TextToAudioPipeline], ...] = (AudioLDM, AudioLDM2)


def find_adapter(pipe: Any) -> DenoiserAdapter:
    """Find the adapter of a model.

    Args:
        pipe: a `TextToAudioPipeline`, a `diffusers.AudioLDMPipeline` or `AudioLDM2Pipeline`, or a
            bare UNet of theirs.

    Raises:
        MissingComponentError: if it has a UNet of a family, but not every other component.
        UnsupportedModelError: if it is something else.
    """
    if isinstance(pipe, TextToAudioPipeline):
        return PipelineAdapter(type(pipe))
    if _is_unet(pipe):
        return UNet2DAdapter()
    if _is_unet(getattr(pipe, "unet", None)):
        is_second = type(pipe.unet).__name__ == _AUDIOLDM2_UNET
        family: type[TextToAudioPipeline] = AudioLDM2 if is_second else AudioLDM
        names = family.component_names
        missing = [name for name in names if getattr(pipe, name, None) is None]
        if missing:
            raise MissingComponentError(
                f"{type(pipe).__name__} has no {', '.join(missing)}: a text-to-audio pipeline "
                f"needs {', '.join(names)}; to quantize its UNet alone, pass pipe.unet"
            )
        if is_second or getattr(pipe.unet.config, "class_embed_type", None) is not None:
            return PipelineAdapter(family)
    raise UnsupportedModelError(
        f"{type(pipe).__name__} is not a supported model: expected a ptq4adm TextToAudioPipeline, "
        "a diffusers AudioLDMPipeline or AudioLDM2Pipeline, or a UNet2DConditionModel; single "
        "layers of other models can be replaced with ptq4adm.W4A8Linear.from_float and "
        "ptq4adm.W4A8Conv2d.from_float"
    )


def load_pipeline(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> TextToAudioPipeline:
    """Read a pipeline folder of any family; see `ptq4adm.load_pipeline`."""
    folder = Path(path)
    name = read_index(folder).get("_class_name")
    for family in FAMILIES:
        if family.index_class == name:
            logger.info("%s: %s, in diffusers' layout", folder, family.family)
            return family.from_folder(folder, device=device, dtype=dtype, backend=backend)
    raise UnsupportedModelError(
        f"{folder / INDEX_FILE}: a {name!r} is of no family that is known here; expected one of "
        f"{', '.join(family.index_class for family in FAMILIES)}"
    )


def _is_unet(module: Any) -> bool:
    # without this guard, a question about a plain module would import diffusers
    if "diffusers" not in sys.modules:
        return False
    from diffusers import UNet2DConditionModel

    if isinstance(module, UNet2DConditionModel):
        return True
    # a model of a module that was never imported cannot be here
    audioldm2 = sys.modules.get("diffusers.pipelines.audioldm2.modeling_audioldm2")
    return audioldm2 is not None and isinstance(module, getattr(audioldm2, _AUDIOLDM2_UNET))
