"""Model families: what is quantized, what stays float and why, how runs are made."""

from __future__ import annotations

import importlib.resources
import sys
from pathlib import Path
from typing import Any

from ptq4adm.errors import MissingComponentError, UnsupportedModelError
from ptq4adm.models.audioldm import AudioLDMAdapter, real_unet
from ptq4adm.models.components import COMPONENTS, INDEX_FILE, save_components
from ptq4adm.models.make_an_audio import make_an_audio_unet
from ptq4adm.models.pipeline import TextToAudioPipeline
from ptq4adm.models.tango import tango_unet
from ptq4adm.models.unet2d import UNet2DAdapter
from ptq4adm.protocols import DenoiserAdapter

__all__ = [
    "AudioLDMAdapter",
    "TextToAudioPipeline",
    "UNet2DAdapter",
    "find_adapter",
    "make_an_audio_unet",
    "real_unet",
    "save_components",
    "shipped_pipeline_path",
    "tango_unet",
]

_SHIPPED = "audioldm-tiny"


def find_adapter(pipe: Any) -> DenoiserAdapter:
    """Find the adapter of a model.

    Args:
        pipe: a `TextToAudioPipeline`, a `diffusers.AudioLDMPipeline`, or a bare
            `UNet2DConditionModel`.

    Raises:
        MissingComponentError: if it has a UNet of the family, but not every other component.
        UnsupportedModelError: if it is something else.
    """
    if _is_unet(pipe):
        return UNet2DAdapter()
    if _is_unet(getattr(pipe, "unet", None)):
        missing = [name for name in COMPONENTS if getattr(pipe, name, None) is None]
        if missing:
            raise MissingComponentError(
                f"{type(pipe).__name__} has no {', '.join(missing)}: a text-to-audio pipeline "
                "needs "
                f"{', '.join(COMPONENTS)}; to quantize its UNet alone, pass pipe.unet"
            )
        if getattr(pipe.unet.config, "class_embed_type", None) is not None:
            return AudioLDMAdapter()
    raise UnsupportedModelError(
        f"{type(pipe).__name__} is not a supported model: expected a ptq4adm TextToAudioPipeline, "
        "a diffusers "
        "AudioLDMPipeline or a UNet2DConditionModel; single layers of other models can be "
        "replaced with "
        "ptq4adm.W4A8Linear.from_float and ptq4adm.W4A8Conv2d.from_float"
    )


def shipped_pipeline_path() -> Path:
    """Folder of the small trained pipeline that is installed with the package.

    Raises:
        MissingComponentError: if this installation lacks it.
    """
    folder = Path(str(importlib.resources.files("ptq4adm.assets"))) / _SHIPPED
    if not (folder / INDEX_FILE).is_file():
        raise MissingComponentError(
            f"the shipped pipeline is not installed (no {folder / INDEX_FILE}); reinstall "
            "ptq4adm, or name the "
            "folder of another pipeline"
        )
    return folder


def _is_unet(module: Any) -> bool:
    # without this guard, a question about a plain module would import diffusers
    if "diffusers" not in sys.modules:
        return False
    from diffusers import UNet2DConditionModel

    return isinstance(module, UNet2DConditionModel)
