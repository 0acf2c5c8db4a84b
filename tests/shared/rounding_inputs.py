"""What tests of rounding methods start from: recorded inputs of a model, a task of a layer."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

import ptq4adm
from ptq4adm import Calibration, TextToAudioPipeline
from ptq4adm.packing.layout import KLayout, weight_to_rows
from ptq4adm.quant.affine import quantize_rows
from ptq4adm.quant.buckets import TimestepBuckets
from ptq4adm.rounding import LayerTask

PROMPTS = ["a dog barks", "a bell rings"]


def record_inputs(
    pipe: TextToAudioPipeline,
    folder: Path,
    *,
    prompts: list[str] | None = None,
    steps: int = 2,
    strategy: str = "random",
    size: int = 4,
) -> tuple[Calibration, Path]:
    """A calibration of chosen pairs, and the file of their inputs."""
    path = folder / "inputs.safetensors"
    calibration = ptq4adm.calibrate(
        pipe,
        PROMPTS if prompts is None else prompts,
        steps=steps,
        strategy=strategy,
        size=size,
        inputs=path,
        progress=False,
    )
    return calibration, path


def make_task(
    layer: nn.Linear | nn.Conv2d,
    segments: tuple[int, ...] | None = None,
    x_scale: Tensor | None = None,
    group_size: int | None = None,
) -> LayerTask:
    """A task of a layer at 4 bits; static scales are those of two buckets of 50 steps."""
    is_conv = isinstance(layer, nn.Conv2d)
    segments = (layer.weight.shape[1],) if segments is None else segments
    layout = KLayout(segments, layer.kernel_size if is_conv else (1, 1))  # type: ignore[arg-type]
    start = quantize_rows(
        weight_to_rows(layer.weight.detach(), layout), bits=4, group_size=group_size
    )
    buckets = None if x_scale is None else TimestepBuckets(100, (True, True))
    return LayerTask("x", layer, layout, 4, start, x_scale, buckets)
