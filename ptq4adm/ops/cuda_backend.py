"""Backend ``cuda``: whether it can run, and its functions, imported when first called.

Its matrix products are compiled kernels (``csrc/cuda``, in the module ``ptq4adm._cuda``); its
quantizers and its attention are Triton's. Loading the module touches no GPU; asking what it can run
on does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

from ptq4adm.errors import BackendUnavailableError
from ptq4adm.ops import triton_backend
from ptq4adm.ops.lazy import lazy_function

OLDEST_CAPABILITY = (8, 0)
_INSTEAD = "use backend='triton', 'cpu' or 'reference'"


@cache
def _import() -> ModuleType | ImportError:
    try:
        return import_module("ptq4adm._cuda")
    except ImportError as error:
        return error


def module() -> ModuleType:
    """Return the compiled module.

    Raises:
        BackendUnavailableError: if it cannot be imported.
    """
    found = _import()
    if isinstance(found, ImportError):
        raise BackendUnavailableError(f"backend 'cuda' is not available: {import_reason()}")
    return found


def import_reason() -> str | None:
    """Return why the functions cannot be imported and what to do, or None if they can."""
    found = _import()
    if isinstance(found, ImportError):
        return (
            f"the compiled module ptq4adm._cuda cannot be imported ({found}); reinstall with "
            f"PTQ4ADM_BUILD=cuda, which needs nvcc, or {_INSTEAD}"
        )
    reason = triton_backend.import_reason()
    if reason is not None:
        return f"its quantizers are Triton's, and {reason}"
    return None


def unavailable_reason(device_type: str) -> str | None:
    """Return why the kernels cannot run on a kind of device and what to do, or None if they can."""
    reason = import_reason() or _machine_reason()
    if reason is not None:
        return reason
    if device_type != "cuda":
        return (
            f"CUDA kernels run on CUDA devices, not on {device_type!r}; move the model to a GPU, "
            f"or {_INSTEAD}"
        )
    if not torch.cuda.is_available():
        return (
            "CUDA finds a GPU, but this torch does not (torch.cuda.is_available() is False); "
            f"install a torch with CUDA, or {_INSTEAD}"
        )
    return _device_reason(torch.cuda.current_device()) or triton_backend.unavailable_reason("cuda")


@cache
def sm90a_reason(device: int) -> str | None:
    """Return why kernels of the family ``sm90a`` cannot run on a GPU, or None if they can.

    Args:
        device: the GPU's number.
    """
    compiled = module()
    info = compiled.device_info(device)
    if (info.major, info.minor) != (9, 0):
        return (
            f"{info.name} has compute capability {info.major}.{info.minor}, and its instructions "
            "are those of 9.0 alone"
        )
    if not compiled.matmul_sm90a_tiles():
        return (
            f"the module is built for {compiled.archs()}; reinstall with PTQ4ADM_BUILD=cuda "
            "PTQ4ADM_CUDA_ARCHS=90a"
        )
    return None


def describe(device_type: str) -> str:
    """Return what the kernels run on, given that they can."""
    compiled = module()
    info = compiled.device_info(torch.device(device_type).index or torch.cuda.current_device())
    return (
        f"built for {compiled.archs()}, on {info.name} (compute capability "
        f"{info.major}.{info.minor}, {info.multiprocessors} multiprocessors, "
        f"{info.shared_bytes_per_block // 1024} KiB shared memory a block)"
    )


def function(module_name: str, name: str) -> Callable[..., Any]:
    """Return a function of ``ptq4adm.ops.<module_name>`` that imports it when it is called."""
    return lazy_function("cuda", import_reason, module_name, name)


@cache
def _machine_reason() -> str | None:
    """Why no GPU of this machine can be used, in CUDA's words."""
    compiled = module()
    try:
        compiled.device_count()
    except compiled.CudaError as error:
        needed, present = (
            f"{version // 1000}.{version % 1000 // 10}"
            for version in (compiled.runtime_version(), compiled.driver_version())
        )
        driver = "there is no NVIDIA driver" if present == "0.0" else f"the driver is for {present}"
        return f"{error}; the module is built with CUDA {needed}, {driver}; {_INSTEAD}"
    return None


@cache
def _device_reason(device: int) -> str | None:
    """Why one GPU cannot run the kernels."""
    compiled = module()
    try:
        info = compiled.device_info(device)
        capability = f"{info.name} has compute capability {info.major}.{info.minor}"
        if (info.major, info.minor) < OLDEST_CAPABILITY:
            oldest = ".".join(map(str, OLDEST_CAPABILITY))
            return f"{capability}; the kernels need {oldest} or newer; use backend='reference'"
        if not compiled.has_code_for(device):
            return (
                f"{capability}, and the module is built for {compiled.archs()}; reinstall with "
                f"PTQ4ADM_BUILD=cuda PTQ4ADM_CUDA_ARCHS={info.major}{info.minor}, or {_INSTEAD}"
            )
    except compiled.CudaError as error:
        return f"{error}; {_INSTEAD}"
    return None
