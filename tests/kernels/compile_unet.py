"""Compile a whole quantized UNet step offline and write its launches; see test_compile_unet.py.

python compile_unet.py OUTPUT.json 90
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import torch

from ptq4adm import ops
from ptq4adm.bench.gpu_unet_models import StepModels
from ptq4adm.bench.shapes import model_layers
from ptq4adm.kernels.inspection import resources
from ptq4adm.kernels.launch import compile_only

MODEL = "audioldm-s"
MULTIPROCESSORS = {80: 108, 90: 132}


def launch_step(stack: ExitStack) -> None:
    """One step of float16 activations through the quantized, fused UNet: shapes, no numbers."""
    models = StepModels(MODEL, torch.device("cpu"), stack)
    unet = models.quantized("triton", is_static=True)
    models.dtype, models.latents = torch.float16, models.latents.half()
    models.conditioning = {
        name: None if tensor is None else tensor.half()
        for name, tensor in models.conditioning.items()
    }
    with torch.no_grad():
        models.call(unet)


def launch_empty() -> list[list[int]]:
    """Products without rows, which a GPU's planner must not stumble over."""
    one, scale = torch.ones(()), torch.ones(20)
    x, image = torch.zeros(0, 64, dtype=torch.int8), torch.zeros(0, 3, 4, 64, dtype=torch.int8)
    rows, taps = (torch.zeros(20, 32 * n, dtype=torch.uint8) for n in (1, 9))
    linear = ops.linear(x, one, rows, scale, bits=4, backend="triton")
    conv2d = ops.conv2d(
        image, one, taps, scale, bits=4, kernel_size=(3, 3), padding=(1, 1), backend="triton"
    )
    return [list(linear.shape), list(conv2d.shape)]


def main() -> None:
    """Write the report."""
    output, capability = Path(sys.argv[1]), int(sys.argv[2])
    with compile_only(capability, MULTIPROCESSORS[capability]) as target, ExitStack() as stack:
        empty = launch_empty()
        after_empty = len(target.compiled)
        launch_step(stack)
    kernels = {id(compiled.kernel): compiled for compiled in target.compiled}
    used = {key: resources(compiled) for key, compiled in kernels.items()}
    report = {
        "empty": empty,
        "launches_of_empty": after_empty,
        "layers": sum(layer.count for layer in model_layers(MODEL)),
        "launches": Counter(compiled.name for compiled in target.compiled),
        "kernels": len(kernels),
        "spilling": [
            f"{kernels[key].name} {kernels[key].options}"
            for key, found in used.items()
            if found.spills
        ],
    }
    output.write_text(json.dumps(report))


if __name__ == "__main__":
    main()
