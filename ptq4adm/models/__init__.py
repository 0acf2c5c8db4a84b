"""Model families: what is quantized, what stays float and why, how runs are made."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from ptq4adm.errors import MissingComponentError
from ptq4adm.models.adapter import PipelineAdapter
from ptq4adm.models.audioldm import AudioLDM, real_unet
from ptq4adm.models.audioldm2 import AudioLDM2, audioldm2_unet
from ptq4adm.models.components import INDEX_FILE, save_components
from ptq4adm.models.conditioning import Conditioning
from ptq4adm.models.families import find_adapter
from ptq4adm.models.make_an_audio import MakeAnAudio, make_an_audio_unet
from ptq4adm.models.module import ModuleAdapter
from ptq4adm.models.pipeline import TextToAudioPipeline
from ptq4adm.models.tango import Tango, tango_unet
from ptq4adm.models.unet2d import UNet2DAdapter

__all__ = [
    "AudioLDM",
    "AudioLDM2",
    "Conditioning",
    "MakeAnAudio",
    "ModuleAdapter",
    "PipelineAdapter",
    "Tango",
    "TextToAudioPipeline",
    "UNet2DAdapter",
    "audioldm2_unet",
    "find_adapter",
    "make_an_audio_unet",
    "real_unet",
    "save_components",
    "shipped_pipeline_path",
    "tango_unet",
]

_SHIPPED = "audioldm-tiny"


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
