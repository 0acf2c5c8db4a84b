"""Who answers for a module: its own forward, one that somebody put there, or a kept result.

Fused blocks and prepared models leave out calls of modules. Both ask here whether anybody would
miss them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

__all__ = ["HoistedForward", "are_all_watched", "find_watcher", "is_hoisted", "recall"]


class HoistedForward:
    """Takes the place of one module's forward: what was kept, else the module's own.

    What was kept belongs to one module for the length of one `with` block: in a copy or a pickle of
    the module nothing is kept, and the first call removes what is left of it.

    Args:
        module: whose forward it replaces.
        lookup: the kept result for an input, or None; no function at all if nothing is kept.
    """

    def __init__(
        self, module: nn.Module, lookup: Callable[[Tensor], Tensor | None] | None = None
    ) -> None:
        self.module = module
        self.lookup = lookup

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The module's forward."""
        if self.lookup is None:
            self.module.__dict__.pop("forward", None)
        is_plain = not kwargs and all(value is None for value in args)
        kept = self.find(x) if is_plain else None
        if kept is not None:
            return kept
        return type(self.module).forward(self.module, x, *args, **kwargs)

    def find(self, x: Tensor) -> Tensor | None:
        """The kept result for an input, or None."""
        return None if self.lookup is None else self.lookup(x)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles keep the module alone."""
        return HoistedForward, (self.module,)


def is_hoisted(module: nn.Module) -> bool:
    """Whether results of a module are kept now."""
    forward = module.__dict__.get("forward")
    return type(forward) is HoistedForward and forward.lookup is not None


def recall(layer: nn.Module, x: Tensor) -> Tensor | None:
    """What a layer would return for `x`, if that was prepared; None if it has to be computed."""
    forward = layer.__dict__.get("forward")
    return forward.find(x) if type(forward) is HoistedForward else None


def find_watcher(child: nn.Module, path: str = "") -> str | None:
    """Who would miss a call of a module, in words that name it by `path`; None if nobody would."""
    if (
        child._forward_hooks
        or child._forward_pre_hooks
        or child._backward_hooks
        or child._backward_pre_hooks
    ):
        return f"child {path!r} has hooks"
    forward = child.__dict__.get("forward")
    if forward is not None and type(forward) is not HoistedForward:
        return f"the forward of child {path!r} was replaced"
    return None


def are_all_watched() -> bool:
    """Whether hooks on all modules are registered."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )
