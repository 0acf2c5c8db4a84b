"""The GPU kernel benchmark: every product, norm and gate of the models, ours and PyTorch's.

For each shape all variants are checked first, then timed side by side (`gpu_timing`); one that is
wrong or does not run becomes a row with the reason. Shapes that weigh most in a step come first,
and rows are handed out as they are made: a run that has to stop early has the ones that matter.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ptq4adm.bench.gpu_activations import activation_variants
from ptq4adm.bench.gpu_backends import TRITON, Backends, backends_on, check_names
from ptq4adm.bench.gpu_calls import Tile
from ptq4adm.bench.gpu_environment import find_device, gpu_environment
from ptq4adm.bench.gpu_faults import FAULTS, describe_fault
from ptq4adm.bench.gpu_peaks import measure_peaks, peak_values
from ptq4adm.bench.gpu_peers import missing_peers, peer_versions
from ptq4adm.bench.gpu_precompile import Precompiler, Wanted, compiled_batches
from ptq4adm.bench.gpu_problem import GpuProblem
from ptq4adm.bench.gpu_products import product_variants
from ptq4adm.bench.gpu_progress import with_progress
from ptq4adm.bench.gpu_report import KERNELS, PEAKS, Save
from ptq4adm.bench.gpu_shapes import GPU_KINDS, TOY_MODEL, GpuLayer, gpu_layers
from ptq4adm.bench.gpu_tiles import (
    check_configs,
    describe,
    tile_columns,
    tuning_problem,
    use_configs,
)
from ptq4adm.bench.gpu_timing import GpuCall, GpuTiming, Timer, make_timer
from ptq4adm.bench.gpu_variant import COPY, GpuVariant
from ptq4adm.bench.shapes import MODELS
from ptq4adm.errors import ConfigError
from ptq4adm.kernels import tuning

QUICK_SHAPES = 2  # of each kind
BATCH = 16  # shapes that are compiled, then measured
SETUP = "(setup)"  # in the place of a variant: tensors or exact results could not be made
_QUICK_SECONDS, _FULL_SECONDS = 0.05, 0.15


@dataclass(frozen=True)
class GpuJob:
    """What to measure.

    Args:
        models: names of `shapes.MODELS`, or `gpu_shapes.TOY_MODEL`.
        kinds: names of `gpu_shapes.GPU_KINDS`.
        bits: 4, 8 or both, of this package's weights.
        backends: this package's, of `gpu_backends.BACKENDS`; none takes all that can run here.
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
    backends: tuple[str, ...] = ()
    is_quick: bool = False
    is_rehearsal: bool = False
    seconds: float | None = None
    deadline: float | None = None
    configs: Path | None = None

    def __post_init__(self) -> None:
        for width in self.bits:
            if width not in (4, 8):
                raise ConfigError(f"bits {width} is unknown: expected 4 or 8")
        check_names(self.backends)
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


def run_gpu_kernels(
    job: GpuJob, *, progress: bool = True, save: Save | None = None
) -> dict[str, Any]:
    """Measure.

    Args:
        job: what.
        progress: show a bar on a terminal.
        save: called with the run's columns and rows by file name as soon as a shape is measured.

    Returns:
        ``run``: columns of every row; ``rows``: one a call and variant, with ``failed`` = reason
        and no time if it is wrong or does not run, ``skipped`` = reason if its backend is missing;
        ``peaks``: one a ceiling; ``missing``: backend or peer to reason; ``left_out``: shapes for
        which the time did not suffice; ``failed``: in words; ``uncompiled``: what did not compile
        ahead, in words.

    Raises:
        BackendUnavailableError: if there is no GPU, it is lost, or a named backend cannot run.
        ConfigError: if the cuda backend's file of measured tiles is broken.
    """
    started = time.perf_counter()
    ends = None if job.deadline is None else started + job.deadline
    device = find_device(is_rehearsal=job.is_rehearsal)
    use_configs(job.configs)
    timer = make_timer(device)
    torch.backends.cudnn.benchmark = True
    layers = job.layers()
    run = {**gpu_environment(device), **peer_versions()}
    keep = save or (lambda *_: None)
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    with (
        torch.inference_mode(),
        backends_on(device, job.backends) as backends,
        Precompiler(device, ends=ends, progress=progress) as compiler,
    ):
        check_configs(backends.usable, device)
        peaks = measure_peaks(timer, seconds=min(0.5, job.seconds_a_shape))
        keep(run, {PEAKS: peaks})
        ceilings = peak_values(peaks)
        calls = _distinct(layers)
        ready = compiled_batches(
            calls, lambda batch: _planned(job, backends, batch, device), compiler, size=BATCH
        )
        shown = with_progress(ready, "kernels", "shape", total=len(calls), is_shown=progress)
        for layer, is_ready in shown:
            if not is_ready or (ends is not None and time.perf_counter() > ends):
                left_out.append(str(layer.shape))
                continue
            measured = measure_layer(job, layer, backends, timer, ceilings)
            found = [
                {"model": other.model, "count": other.count, **row}
                for other in layers
                if _key(other) == _key(layer)
                for row in measured
            ]
            keep(run, {KERNELS: found})
            rows += found
    return {
        "run": run,
        "rows": rows,
        "peaks": peaks,
        "missing": backends.reasons() | missing_peers(),
        "left_out": left_out,
        "failed": list(dict.fromkeys(_describe_failure(row) for row in rows if row["failed"])),
        "uncompiled": compiler.failed,
    }


def _key(layer: GpuLayer) -> tuple[Any, bool]:
    return layer.shape, layer.is_gated


def _distinct(layers: list[GpuLayer]) -> list[GpuLayer]:
    """One layer for each call that several models share, in the same order."""
    found: dict[Any, GpuLayer] = {}
    for layer in layers:
        found.setdefault(_key(layer), layer)
    return list(found.values())


def _describe_failure(row: dict[str, Any]) -> str:
    variant = f"{row['variant']} {row['backend']}".rstrip()
    return f"{row['shape']} {variant}: {row['failed']}"


def measure_layer(
    job: GpuJob, layer: GpuLayer, backends: Backends, timer: Timer, ceilings: dict[str, float]
) -> list[dict[str, Any]]:
    """Check and time one call's variants: one row each, without a time if it failed.

    Raises:
        BackendUnavailableError: if the GPU is lost.
    """
    try:
        variants = _variants(job, layer, backends.usable, timer.device)
    except FAULTS as error:
        return [failed_row(layer, SETUP, describe_fault(error, timer.device))]
    errors: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for variant in variants:
        try:
            errors[variant.label] = variant.check()
        except FAULTS as error:
            reasons[variant.label] = describe_fault(error, timer.device)
    calls = {variant.label: variant.call for variant in variants if variant.label in errors}
    timings, untimed = time_calls(timer, calls, seconds=job.seconds_a_shape)
    reasons |= untimed
    rows = [
        failed_row(layer, variant.name, reasons[variant.label], variant.tile, variant.backend)
        if variant.label in reasons
        else make_row(layer, variant, timings, errors[variant.label], ceilings)
        for variant in variants
    ]
    return rows + _skipped_rows(job, layer, backends)


def _variants(
    job: GpuJob, layer: GpuLayer, backends: tuple[str, ...], device: torch.device
) -> list[GpuVariant]:
    if layer.is_product:
        return product_variants(GpuProblem(layer, device), backends, job.bits)
    return activation_variants(layer, device, backend=backends[0])


def _skipped_rows(job: GpuJob, layer: GpuLayer, backends: Backends) -> list[dict[str, Any]]:
    """What a missing backend would have measured of a product, with the reason."""
    if not layer.is_product:
        return []  # norms and gates are the same in every backend
    return [
        {**failed_row(layer, f"w{bits}a8", "", backend=name), "skipped": reason}
        for name, reason in backends.missing.items()
        for bits in job.bits
    ]


def time_calls(
    timer: Timer, calls: dict[str, GpuCall], *, seconds: float
) -> tuple[dict[str, GpuTiming], dict[str, str]]:
    """Time calls side by side; one that cannot be timed does not keep the others from it.

    Args:
        timer: of the device.
        calls: by name.
        seconds: for all of them.

    Returns:
        Timings, and the reasons of those without.

    Raises:
        BackendUnavailableError: if the GPU is lost.
    """
    if not calls:
        return {}, {}
    try:
        return timer.time(calls, seconds=seconds), {}
    except FAULTS as error:
        common = describe_fault(error, timer.device)
    reasons: dict[str, str] = {}
    for name, call in calls.items():
        try:
            timer.time({name: call}, seconds=0.0)
        except FAULTS as error:
            reasons[name] = describe_fault(error, timer.device)
    good = {name: call for name, call in calls.items() if name not in reasons}
    try:
        return (timer.time(good, seconds=seconds) if good else {}), reasons
    except FAULTS as error:  # each alone can be timed, but not together: too little memory
        describe_fault(error, timer.device)
        return {}, reasons | dict.fromkeys(good, common)


def failed_row(
    layer: GpuLayer, name: str, reason: str, tile: Tile | None = None, backend: str = ""
) -> dict[str, Any]:
    """One line of the results for a variant that has no time.

    Args:
        layer: the call.
        name: of the variant, or `SETUP`.
        reason: why.
        tile: that it ran with.
        backend: whose variant it is.
    """
    return {
        **_columns(layer),
        "variant": name,
        "tile": "" if tile is None else describe(tile),
        "ratio_fp16": "",
        "failed": reason,
        **tile_columns(backend, tile),
        "skipped": "",
    }


def _columns(layer: GpuLayer) -> dict[str, Any]:
    shape = layer.shape
    return {
        "kind": shape.kind + ("-geglu" if layer.is_gated else ""),
        "shape": describe_shape(layer),
        "M": shape.M,
        "N": shape.N,
        "K": shape.K,
    }


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
    timing = timings[variant.label]
    seconds = timing.us * 1e-6
    amounts = {COPY: variant.nbytes, variant.peak: variant.operations or variant.nbytes}
    shares = [
        amount / seconds / ceilings[peak] for peak, amount in amounts.items() if peak in ceilings
    ]
    base = timings.get(variant.base)
    return {
        **_columns(layer),
        "variant": variant.name,
        "tile": "" if variant.tile is None else describe(variant.tile),
        "us": _rounded(timing.us),
        "p20_us": _rounded(timing.p20_us),
        "p80_us": _rounded(timing.p80_us),
        "samples": timing.samples,
        "copies": timing.copies,
        "tops": _rounded(variant.operations / seconds * 1e-12),
        "gb_s": _rounded(variant.nbytes / seconds * 1e-9),
        "peak_percent": _rounded(100 * max(shares)) if shares else "",
        "ratio_fp16": "" if base is None else _rounded(base.us / timing.us),
        "error": _rounded(error),
        "failed": "",
        **tile_columns(variant.backend, variant.tile),
        "skipped": "",
    }


def describe_shape(layer: GpuLayer) -> str:
    """Like ``conv3x3 2x256x16 320->320``, ``layernorm 8192x320``."""
    shape = layer.shape
    if layer.is_product:
        return str(shape) + (" geglu" if layer.is_gated else "")
    if shape.batch > 1 or shape.width > 1:
        return f"{shape.kind} {shape.batch}x{shape.height}x{shape.width} {shape.in_channels}"
    return f"{shape.kind} {shape.M}x{shape.in_channels}"


def _planned(
    job: GpuJob, backends: Backends, layers: list[GpuLayer], device: torch.device
) -> list[Wanted]:
    """What Triton has to compile of what will be run, for `precompile`."""
    wanted = []
    for layer in layers:
        if not layer.is_product:
            wanted += [Wanted(layer, is_int8=is_static) for is_static in (True, False)]
            continue
        if TRITON not in backends.usable:
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
