"""Size of a real-size UNet in W4A8, on disk and resident, and one step of it here.

    python benchmarks/bench_size.py [--model audioldm-s ...] [--threads 2] [--repeats 3]
    python benchmarks/bench_size.py --model all --repeats 0       sizes alone

Random weights: sizes and seconds mean something, quality does not. Layers have the schemes that the
model's pipeline gives them. A step is one call of the UNet with batch 2 (guidance) for a clip of 10
s; float32 (channels_last) and W4A8 with dynamic scales run in turns, and medians are taken. The row
goes to benchmarks/results/size.csv.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import ptq4adm
from ptq4adm.bench import append_rows, environment
from ptq4adm.bench.shapes import ModelSpec, spec_inputs
from ptq4adm.models import (
    AudioLDM,
    MakeAnAudio,
    PipelineAdapter,
    Tango,
    TextToAudioPipeline,
    make_an_audio_unet,
    real_unet,
    tango_unet,
)
from ptq4adm.nn import W8Linear, resident_bytes
from ptq4adm.packing.checkpoint import save_denoiser

ROOT = Path(__file__).resolve().parents[1]
MB = 1e6


def audioldm(name: str) -> tuple[type[TextToAudioPipeline], ModelSpec]:
    """One size of AudioLDM."""
    return AudioLDM, ModelSpec(lambda device: real_unet(name, device=device), (8, 256, 16), 0)


# most of the float16 UNet's bytes that the packed one may have
LIMITS = {
    "audioldm-s": 0.30,
    "audioldm-m": 0.30,
    "audioldm-l": 0.30,
    "tango": 0.29,
    "make-an-audio": 0.31,
}
MODELS: dict[str, tuple[type[TextToAudioPipeline], ModelSpec]] = {
    **{name: audioldm(name) for name in ("audioldm-s", "audioldm-m", "audioldm-l")},
    "tango": (Tango, ModelSpec(lambda device: tango_unet(device=device), (8, 256, 16), 32)),
    "make-an-audio": (
        MakeAnAudio,
        ModelSpec(lambda device: make_an_audio_unet(device=device), (4, 10, 80), 77),
    ),
}


def config_of(family: type[TextToAudioPipeline], unet: nn.Module) -> ptq4adm.QuantConfig:
    """Dynamic scales, and the schemes that a pipeline of the family has."""
    rules = PipelineAdapter(family).rules(unet)
    overrides = {rule.pattern: rule.scheme for rule in rules if "attn2" in rule.pattern}
    return ptq4adm.QuantConfig(activation="dynamic", overrides=overrides)


def folder_bytes(folder: Path) -> int:
    """Bytes of every file below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def weight_only_error(float_weights: dict[str, Tensor], quantized: nn.Module) -> float:
    """Relative RMS error of the int8 weight-only layers, over all of them."""
    error = power = 0.0
    for name, layer in quantized.named_modules():
        if isinstance(layer, W8Linear):
            weight = float_weights[f"{name}.weight"]
            error += float((layer.dequantize().weight - weight).square().sum())
            power += float(weight.square().sum())
    return math.sqrt(error / power)


def step_seconds(
    spec: ModelSpec, unet: nn.Module, packed: nn.Module, repeats: int
) -> dict[str, float]:
    """Medians of one step, in turns."""
    latents, conditioning = spec_inputs(spec)
    latents = latents.contiguous(memory_format=torch.channels_last)

    def step(model: nn.Module) -> Tensor:
        result: Tensor = model(latents, 500, **conditioning).sample
        return result

    seconds: dict[str, list[float]] = {"float_step_s": [], "w4a8_step_s": []}
    with torch.inference_mode():
        reference, test = step(unet), step(packed)
        assert test.shape == reference.shape
        assert bool(torch.isfinite(test).all())
        for _ in range(repeats):
            for variant, model in (("float_step_s", unet), ("w4a8_step_s", packed)):
                started = time.perf_counter()
                step(model)
                seconds[variant].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure(name: str, repeats: int) -> dict[str, str | int | float]:
    """The row of one model."""
    family, spec = MODELS[name]
    torch.manual_seed(0)
    packed = spec.build("cpu")
    weights = packed.state_dict()  # float, after the layers were replaced, too
    unet = None
    if repeats:
        unet = copy.deepcopy(packed).to(memory_format=torch.channels_last)
    config = config_of(family, packed)
    started = time.perf_counter()
    plan = ptq4adm.quantize(packed, config, progress=False)
    quantize_s = time.perf_counter() - started
    print(plan.summary())
    with tempfile.TemporaryDirectory() as folder:
        save_denoiser(packed, Path(folder) / "packed")
        disk = folder_bytes(Path(folder) / "packed")
    parameters = sum(tensor.numel() for tensor in weights.values())
    row: dict[str, str | int | float] = {
        **environment(ROOT),
        "model": name,
        "parameters": parameters,
        "fp32_mb": 4 * parameters / MB,
        "fp16_mb": 2 * parameters / MB,
        "disk_mb": disk / MB,
        "resident_mb": resident_bytes(packed) / MB,
        "quantize_s": quantize_s,
        "w8_relative_error": weight_only_error(weights, packed),
        **(step_seconds(spec, unet, packed, repeats) if unet is not None else {}),
    }
    for key, value in row.items():
        print(f"{key:18} {value if not isinstance(value, float) else round(value, 4)}")
    for key in ("disk_mb", "resident_mb"):
        share = float(row[key]) / float(row["fp16_mb"])
        print(f"{key}: {share:.4f} of float16, {share / 2:.4f} of float32")
        assert share <= LIMITS[name], f"{name}: {share:.4f} of float16, at most {LIMITS[name]}"
    return row


def main() -> None:
    """Measure and append the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["audioldm-s"], choices=[*MODELS, "all"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3, help="0 times no step")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "results" / "size.csv"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in MODELS if "all" in arguments.model else arguments.model:
        append_rows(arguments.results, [measure(name, arguments.repeats)])


if __name__ == "__main__":
    main()
