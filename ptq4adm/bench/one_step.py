"""Activation scales of a bare UNet, from one step on random inputs: they suit random weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ptq4adm.bench.shapes import TIMESTEP
from ptq4adm.calibration import Calibration, RunSettings, record
from ptq4adm.models import UNet2DAdapter
from ptq4adm.protocols import StepCallback


def calibrate_one_step(unet: nn.Module, step: Callable[[Any], Tensor]) -> Calibration:
    """Record one step of a float32 UNet.

    Args:
        unet: the UNet, not quantized.
        step: runs it once and returns its output.
    """
    settings = RunSettings(steps=1, guidance=1.0, buckets=1, batch=1)
    return record(_OneStep(step), unet, ["random inputs"], settings, progress=False)


class _OneStep(UNet2DAdapter):
    """Runs a UNet once, whatever the prompts."""

    def __init__(self, step: Callable[[Any], Tensor]) -> None:
        self.step = step

    def run(
        self,
        pipe: Any,
        prompts: Sequence[str],  # noqa: ARG002
        *,
        steps: int,  # noqa: ARG002
        guidance: float,  # noqa: ARG002
        seed: int,  # noqa: ARG002
        on_step: StepCallback | None = None,
    ) -> Tensor:
        """One step."""
        result = self.step(pipe)
        if on_step is not None:
            on_step(0, TIMESTEP, result)
        return result
