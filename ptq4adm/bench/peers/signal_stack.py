"""Keeps this thread's stack for signal handlers, which OpenVINO exchanges and loses.

Compiling a model with OpenVINO 2026.4 installs an alternate signal stack and freeing it brings back
the one before. Two models freed in the order they were made leave the thread with a stack that is
unmapped, and the next signal, Ctrl-C for one, ends the process.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class _Stack(ctypes.Structure):
    """`stack_t` of sigaltstack(2) on Linux."""

    _fields_ = (
        ("address", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("size", ctypes.c_size_t),
    )


def signal_stack() -> tuple[int, int]:
    """Address and size of this thread's alternate signal stack; zeros if it has none."""
    stack = _Stack()
    if sys.platform == "linux":
        ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack))
    return stack.address or 0, stack.size


@contextmanager
def own_signal_stack() -> Iterator[None]:
    """Give the thread its alternate signal stack back when the block ends."""
    if sys.platform != "linux":
        yield
        return
    library, before = ctypes.CDLL(None), _Stack()
    library.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        library.sigaltstack(ctypes.byref(before), None)
