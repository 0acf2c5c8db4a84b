"""The package inside other libraries: diffusers' `quantization_config`, its folders, model cards.

diffusers knows a quantization method when it is in two of its dictionaries. `register_on_import`
puts it there, whichever of the two packages is imported first, and imports nothing itself.
"""

from __future__ import annotations

import importlib
import logging
import sys

from ptq4adm.config import METHOD
from ptq4adm.integrations.on_import import call_after_import

__all__ = ["register", "register_on_import"]

logger = logging.getLogger(__name__)

_REGISTRY = "diffusers.quantizers.auto"
_CONFIG, _QUANTIZER = "ptq4adm.integrations.config", "ptq4adm.integrations.quantizer"


def register_on_import() -> None:
    """Make diffusers know `quant_method: "ptq4adm"` now, or as soon as it is imported."""
    call_after_import(_REGISTRY, _register_quietly)


def register() -> None:
    """Make diffusers know `quant_method: "ptq4adm"`; imports diffusers.

    Raises:
        ImportError: if the installed diffusers has no such registry.
    """
    registry = importlib.import_module(_REGISTRY)
    home = importlib.import_module(_QUANTIZER)
    registry.AUTO_QUANTIZER_MAPPING[METHOD] = home.PTQ4ADMQuantizer
    registry.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = home.PTQ4ADMConfig


def _register_quietly() -> None:
    # they import diffusers, which is how this may be called: they register at their end
    if _is_being_imported(_CONFIG) or _is_being_imported(_QUANTIZER):
        return
    try:
        register()
    except (ImportError, AttributeError) as error:
        # importing diffusers must not fail because of this package
        logger.warning(
            "diffusers does not know the method %r (%s): its from_pretrained will refuse such "
            "folders; ptq4adm.load_pipeline reads them",
            METHOD,
            error,
        )


def _is_being_imported(name: str) -> bool:
    module = sys.modules.get(name)
    return module is not None and bool(getattr(module.__spec__, "_initializing", False))
