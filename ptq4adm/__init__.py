"""ptq4adm: post-training W4A8 quantization of text-to-audio diffusion models.

The names below are the public API. They are imported on first use, so that ``import ptq4adm``
costs little and works where an optional part (an audio library, a compiled kernel) is missing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ptq4adm.integrations import register_on_import

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ptq4adm.balancing import balance
    from ptq4adm.calibration import Calibration
    from ptq4adm.config import QuantConfig, Scheme
    from ptq4adm.correcting import fit_correction
    from ptq4adm.errors import Ptq4admError
    from ptq4adm.floating import use_float_where_faster
    from ptq4adm.integrations.config import PTQ4ADMConfig
    from ptq4adm.integrations.model_card import model_card
    from ptq4adm.integrations.processes import calibrate_in_processes, generate_in_processes
    from ptq4adm.integrations.quantizer import PTQ4ADMQuantizer
    from ptq4adm.models import ModuleAdapter, shipped_pipeline_path
    from ptq4adm.models.pipeline import TextToAudioPipeline
    from ptq4adm.nn import W4A8Conv2d, W4A8Linear, W8A8Conv2d, W8A8Linear, set_backend
    from ptq4adm.packing.description import dequantize
    from ptq4adm.prompts import augment_prompts
    from ptq4adm.quantization import (
        QuantPlan,
        calibrate,
        load_pipeline,
        plan,
        quantize,
        save_pipeline,
    )
    from ptq4adm.sensitivity import Sensitivity, assign_schemes, measure_sensitivity

_HOME = {
    "balance": "ptq4adm.balancing",
    "Calibration": "ptq4adm.calibration",
    "calibrate": "ptq4adm.quantization",
    "QuantConfig": "ptq4adm.config",
    "Scheme": "ptq4adm.config",
    "Ptq4admError": "ptq4adm.errors",
    "fit_correction": "ptq4adm.correcting",
    "PTQ4ADMConfig": "ptq4adm.integrations.config",
    "PTQ4ADMQuantizer": "ptq4adm.integrations.quantizer",
    "calibrate_in_processes": "ptq4adm.integrations.processes",
    "generate_in_processes": "ptq4adm.integrations.processes",
    "model_card": "ptq4adm.integrations.model_card",
    "ModuleAdapter": "ptq4adm.models",
    "shipped_pipeline_path": "ptq4adm.models",
    "TextToAudioPipeline": "ptq4adm.models.pipeline",
    "W4A8Conv2d": "ptq4adm.nn",
    "W4A8Linear": "ptq4adm.nn",
    "W8A8Conv2d": "ptq4adm.nn",
    "W8A8Linear": "ptq4adm.nn",
    "set_backend": "ptq4adm.nn",
    "dequantize": "ptq4adm.packing.description",
    "augment_prompts": "ptq4adm.prompts",
    "QuantPlan": "ptq4adm.quantization",
    "load_pipeline": "ptq4adm.quantization",
    "plan": "ptq4adm.quantization",
    "quantize": "ptq4adm.quantization",
    "save_pipeline": "ptq4adm.quantization",
    "Sensitivity": "ptq4adm.sensitivity",
    "assign_schemes": "ptq4adm.sensitivity",
    "measure_sensitivity": "ptq4adm.sensitivity",
    "use_float_where_faster": "ptq4adm.floating",
}

__all__ = [
    "Calibration",
    "ModuleAdapter",
    "PTQ4ADMConfig",
    "PTQ4ADMQuantizer",
    "Ptq4admError",
    "QuantConfig",
    "QuantPlan",
    "Scheme",
    "Sensitivity",
    "TextToAudioPipeline",
    "W4A8Conv2d",
    "W4A8Linear",
    "W8A8Conv2d",
    "W8A8Linear",
    "__version__",
    "assign_schemes",
    "augment_prompts",
    "balance",
    "calibrate",
    "calibrate_in_processes",
    "dequantize",
    "fit_correction",
    "generate_in_processes",
    "load_pipeline",
    "measure_sensitivity",
    "model_card",
    "plan",
    "quantize",
    "save_pipeline",
    "set_backend",
    "shipped_pipeline_path",
    "use_float_where_faster",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ptq4adm' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


register_on_import()
