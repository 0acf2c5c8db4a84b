"""Size of a real-size AudioLDM UNet in W4A8, on disk and resident, and one step of it here.

    python benchmarks/bench_size.py [--model audioldm-s] [--threads 2] [--repeats 3]

Random weights: sizes and seconds mean something, quality does not. A step is one call of the UNet
with batch 2 (guidance) for a 10.24 s clip; float32 (channels_last) and W4A8 with dynamic scales run
in turns, and medians are taken. The row goes to benchmarks/results/size.csv.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import ptq4adm
from ptq4adm.bench import append_rows, environment
from ptq4adm.models import real_unet
from ptq4adm.nn import W8Linear, resident_bytes
from ptq4adm.packing.checkpoint import save_denoiser

ROOT = Path(__file__).resolve().parents[1]
MB = 1e6


def folder_bytes(folder: Path) -> int:
    """Bytes of every file below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def float16_bytes(unet: nn.Module, folder: Path) -> int:
    """Bytes of the float16 safetensors file of a module."""
    tensors = {name: t.to(torch.float16).contiguous() for name, t in unet.state_dict().items()}
    save_file(tensors, folder / "float16.safetensors")
    return (folder / "float16.safetensors").stat().st_size


def weight_only_error(float_weights: dict[str, Tensor], quantized: nn.Module) -> float:
    """Relative RMS error of the int8 weight-only layers, over all of them."""
    error = power = 0.0
    for name, layer in quantized.named_modules():
        if isinstance(layer, W8Linear):
            weight = float_weights[f"{name}.weight"]
            error += float((layer.dequantize().weight - weight).square().sum())
            power += float(weight.square().sum())
    return (error / power) ** 0.5


def main() -> None:
    """Measure and append the row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="audioldm-s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "results" / "size.csv"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    unet = real_unet(arguments.model).to(memory_format=torch.channels_last)
    packed = real_unet(arguments.model)
    packed.load_state_dict(unet.state_dict())
    started = time.perf_counter()
    plan = ptq4adm.quantize(packed, ptq4adm.QuantConfig(activation="dynamic"))
    quantize_s = time.perf_counter() - started
    print(plan.summary())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fp16 = float16_bytes(unet, folder)
        save_denoiser(packed, folder / "packed")
        disk = folder_bytes(folder / "packed")
    latents = torch.randn(2, 8, 256, 16).contiguous(memory_format=torch.channels_last)
    labels = nn.functional.normalize(torch.randn(2, 512), dim=-1)

    def step(model: nn.Module) -> Tensor:
        result: Tensor = model(latents, 500, encoder_hidden_states=None, class_labels=labels).sample
        return result

    seconds: dict[str, list[float]] = {"float": [], "w4a8": []}
    with torch.inference_mode():
        reference, test = step(unet), step(packed)
        assert test.shape == reference.shape
        assert bool(torch.isfinite(test).all())
        for _ in range(arguments.repeats):
            for variant, model in (("float", unet), ("w4a8", packed)):
                started = time.perf_counter()
                step(model)
                seconds[variant].append(time.perf_counter() - started)
    row: dict[str, str | int | float] = {
        **environment(ROOT),
        "model": arguments.model,
        "parameters": sum(p.numel() for p in unet.parameters()),
        "fp32_mb": 4 * sum(p.numel() for p in unet.parameters()) / MB,
        "fp16_mb": fp16 / MB,
        "disk_mb": disk / MB,
        "resident_mb": resident_bytes(packed) / MB,
        "float_step_s": statistics.median(seconds["float"]),
        "w4a8_step_s": statistics.median(seconds["w4a8"]),
        "quantize_s": quantize_s,
        "w8_relative_error": weight_only_error(unet.state_dict(), packed),
    }
    append_rows(arguments.results, [row])
    for key, value in row.items():
        print(f"{key:18} {value if not isinstance(value, float) else round(value, 4)}")
    for key in ("disk_mb", "resident_mb"):
        smaller = 100 * (1 - float(row[key]) / float(row["fp16_mb"]))
        print(f"{key}: {smaller:.2f} % smaller than float16")


if __name__ == "__main__":
    main()
