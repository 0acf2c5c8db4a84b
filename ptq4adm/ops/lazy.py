"""Functions of backends whose imports are optional or slow: imported when first called."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

from ptq4adm.errors import BackendUnavailableError


def lazy_function(
    backend: str, import_reason: Callable[[], str | None], module: str, name: str
) -> Callable[..., Any]:
    """Return a function of ``ptq4adm.ops.<module>`` that imports it when it is called.

    The returned function raises ``BackendUnavailableError`` where the backend cannot be imported.

    Args:
        backend: whose function it is, for the message.
        import_reason: why the backend cannot be imported, or None if it can.
        module: within ``ptq4adm.ops``.
        name: of the function.
    """

    def call(*args: Any, **keywords: Any) -> Any:
        return load(backend, import_reason, module, name)(*args, **keywords)

    return call


@cache
def load(
    backend: str, import_reason: Callable[[], str | None], module: str, name: str
) -> Callable[..., Any]:
    """Import the function; see ``lazy_function``."""
    reason = import_reason()
    if reason is not None:
        raise BackendUnavailableError(f"backend {backend!r} is not available: {reason}")
    found: Callable[..., Any] = getattr(import_module(f"ptq4adm.ops.{module}"), name)
    return found
