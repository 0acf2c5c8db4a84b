"""What becomes of a computation that is wrong or does not run: a reason in a row, no time.

A GPU that is borrowed for minutes must hand back everything that did work.
"""

from __future__ import annotations

from typing import Any

import torch

from ptq4adm.errors import BackendUnavailableError, OutputError

# whatever a kernel, a compiler or another library runs into is the reason of one row
FAULTS = (Exception,)
_LONGEST = 300


def describe_fault(error: BaseException, device: torch.device) -> str:
    """Return an error in one line.

    Args:
        error: one of `FAULTS`, just caught.
        device: where it happened.

    Raises:
        BackendUnavailableError: if the GPU is lost, so that nothing else can run in this process.
        OutputError: the error itself, if rows cannot be written.
    """
    if isinstance(error, OutputError):
        raise error
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:_LONGEST]
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as lost:
            raise BackendUnavailableError(
                f"the GPU cannot be used any more in this process: {reason}; rows of what ran "
                "before are kept"
            ) from lost
    return reason


def failed_lines(failed: list[str]) -> list[str]:
    """Lines of a text for people; none if nothing failed."""
    return [f"FAILED: {reason}" for reason in failed]


def exit_code(result: dict[str, Any]) -> int:
    """Of a command: 1 if something failed that is in the rows."""
    return int(bool(result["failed"]))
