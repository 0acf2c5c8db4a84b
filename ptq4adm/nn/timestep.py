"""Which row of the activation scale tables is in use: one small tensor that all layers share.

A hook on the denoiser reads the timestep of each call and writes its bucket into `StepIndex.index`;
kernels read the scale through that tensor, so a recorded CUDA graph serves every step. A model has
one index: it cannot run two different timesteps at once from two threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ptq4adm.quant.buckets import TimestepBuckets, find_timestep, single_timestep

__all__ = ["StepHook", "StepIndex", "TimestepBuckets", "attach_step_hook", "find_step"]


class StepIndex:
    """The bucket of the step being run.

    Copying a model copies its index once: the layers of the copy share the copy's.

    Args:
        buckets: the calibrated buckets.
        device: where the layers are.

    Attributes:
        index: int64 [], the bucket.
    """

    def __init__(self, buckets: TimestepBuckets, device: torch.device | str = "cpu") -> None:
        self.buckets = buckets
        # made outside inference mode, or it could not be written to later outside of it
        with torch.inference_mode(mode=False):
            self.index = torch.zeros((), dtype=torch.int64, device=device)

    def set_timestep(self, timestep: Any) -> None:
        """Select the bucket of a timestep.

        Numbers and CPU tensors are checked. A tensor on another device is not waited for, and one
        in a compiled graph has no value to check: its first element is used, limited to the
        training range.

        Args:
            timestep: a number, or a tensor with one value or the same value for each sample.

        Raises:
            UncalibratedStepError: if it is out of range, or calibration saw no step of its bucket.
            MixedTimestepError: if a batch holds different timesteps.
        """
        if isinstance(timestep, Tensor) and timestep.numel() and _is_unread(timestep):
            last = self.buckets.num_train_timesteps - 1
            first = timestep.detach().reshape(-1)[0].to(torch.int64).clamp(0, last)
            bucket = first * self.buckets.count // self.buckets.num_train_timesteps
            self.index.copy_(bucket)
            return
        self.index.fill_(self.buckets.check(single_timestep(timestep)))

    def move(self, convert: Callable[[Tensor], Tensor]) -> None:
        """Apply what a module's `to` applies to its buffers; done once, however many layers ask."""
        with torch.inference_mode(mode=False):
            self.index = convert(self.index)

    def __repr__(self) -> str:
        b = self.buckets
        return f"StepIndex({b.count} buckets over {b.num_train_timesteps} timesteps)"


def _is_unread(timestep: Tensor) -> bool:
    """Whether the host would have to wait, or to leave a compiled graph, for a value."""
    return timestep.device.type != "cpu" or torch.compiler.is_compiling()


class StepHook:
    """Forward pre-hook of a denoiser: reads `timestep` and sets the index.

    Args:
        step: the index that the denoiser's layers hold.
    """

    def __init__(self, step: StepIndex) -> None:
        self.step = step

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Set the index from the arguments of a call; changes none of them."""
        del module
        self.step.set_timestep(find_timestep(args, kwargs))


def attach_step_hook(denoiser: nn.Module, step: StepIndex) -> RemovableHandle:
    """Make a denoiser set `step` at each call."""
    return denoiser.register_forward_pre_hook(StepHook(step), with_kwargs=True)


def find_step(denoiser: nn.Module) -> StepIndex | None:
    """The index that a denoiser sets, or None if it has no `StepHook`."""
    for hook in denoiser._forward_pre_hooks.values():
        if isinstance(hook, StepHook):
            return hook.step
    return None
