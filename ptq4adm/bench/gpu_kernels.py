"""The GPU kernel benchmark: every product, norm and gate of the models, ours and PyTorch's.

For each shape all variants are checked first, then timed side by side (`gpu_timing`). Shapes that
weigh most in a step come first, so a run that has to stop early has the ones that matter; it says
what it left out.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ptq4adm.bench.gpu_activations import activation_variants
from ptq4adm.bench.gpu_environment import find_device, gpu_environment
from ptq4adm.bench.gpu_peaks import measure_peaks, peak_values
from ptq4adm.bench.gpu_peers import missing_peers, peer_versions
from ptq4adm.bench.gpu_precompile import Wanted, precompile
from ptq4adm.bench.gpu_problem import GpuProblem
from ptq4adm.bench.gpu_products import product_variants
from ptq4adm.bench.gpu_shapes import GPU_KINDS, TOY_MODEL, GpuLayer, gpu_layers
from ptq4adm.bench.gpu_tiles import tuning_problem, use_configs
from ptq4adm.bench.gpu_timing import GpuTiming, Timer, make_timer
from ptq4adm.bench.gpu_variant import COPY, GpuVariant
from ptq4adm.bench.shapes import MODELS
from ptq4adm.errors import ConfigError
from ptq4adm.kernels import tuning

QUICK_SHAPES = 2  # of each kind
_QUICK_SECONDS, _FULL_SECONDS = 0.05, 0.15


@dataclass(frozen=True)
class GpuJob:
    """What to measure.

    Args:
        models: names of `shapes.MODELS`, or `gpu_shapes.TOY_MODEL`.
        kinds: names of `gpu_shapes.GPU_KINDS`.
        bits: 4, 8 or both, of this package's weights.
        backend: this package's kernels.
        is_quick: the two weightiest shapes of each kind.
        is_rehearsal: in Triton's interpreter, toy shapes.
        seconds: of timing a shape; None for 0.15, or 0.05 if quick.
        deadline: seconds after which no other shape is begun; None for no limit.
        configs: folder of measured tiles; None for the package's.

    Raises:
        ConfigError: if a value is out of range.
    """

    models: tuple[str, ...] = tuple(MODELS)
    kinds: tuple[str, ...] = GPU_KINDS
    bits: tuple[int, ...] = (4, 8)
    backend: str = "triton"
    is_quick: bool = False
    is_rehearsal: bool = False
    seconds: float | None = None
    deadline: float | None = None
    configs: Path | None = None

    def __post_init__(self) -> None:
        for width in self.bits:
            if width not in (4, 8):
                raise ConfigError(f"bits {width} is unknown: expected 4 or 8")
        gpu_layers(self.models, self.kinds)  # raises for unknown names

    @property
    def seconds_a_shape(self) -> float:
        """Timing budget of one shape."""
        if self.seconds is not None:
            return self.seconds
        return _QUICK_SECONDS if self.is_quick or self.is_rehearsal else _FULL_SECONDS

    def layers(self) -> list[GpuLayer]:
        """The calls to measure, weightiest first, kinds taking turns; models may share one."""
        models = (TOY_MODEL,) if self.is_rehearsal else self.models
        found = gpu_layers(models, self.kinds)
        found.sort(key=lambda layer: -layer.weight)
        ranks: dict[str, int] = {}
        ranked = []
        for layer in found:
            kind = layer.shape.kind
            ranks[kind] = ranks.get(kind, -1) + 1
            ranked.append((ranks[kind], layer))
        ranked.sort(key=lambda pair: pair[0])
        return [layer for rank, layer in ranked if not self.is_quick or rank < QUICK_SHAPES]


def run_gpu_kernels(job: GpuJob, *, progress: bool = True) -> dict[str, Any]:
    """Measure.

    Args:
        job: what.
        progress: show a bar on a terminal.

    Returns:
        ``run``: columns of every row; ``rows``: one a call and variant; ``peaks``: one a ceiling;
        ``missing``: peer to reason; ``left_out``: shapes for which the time did not suffice.

    Raises:
        BackendUnavailableError: if there is no GPU.
        BenchmarkError: if a variant's result is wrong; nothing is returned then.
    """
    started = time.perf_counter()
    device = find_device(is_rehearsal=job.is_rehearsal)
    use_configs(job.configs)
    timer = make_timer(device)
    torch.backends.cudnn.benchmark = True
    layers = job.layers()
    if device.type == "cuda":
        precompile(_planned(job, layers, device), device, progress=progress)
    run = {**gpu_environment(device), **peer_versions()}
    measured: dict[Any, list[dict[str, Any]]] = {}
    left_out: list[str] = []
    bar = tqdm(layers, desc="kernels", unit="shape", disable=None if progress else True)
    with torch.inference_mode():
        peaks = measure_peaks(timer, seconds=min(0.5, job.seconds_a_shape))
        ceilings = peak_values(peaks)
        for layer in bar:
            key = (layer.shape, layer.is_gated)
            if key in measured:
                continue
            if job.deadline is not None and time.perf_counter() - started > job.deadline:
                left_out.append(str(layer.shape))
                continue
            measured[key] = measure_layer(job, layer, timer, ceilings)
    rows = [
        {"model": layer.model, "count": layer.count, **row}
        for layer in layers
        for row in measured.get((layer.shape, layer.is_gated), ())
    ]
    missing = missing_peers()
    return {"run": run, "rows": rows, "peaks": peaks, "missing": missing, "left_out": left_out}


def measure_layer(
    job: GpuJob, layer: GpuLayer, timer: Timer, ceilings: dict[str, float]
) -> list[dict[str, Any]]:
    """Check and time one call's variants: one row each.

    Raises:
        BenchmarkError: if a variant's result is wrong.
    """
    if layer.is_product:
        problem = GpuProblem(layer, timer.device, backend=job.backend)
        variants = product_variants(problem, job.bits)
    else:
        variants = activation_variants(layer, timer.device, backend=job.backend)
    errors = {variant.name: variant.check() for variant in variants}
    timings = timer.time(
        {variant.name: variant.call for variant in variants}, seconds=job.seconds_a_shape
    )
    return [
        make_row(layer, variant, timings, errors[variant.name], ceilings) for variant in variants
    ]


def make_row(
    layer: GpuLayer,
    variant: GpuVariant,
    timings: dict[str, GpuTiming],
    error: float,
    ceilings: dict[str, float],
) -> dict[str, Any]:
    """One line of the results.

    ``tops`` and ``gb_s`` count operations and least bytes over the median; ``peak_percent`` is the
    larger share of a measured ceiling, of operations or of copied bytes; ``ratio_fp16`` is the time
    of the float16 variant that does the same work over this one's: above 1, this one is faster.
    """
    timing, shape = timings[variant.name], layer.shape
    seconds = timing.us * 1e-6
    shares = [variant.nbytes / seconds / ceilings[COPY]]
    if variant.operations:
        shares.append(variant.operations / seconds / ceilings[variant.peak])
    base = timings.get(variant.base)
    return {
        "kind": shape.kind + ("-geglu" if layer.is_gated else ""),
        "shape": describe_shape(layer),
        "M": shape.M,
        "N": shape.N,
        "K": shape.K,
        "variant": variant.name,
        "tile": variant.tile,
        "us": _rounded(timing.us),
        "p20_us": _rounded(timing.p20_us),
        "p80_us": _rounded(timing.p80_us),
        "samples": timing.samples,
        "copies": timing.copies,
        "tops": _rounded(variant.operations / seconds * 1e-12),
        "gb_s": _rounded(variant.nbytes / seconds * 1e-9),
        "peak_percent": _rounded(100 * max(shares)),
        "ratio_fp16": "" if base is None else _rounded(base.us / timing.us),
        "error": _rounded(error),
    }


def describe_shape(layer: GpuLayer) -> str:
    """Like ``conv3x3 2x256x16 320->320``, ``layernorm 8192x320``."""
    shape = layer.shape
    if layer.is_product:
        return str(shape) + (" geglu" if layer.is_gated else "")
    if shape.batch > 1 or shape.width > 1:
        return f"{shape.kind} {shape.batch}x{shape.height}x{shape.width} {shape.in_channels}"
    return f"{shape.kind} {shape.M}x{shape.in_channels}"


def _planned(job: GpuJob, layers: list[GpuLayer], device: torch.device) -> list[Wanted]:
    """What will be run, for `precompile`."""
    wanted = []
    for layer in layers:
        if not layer.is_product:
            wanted += [Wanted(layer, is_int8=is_static) for is_static in (True, False)]
            continue
        for bits in job.bits:
            config = tuning.find_config(tuning_problem(layer, bits, device))
            wanted.append(Wanted(layer, config, bits))
        if layer.is_gated:
            config = tuning.find_config(tuning_problem(layer, 4, device, is_gated=True))
            wanted += [Wanted(layer, config, 4, True, is_int8) for is_int8 in (False, True)]
    return wanted


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
