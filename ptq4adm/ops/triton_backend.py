"""Backend ``triton``: whether it can run, and its functions, imported when first called.

Triton is optional and takes half a second to import, so nothing of it is imported before a layer
asks for this backend.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch

from ptq4adm.ops.lazy import lazy_function


@cache
def import_reason() -> str | None:
    """Return why Triton cannot be imported and what to do, or None if it can."""
    try:
        import_module("ptq4adm.kernels.launch")
    except ImportError as error:
        if (error.name or "").split(".")[0] != "triton":
            raise  # a fault of this package
        return f"triton cannot be imported ({error}); run `pip install 'ptq4adm[gpu]'`"
    return None


def unavailable_reason(device_type: str) -> str | None:
    """Return why the kernels cannot run on a kind of device and what to do, or None if they can."""
    reason: str | None = import_reason()
    if reason is None:
        reason = import_module("ptq4adm.kernels.launch").unavailable_reason(
            torch.device(device_type)
        )
    return reason


def describe(device_type: str) -> str:
    """Return what the kernels run on, given that they can."""
    launch = import_module("ptq4adm.kernels.launch")
    version = import_module("triton").__version__
    if launch.IS_INTERPRETED:
        return f"triton {version}, interpreted on the CPU: for tests, very slow"
    device = torch.device(device_type)
    return (
        f"triton {version} on {launch.device_name(device)} (compute capability "
        f"{launch.capability(device) / 10}, {launch.multiprocessors(device)} multiprocessors)"
    )


def function(module: str, name: str) -> Callable[..., Any]:
    """Return a function of ``ptq4adm.ops.<module>`` that imports it when it is called."""
    return lazy_function("triton", import_reason, module, name)
