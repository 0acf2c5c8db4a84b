"""The compiled module ``ptq4adm._cpu``: whether it is there, and the errors around its calls."""

from __future__ import annotations

from torch import Tensor

from ptq4adm.errors import BackendUnavailableError, NonFiniteError

try:
    from ptq4adm import _cpu as module
except ImportError as _error:
    _IMPORT_ERROR: ImportError | None = _error
else:
    _IMPORT_ERROR = None

__all__ = ["check_available", "check_finite", "module", "unavailable_reason"]


def unavailable_reason() -> str | None:
    """Return why the compiled module cannot run and what to do, or None if it can."""
    if _IMPORT_ERROR is None:
        return None
    return (
        f"the compiled module ptq4adm._cpu cannot be imported ({_IMPORT_ERROR}); install a C++ "
        "compiler and reinstall with PTQ4ADM_BUILD=cpu, or use backend='reference'"
    )


def check_available(x: Tensor) -> None:
    """Check that the compiled module is there and that it can read the tensor.

    Raises:
        BackendUnavailableError: if not.
    """
    if _IMPORT_ERROR is not None:
        raise BackendUnavailableError(f"backend 'cpu' is not available: {unavailable_reason()}")
    if not x.is_cpu:
        raise BackendUnavailableError(
            f"backend 'cpu' was given tensors on {x.device}; move them to the CPU or use "
            "backend='reference'"
        )


def check_finite(is_finite: bool) -> None:
    """Check what a kernel found out about its input.

    Raises:
        NonFiniteError: if it was not finite.
    """
    if not is_finite:
        raise NonFiniteError(
            "activations hold NaN or infinity, which int8 cannot; look for an overflow in float16 "
            "or for broken weights before this layer"
        )
