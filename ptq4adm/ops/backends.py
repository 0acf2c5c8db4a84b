"""Which backends there are, which can run here, and which one a name means.

A backend is resolved once, when a module is made or loaded. A named backend that cannot run raises
with the reason and the remedy; nothing is retried elsewhere. Where two backends can run, ``auto``
takes the faster one by the device's table of measured times (``ptq4adm.dispatch``), layer by layer.
The weight order of each backend is in ``prepack.py``; its two functions are importable from here.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from enum import Enum
from functools import cache

import torch

from ptq4adm import dispatch
from ptq4adm.dispatch import Choice, DispatchTable, LayerKey
from ptq4adm.errors import BackendUnavailableError, UnknownBackendError
from ptq4adm.ops import cpu, cuda_backend, triton_backend
from ptq4adm.ops.prepack import packed_shape, prepack, to_canonical

__all__ = [
    "BackendName",
    "BackendStatus",
    "backend_report",
    "choose_backend",
    "device_name",
    "packed_shape",
    "prepack",
    "quantizers_of",
    "resolve_backend",
    "to_canonical",
]

_log = logging.getLogger(__name__)


class BackendName(str, Enum):
    """Every backend's name."""

    REFERENCE = "reference"
    CPU = "cpu"
    TRITON = "triton"
    CUDA = "cuda"


# kinds of devices with a choice: backends that ``auto`` may take there, the usual one first
_CANDIDATES: dict[str, tuple[BackendName, ...]] = {
    "cuda": tuple(map(BackendName, dispatch.GPU_BACKENDS)),
}


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run here.

    Attributes:
        name: the backend.
        available: True if it can run.
        detail: what it runs on, or why it cannot and what to do.
        device_type: the kind of device that this is about, such as ``cuda``.
    """

    name: BackendName
    available: bool
    detail: str
    device_type: str = "cpu"


def backend_report() -> list[BackendStatus]:
    """Return the state of every backend, for ``ptq4adm doctor``."""
    return [_status(name, _report_device(name)) for name in BackendName]


def resolve_backend(name: str, device: torch.device | str = "cpu") -> str:
    """Return the backend that a name means for tensors on a device.

    Args:
        name: a backend's name, or ``auto``: on the CPU the compiled backend if it is built, on a
            CUDA device ``triton`` if it can run there, else ``reference``. For one layer, whose
            times a table may hold, ask ``choose_backend``.
        device: where the tensors live.

    Returns:
        The name of an available backend.

    Raises:
        UnknownBackendError: if the name is none of the backends.
        BackendUnavailableError: if the named backend cannot run on this device here.
    """
    wanted = name.value if isinstance(name, BackendName) else str(name).lower()
    return _resolve(wanted, torch.device(device).type)


def choose_backend(
    name: str,
    device: torch.device | str = "cpu",
    *,
    key: LayerKey | None = None,
    rows: int | None = None,
) -> Choice:
    """Return the backend that a name means for one layer, and why.

    ``auto`` on a device where two backends can run takes the faster one by the device's table,
    and without a table or an entry what ``resolve_backend`` returns.

    Args:
        name: a backend's name, or ``auto``.
        device: where the tensors live.
        key: the layer; None if layers of its kind are not measured.
        rows: M of one call, where it is known.

    Raises:
        UnknownBackendError: if the name is none of the backends.
        BackendUnavailableError: if the named backend cannot run on this device here.
        DispatchTableError: if there is a table for the device and it is wrong.
    """
    resolved, where = resolve_backend(name, device), torch.device(device)
    wanted = _CANDIDATES.get(where.type, ())
    is_auto = not isinstance(name, BackendName) and str(name).lower() == "auto"
    if not is_auto or BackendName(resolved) not in wanted:
        return Choice(resolved)
    usable = tuple(b.value for b in wanted if _status(b, where.type).available)
    called = device_name(where)
    table = None if called is None else dispatch.find_table(called)
    return _choose(table, called or "", key, rows, usable)


@cache
def _choose(
    table: DispatchTable | None,
    device: str,
    key: LayerKey | None,
    rows: int | None,
    usable: tuple[str, ...],
) -> Choice:
    """Choose once per layer and table, so that each choice is logged once."""
    choice = dispatch.choose_backend(table, key, rows=rows, candidates=usable)
    # what failed when it was measured is not taken without a word
    level = logging.WARNING if "failed when measured" in choice.reason else logging.INFO
    what = "layers" if key is None else str(key)
    _log.log(
        level, "backend auto of %s on %s: %s (%s)", what, device, choice.backend, choice.reason
    )
    return choice


def device_name(device: torch.device | str) -> str | None:
    """Return the name under which tables know a device; None for devices without tables."""
    where = torch.device(device)
    return torch.cuda.get_device_name(where) if where.type == "cuda" else None


def quantizers_of(backend: str) -> str:
    """Return the backend whose quantizers a backend's layers use: ``cuda`` has none of its own.

    Layers of two backends with the same quantizers may share one int8 tensor.
    """
    return BackendName.TRITON.value if backend == BackendName.CUDA else backend


@cache
def _resolve(name: str, device_type: str) -> str:
    """Resolve once per name and kind of device, so that the choice is logged once."""
    if name == "auto":
        best = {"cpu": BackendName.CPU, "cuda": BackendName.TRITON}.get(device_type)
        is_best = best is not None and _status(best, device_type).available
        chosen = best if best is not None and is_best else BackendName.REFERENCE
        detail = _status(chosen, device_type).detail
        _log.info("backend auto on %s: %s (%s)", device_type, chosen.value, detail)
        return chosen.value
    names = [backend.value for backend in BackendName]
    if name not in names:
        raise UnknownBackendError(
            f"backend {name!r} is unknown; use one of {', '.join(names)}, or auto"
        )
    status = _status(BackendName(name), device_type)
    if not status.available:
        raise BackendUnavailableError(f"backend {name!r} is not available: {status.detail}")
    if name == "cpu" and device_type != "cpu":
        raise BackendUnavailableError(
            f"backend 'cpu' cannot run on device {device_type!r}; move the model to the CPU or use "
            "backend='reference'"
        )
    _log.info("backend %s on %s: %s", name, device_type, status.detail)
    return name


def _report_device(name: BackendName) -> str:
    """The kind of device that a backend is for, on this machine."""
    is_for_gpus = name in (BackendName.TRITON, BackendName.CUDA)
    return "cuda" if is_for_gpus and torch.cuda.is_available() else "cpu"


def _status(name: BackendName, device_type: str) -> BackendStatus:
    reason: str | None = None
    if name is BackendName.REFERENCE:
        detail = "plain PyTorch, any device, slow: the oracle of the tests"
    elif name is BackendName.CPU:
        reason = cpu.unavailable_reason()
        if reason is None:
            detail = f"{cpu.default_isa()}, {torch.get_num_threads()} threads ({cpu.threading()})"
    elif name is BackendName.TRITON:
        reason = triton_backend.unavailable_reason(device_type)
        if reason is None:
            detail = triton_backend.describe(device_type)
    else:
        reason = cuda_backend.unavailable_reason(device_type)
        if reason is None:
            detail = cuda_backend.describe(device_type)
    return BackendStatus(name, reason is None, reason or detail, device_type)
