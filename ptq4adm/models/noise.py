"""Where a sample's noise comes from: its own seed, whatever the batch and the device."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def initial_noise(batch: int, shape: tuple[int, int, int], seed: int) -> Tensor:
    """Unit noise float32 [B, C, H, W] on the CPU, the same for every device.

    Sample i is the noise of seed + i.
    """
    return draw_noise(shape, noise_generators(batch, seed))


def noise_generators(batch: int, seed: int) -> list[torch.Generator]:
    """One generator a sample, on the CPU; sample i has seed + i."""
    return [torch.Generator().manual_seed(seed + i) for i in range(batch)]


def draw_noise(shape: tuple[int, int, int], generators: Sequence[torch.Generator]) -> Tensor:
    """The next unit noise float32 [B, C, H, W] of B generators."""
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def step_options(scheduler: Any, generators: list[torch.Generator]) -> dict[str, Any]:
    """How a scheduler's step is told where its noise comes from; {} if it draws none."""
    if "generator" in inspect.signature(scheduler.step).parameters:
        return {"generator": generators}
    return {}
