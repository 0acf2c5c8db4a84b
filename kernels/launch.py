"""How a kernel is launched: on a GPU, in Triton's interpreter, or compiled for a GPU not at hand.

Owns what depends on the machine and nothing else: every launcher goes through ``launch``, so that
the compile-only checks see the very specializations that a GPU would run. Nothing is queried when
this module is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from ptq4adm.errors import BackendUnavailableError

# decided where triton.jit decorates, so it cannot change later
IS_INTERPRETED = bool(triton.knobs.runtime.interpret)
OLDEST_CAPABILITY = 80  # int8 mma.m16n8k32 and cp.async
LANES = 32  # threads of a warp


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel that was compiled and not run.

    Attributes:
        name: of the Python function.
        grid: programs, up to three axes.
        options: keyword arguments of the launch that are no tensors: tile, warps, stages.
        kernel: Triton's object, with ``asm`` and ``metadata``.
    """

    name: str
    grid: tuple[int, ...]
    options: dict[str, Any]
    kernel: Any


@dataclass
class OfflineTarget:
    """A GPU that is compiled for, and what was compiled.

    Attributes:
        capability: 10 * major + minor.
        multiprocessors: how many the launchers are to plan for.
        compiled: the launches, in order.
    """

    capability: int
    multiprocessors: int
    compiled: list[CompiledKernel] = field(default_factory=list)


class _OfflineDriver:
    """What Triton asks its driver while it compiles."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, LANES)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch  # the key of Triton's caches

    def get_current_stream(self, device: int) -> int:  # noqa: ARG002 - Triton's signature
        return 0


_offline: OfflineTarget | None = None


@contextmanager
def compile_only(capability: int, multiprocessors: int = 108) -> Iterator[OfflineTarget]:
    """Compile for a GPU what is launched inside, from CPU tensors, and run nothing.

    Outputs stay uninitialized. Not thread-safe: for tests and inspection.

    Args:
        capability: 80, 86, 89 or 90.
        multiprocessors: of that GPU; an A100 has 108.

    Yields:
        The target, which collects what was compiled.

    Raises:
        BackendUnavailableError: if Triton interprets kernels in this process.
    """
    global _offline
    if IS_INTERPRETED:
        raise BackendUnavailableError(
            "kernels cannot be compiled in a process with TRITON_INTERPRET=1; unset it"
        )
    before, previous = driver._active, _offline
    driver.set_active(_OfflineDriver(capability))
    _offline = OfflineTarget(capability, multiprocessors)
    try:
        yield _offline
    finally:
        driver._active, _offline = before, previous


def unavailable_reason(device: torch.device) -> str | None:
    """Return why kernels cannot run on a device and what to do, or None if they can."""
    if _offline is not None:
        return None
    if IS_INTERPRETED:
        if device.type == "cpu":
            return None
        return "kernels are interpreted on the CPU (TRITON_INTERPRET=1); unset it to use the GPU"
    if device.type != "cuda":
        return (
            f"Triton kernels run on CUDA devices, not on {device.type!r}; move the model to a GPU, "
            "or set TRITON_INTERPRET=1 before Python starts to interpret them (slow, for tests)"
        )
    return _gpu_reason(device)


@cache
def _gpu_reason(device: torch.device) -> str | None:
    """Why a GPU cannot run the kernels; asked once, as every operator would."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device; use backend='cpu' or 'reference'"
    found = capability(device)
    if found < OLDEST_CAPABILITY:
        return (
            f"{torch.cuda.get_device_name(device)} has compute capability {found / 10}; the "
            f"kernels need {OLDEST_CAPABILITY / 10} or newer; use backend='reference'"
        )
    return None


def capability(device: torch.device) -> int:
    """Return 10 * major + minor of the GPU that runs or is compiled for; 0 if interpreted."""
    if _offline is not None:
        return _offline.capability
    return 0 if IS_INTERPRETED else _properties(device)[0]


def multiprocessors(device: torch.device) -> int:
    """Return how many streaming multiprocessors a launcher plans for; 4 if interpreted."""
    if _offline is not None:
        return _offline.multiprocessors
    return 4 if IS_INTERPRETED else _properties(device)[1]


@cache
def _properties(device: torch.device) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def device_name(device: torch.device) -> str:
    """Return a GPU's name as files are called: lower case, words joined by underscores."""
    if _offline is not None or IS_INTERPRETED:
        return "interpreter" if IS_INTERPRETED else f"sm_{capability(device)}"
    return _device_name(device)


@cache
def _device_name(device: torch.device) -> str:
    words = "".join(c if c.isalnum() else " " for c in torch.cuda.get_device_name(device).lower())
    return "_".join(words.split())


def launch(
    kernel: Callable[..., Any],
    grid: tuple[int, ...],
    device: torch.device,
    *args: Any,
    **keywords: Any,
) -> None:
    """Launch a kernel on the current stream of a device, as ``kernel[grid](*args, **keywords)``.

    A product and a sum stay two roundings, as in the reference: float results equal its own.

    Args:
        kernel: a function under ``triton.jit``.
        grid: programs, up to three axes; nothing is launched if one is zero.
        device: where the tensors are.
        *args: the kernel's arguments.
        **keywords: the same, by name, and Triton's ``num_warps`` and ``num_stages``.
    """
    if 0 in grid:
        return
    keywords["enable_fp_fusion"] = False
    if _offline is not None:
        compiled = kernel.warmup(*args, grid=grid, **keywords)  # type: ignore[attr-defined]
        options = {k: v for k, v in keywords.items() if isinstance(v, (int, str))}
        _offline.compiled.append(CompiledKernel(kernel.__name__, grid, options, compiled))
    elif device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        kernel[grid](*args, **keywords)  # type: ignore[index]
    else:
        with torch.cuda.device(device):
            kernel[grid](*args, **keywords)  # type: ignore[index]
