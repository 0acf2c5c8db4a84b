"""Which of this package's backends a GPU benchmark measures, and what is said of the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch

from ptq4adm.bench.gpu_emulation import emulated
from ptq4adm.errors import BackendUnavailableError, ConfigError
from ptq4adm.ops import cuda_backend

TRITON, CUDA = "triton", "cuda"
BACKENDS = (TRITON, CUDA)


@dataclass(frozen=True)
class Backends:
    """Backends of a run.

    Attributes:
        usable: those that are measured.
        missing: the others, with the reason.
    """

    usable: tuple[str, ...]
    missing: dict[str, str] = field(default_factory=dict)

    def reasons(self) -> dict[str, str]:
        """The missing ones, as a report names them."""
        return {f"backend {name}": reason for name, reason in self.missing.items()}


def check_names(names: Sequence[str]) -> None:
    """Check names of backends.

    Raises:
        ConfigError: if one is unknown.
    """
    for name in names:
        if name not in BACKENDS:
            known = ", ".join(BACKENDS)
            raise ConfigError(f"backend {name!r} is none of a GPU: expected one of {known}")


@contextmanager
def backends_on(device: torch.device, named: Sequence[str] = ()) -> Iterator[Backends]:
    """Find the backends that can run; on the CPU, which rehearses, ``cuda`` is emulated inside.

    Triton's presence is checked where the device is found (`gpu_environment.find_device`).

    Args:
        device: that is measured.
        named: those that were asked for; none asks for all that there are.

    Raises:
        BackendUnavailableError: if one that was asked for cannot run.
    """
    wanted = named or BACKENDS
    missing: dict[str, str] = {}
    with ExitStack() as stack:
        if CUDA in wanted:
            try:
                if device.type != "cuda":
                    stack.enter_context(emulated())
                _check_cuda(device)
            except BackendUnavailableError as error:
                if named:
                    raise
                missing[CUDA] = str(error)
        yield Backends(tuple(name for name in wanted if name not in missing), missing)


def _check_cuda(device: torch.device) -> None:
    reason = cuda_backend.unavailable_reason(device.type)
    if reason is not None:
        raise BackendUnavailableError(f"backend 'cuda' is not available: {reason}")
