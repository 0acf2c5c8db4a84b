"""Do something once another package's module is there, without importing it.

`import ptq4adm` costs milliseconds and must not pull in a library of seconds only to tell it
something. A finder at the head of `sys.meta_path` waits for one name; every other name it passes
on, and the module it waits for is found and executed by whoever would have done it anyway.
"""

from __future__ import annotations

import importlib.abc
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["call_after_import"]


def call_after_import(name: str, function: Callable[[], None]) -> None:
    """Call a function now, if a module is imported, and after every later import of it.

    Args:
        name: dotted name of the module.
        function: called after the module was executed; must not raise, or it would break an import
            that is none of its business.
    """
    sys.meta_path.insert(0, _Finder(name, function))
    module = sys.modules.get(name)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        function()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module as the other finders do, and has its loader call back."""

    def __init__(self, name: str, function: Callable[[], None]) -> None:
        self.name, self.function = name, function
        self._asking = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """None for every other name, and while the others are asked."""
        if fullname != self.name or getattr(self._asking, "now", False):
            return None
        self._asking.now = True
        try:
            found = _ask_others(self, fullname, path, target)
        finally:
            self._asking.now = False
        if found is not None and found.loader is not None:
            found.loader = _Loader(found.loader, self.function)
        return found


def _ask_others(
    finder: _Finder, fullname: str, path: Sequence[str] | None, target: ModuleType | None
) -> ModuleSpec | None:
    for other in list(sys.meta_path):
        find = None if other is finder else getattr(other, "find_spec", None)
        found: ModuleSpec | None = None if find is None else find(fullname, path, target)
        if found is not None:
            return found
    return None


class _Loader(importlib.abc.Loader):
    """Steps aside before the module runs: what reads its loader finds the real one."""

    def __init__(self, loader: importlib.abc.Loader, function: Callable[[], None]) -> None:
        self.loader, self.function = loader, function

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the real loader does."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As the real loader does; then the call."""
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        self.function()
