"""Which family a model is of: a loaded one, or a folder."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ptq4adm.errors import ConfigError, MissingComponentError, UnsupportedModelError
from ptq4adm.models.adapter import PipelineAdapter
from ptq4adm.models.audioldm import AudioLDM
from ptq4adm.models.audioldm2 import AudioLDM2
from ptq4adm.models.components import INDEX_FILE, check_device, read_index
from ptq4adm.models.make_an_audio import MakeAnAudio
from ptq4adm.models.original import has_checkpoint
from ptq4adm.models.pipeline import TextToAudioPipeline
from ptq4adm.models.tango import Tango
from ptq4adm.models.unet2d import UNet2DAdapter
from ptq4adm.protocols import DenoiserAdapter

logger = logging.getLogger(__name__)

_AUDIOLDM2_UNET = "AudioLDM2UNet2DConditionModel"

FAMILIES: tuple[type[TextToAudioPipeline], ...] = (AudioLDM, AudioLDM2, Tango, MakeAnAudio)


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
        "a diffusers AudioLDMPipeline or AudioLDM2Pipeline, or a UNet2DConditionModel; for other "
        "modules pass adapter=ptq4adm.ModuleAdapter(), and single layers can be replaced with "
        "ptq4adm.W4A8Linear.from_float and ptq4adm.W4A8Conv2d.from_float"
    )


@dataclass(frozen=True)
class Recognized:
    """What a path on disk is.

    Attributes:
        path: a folder or file.
        pipeline_class: the family's pipeline.
        is_original: whether it is in the family's own published layout, not in diffusers'.
    """

    path: Path
    pipeline_class: type[TextToAudioPipeline]
    is_original: bool

    def __str__(self) -> str:
        layout = "the original layout" if self.is_original else "diffusers' layout"
        return f"{self.path}: {self.pipeline_class.family} in {layout}"


def recognize(path: str | Path) -> Recognized:
    """Find the family of a model on disk, by its index or by the names of its tensors.

    Raises:
        MissingComponentError: if there is nothing, or no file that says what it is.
        CheckpointError: if the index or the checkpoint is broken; see its children.
        UnsupportedModelError: if it is of no family that is known.
    """
    path = Path(path)
    if not (path / INDEX_FILE).is_file():
        for family in FAMILIES:
            if family.is_original(path):
                return Recognized(path, family, is_original=True)
        if path.is_file() or has_checkpoint(path):
            raise UnsupportedModelError(
                f"{path}: the original layout of no family that is known here; expected one of "
                f"{', '.join(family.family for family in FAMILIES)}"
            )
    name = read_index(path).get("_class_name")
    for family in FAMILIES:
        if family.index_class == name:
            return Recognized(path, family, is_original=False)
    raise UnsupportedModelError(
        f"{path / INDEX_FILE}: a {name!r} is of no family that is known here; expected one of "
        f"{', '.join(family.index_class for family in FAMILIES)}"
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
    check_device(device)
    found = recognize(path)
    logger.info("%s", found)
    _check_options(found, original)
    if found.is_original:
        load = found.pipeline_class.from_original
        return load(found.path, dtype=dtype, **original).to(device)
    return found.pipeline_class.from_folder(found.path, device=device, dtype=dtype, backend=backend)


def _check_options(found: Recognized, options: Mapping[str, Any]) -> None:
    """Refuse what the files at hand do not need to be told."""
    known = inspect.signature(found.pipeline_class.from_original).parameters
    unknown = [name for name in options if not found.is_original or name not in known]
    if unknown:
        raise ConfigError(
            f"{', '.join(unknown)}: not for {found}; leave it out, or give the original files"
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
