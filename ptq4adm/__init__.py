"""ptq4adm: post-training W4A8 quantization of text-to-audio diffusion models.

The names below are the public API. They are imported on first use, so that ``import ptq4adm``
costs little and works where an optional part (an audio library, a compiled kernel) is missing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ptq4adm.calibration import Calibration
    from ptq4adm.config import QuantConfig, Scheme
    from ptq4adm.errors import Ptq4admError
    from ptq4adm.models import shipped_pipeline_path
    from ptq4adm.models.pipeline import TextToAudioPipeline
    from ptq4adm.nn import W4A8Conv2d, W4A8Linear, W8A8Conv2d, W8A8Linear
    from ptq4adm.prompts import augment_prompts
    from ptq4adm.quantization import (
        QuantPlan,
        calibrate,
        load_pipeline,
        plan,
        quantize,
        save_pipeline,
    )

_HOME = {
    "Calibration": "ptq4adm.calibration",
    "calibrate": "ptq4adm.quantization",
    "QuantConfig": "ptq4adm.config",
    "Scheme": "ptq4adm.config",
    "Ptq4admError": "ptq4adm.errors",
    "shipped_pipeline_path": "ptq4adm.models",
    "TextToAudioPipeline": "ptq4adm.models.pipeline",
    "W4A8Conv2d": "ptq4adm.nn",
    "W4A8Linear": "ptq4adm.nn",
    "W8A8Conv2d": "ptq4adm.nn",
    "W8A8Linear": "ptq4adm.nn",
    "augment_prompts": "ptq4adm.prompts",
    "QuantPlan": "ptq4adm.quantization",
    "load_pipeline": "ptq4adm.quantization",
    "plan": "ptq4adm.quantization",
    "quantize": "ptq4adm.quantization",
    "save_pipeline": "ptq4adm.quantization",
}

__all__ = [
    "Calibration",
    "Ptq4admError",
    "QuantConfig",
    "QuantPlan",
    "Scheme",
    "TextToAudioPipeline",
    "W4A8Conv2d",
    "W4A8Linear",
    "W8A8Conv2d",
    "W8A8Linear",
    "__version__",
    "augment_prompts",
    "calibrate",
    "load_pipeline",
    "plan",
    "quantize",
    "save_pipeline",
    "shipped_pipeline_path",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ptq4adm' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
