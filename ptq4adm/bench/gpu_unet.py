"""Whole steps of real UNets on a GPU: float16 eager, in a CUDA graph, compiled; W4A8 in a graph.

One step is one call of the UNet at batch 2 (guidance) with random weights; W4A8 has a variant for
each backend. Every variant gets the same inputs and the same constant work done ahead
(`ptq4adm.nn.prepared`: time projections, keys and values of the text); float16 is channels_last.
Variants live in one process and take turns. Rows are handed out model by model; a variant that is
wrong or does not run becomes a row with the reason.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptq4adm.bench.gpu_backends import Backends, backends_on, check_names
from ptq4adm.bench.gpu_environment import find_device, gpu_environment
from ptq4adm.bench.gpu_faults import FAULTS, describe_fault
from ptq4adm.bench.gpu_processes import run_processes
from ptq4adm.bench.gpu_progress import with_progress
from ptq4adm.bench.gpu_report import UNET, Save, variant_label
from ptq4adm.bench.gpu_shapes import TOY_MODEL
from ptq4adm.bench.gpu_tiles import check_configs
from ptq4adm.bench.gpu_unet_models import StepModels, compile_steps
from ptq4adm.bench.gpu_unet_steps import (
    COMPILED,
    DYNAMIC,
    EAGER,
    GRAPH,
    STATIC,
    TOLERANCES,
    Step,
    Variant,
    check_step,
    make_step,
    step_seconds,
    turns,
)
from ptq4adm.bench.macs import mac_shares
from ptq4adm.bench.shapes import MODELS
from ptq4adm.bench.timing import Timing
from ptq4adm.errors import BenchmarkError, ConfigError, MissingComponentError
from ptq4adm.kernels import launch

DEFAULT_VARIANTS = (EAGER, GRAPH, STATIC, DYNAMIC)
_COMPILE_SHARE = 0.35  # of the deadline, at most: what is not ready then compiles at a warm-up
_MB = 1e6


@dataclass(frozen=True)
class GpuUNetJob:
    """What to measure.

    Args:
        models: names of `shapes.MODELS`.
        variants: names of `TOLERANCES`; `EAGER` is always there, the others are held to it.
        rounds: timed steps of each variant.
        backends: this package's, of `gpu_backends.BACKENDS`; none takes all that can run here.
        is_rehearsal: in Triton's interpreter and the emulator, without graphs.
        deadline: seconds after which no other model is begun; None for no limit.

    Raises:
        ConfigError: if a value is unknown or out of range.
    """

    models: tuple[str, ...] = ("tango", "audioldm-s", "audioldm-l", "make-an-audio")
    variants: tuple[str, ...] = DEFAULT_VARIANTS
    rounds: int = 20
    backends: tuple[str, ...] = ()
    is_rehearsal: bool = False
    deadline: float | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            *(("model", model, tuple(MODELS)) for model in self.models),
            *(("variant", variant, tuple(TOLERANCES)) for variant in self.variants),
        ):
            if value not in known:
                raise ConfigError(
                    f"{name} {value!r} is unknown: expected one of {', '.join(known)}"
                )
        check_names(self.backends)
        if self.rounds < 1:
            raise ConfigError(f"rounds = {self.rounds}: expected at least 1")


def run_gpu_unets(
    job: GpuUNetJob, *, progress: bool = True, save: Save | None = None
) -> dict[str, Any]:
    """Measure every model.

    Args:
        job: what.
        progress: show a bar on a terminal.
        save: called with the run's columns and rows by file name as soon as a model is measured.

    Returns:
        ``run``: columns of every row; ``rows``: one a model and variant, with ``failed`` = reason
        and no time if it is wrong or does not run, ``skipped`` = reason if its backend is missing;
        ``missing``: backend, or model and variant, to reason; ``left_out``: models for which the
        time did not suffice; ``failed``, and ``uncompiled`` (ahead, which costs time only): in
        words.

    Raises:
        BackendUnavailableError: if there is no GPU, it is lost, or a named backend cannot run.
        ConfigError: if the cuda backend's file of measured tiles is broken.
        MissingComponentError: if diffusers is not installed.
    """
    started = time.perf_counter()
    if importlib.util.find_spec("diffusers") is None:
        raise MissingComponentError(
            "diffusers is not installed, and the UNets are its classes: pip install diffusers"
        )
    device = find_device(is_rehearsal=job.is_rehearsal)
    torch.backends.cudnn.benchmark = True
    run, keep = gpu_environment(device), save or (lambda *_: None)
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    models = (TOY_MODEL,) if job.is_rehearsal else job.models
    uncompiled = _compile_ahead(job, models, device)
    longest = 0.0
    with backends_on(device, job.backends) as backends:
        check_configs(backends.usable, device)
        missing = backends.reasons()
        for model in with_progress(models, "UNets", "model", is_shown=progress):
            began = time.perf_counter()
            # the next one takes about as long as the longest so far, and has no rows if it is cut
            if job.deadline is not None and began + longest > started + job.deadline:
                left_out.append(model)
                continue
            found, reasons = measure_model(job, model, device, backends)
            keep(run, {UNET: found})
            rows += found
            missing |= {f"{model} {name}": reason for name, reason in reasons.items()}
            longest = max(longest, time.perf_counter() - began)
    failed = [f"{r['model']} {variant_label(r)}: {r['failed']}" for r in rows if r["failed"]]
    return {
        "run": run,
        "rows": rows,
        "missing": missing,
        "left_out": left_out,
        "failed": failed,
        "uncompiled": uncompiled,
    }


def _compile_ahead(job: GpuUNetJob, models: Sequence[str], device: torch.device) -> list[str]:
    """Compile the kernels of W4A8 steps in processes; returns what was not, in words."""
    modes = [name == STATIC for name in (STATIC, DYNAMIC) if name in job.variants]
    # beside torch.compile, which takes minutes, the first step compiles what no call before did
    if device.type != "cuda" or not modes or COMPILED in job.variants:
        return []
    target = (launch.capability(device), launch.multiprocessors(device))
    tasks = {
        f"{model}, {'static' if is_static else 'dynamic'}": (model, is_static, *target)
        for model in models
        for is_static in modes
    }
    seconds = None if job.deadline is None else _COMPILE_SHARE * job.deadline
    return run_processes(compile_steps, tasks, seconds=seconds)


def measure_model(
    job: GpuUNetJob, model: str, device: torch.device, backends: Backends
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Make, check and time the variants of one model.

    Returns:
        rows: one a variant; without a time if it failed or its backend is missing.
        missing: variant to reason.

    Raises:
        BackendUnavailableError: if the GPU is lost.
    """
    made: dict[Variant, Step] = {}
    errors: dict[Variant, float] = {}
    reasons: dict[Variant, str] = {}
    missing: dict[str, str] = {}
    with ExitStack() as stack:
        try:
            unets = StepModels(model, device, stack)
        except FAULTS as error:
            return [_failed(model, Variant(EAGER), describe_fault(error, device))], missing
        expected: Tensor | None = None
        for variant in _variants(job, backends.usable):
            name = variant.name
            try:
                step = make_step(unets, variant)
                got = step.run().float()
                if expected is None and name != EAGER:
                    raise BenchmarkError(f"{EAGER} does not run, so there is nothing to compare")
                expected = got if expected is None else expected
                errors[variant] = check_step(
                    f"{variant} of {model}", got, expected, TOLERANCES[name]
                )
                made[variant] = step
            except FAULTS as error:
                reason = describe_fault(error, device)
                # PyTorch's compiler may fail, but what it returns has to be right
                if name == COMPILED and not isinstance(error, BenchmarkError):
                    missing[name] = reason
                else:
                    reasons[variant] = reason
        seconds = _time_steps(made, job.rounds, device, reasons)
    base = next(
        (Timing.of(seconds[Variant(n)]) for n in (GRAPH, EAGER) if Variant(n) in made), None
    )
    rows = [_failed(model, variant, reason) for variant, reason in reasons.items()]
    rows += [
        _row(model, variant, step, Timing.of(seconds[variant]), base, errors[variant])
        for variant, step in made.items()
    ]
    rows += [
        {**_failed(model, variant, ""), "skipped": backends.missing[variant.backend]}
        for variant in _variants(job, tuple(backends.missing))
        if variant.backend
    ]
    return rows, missing


def _time_steps(
    made: dict[Variant, Step], rounds: int, device: torch.device, reasons: dict[Variant, str]
) -> dict[Variant, list[float]]:
    """Seconds of steps that take turns; one that fails goes from `made` to `reasons`."""
    seconds: dict[Variant, list[float]] = {variant: [] for variant in made}
    for variant in turns(list(made), rounds):
        if variant not in made:
            continue
        try:
            seconds[variant].append(step_seconds(made[variant].run, device))
        except FAULTS as error:
            reasons[variant] = describe_fault(error, device)
            del made[variant]
    return seconds


def _row(
    model: str, variant: Variant, step: Step, timing: Timing, base: Timing | None, error: float
) -> dict[str, Any]:
    return {
        "model": model,
        "variant": variant.name,
        "ms": _rounded(timing.median_s * 1e3),
        "p20_ms": _rounded(timing.p20_s * 1e3),
        "p80_ms": _rounded(timing.p80_s * 1e3),
        "samples": timing.samples,
        "ratio_fp16_graph": _rounded(base.median_s / timing.median_s) if base else "",
        "weights_mb": round(step.weights / _MB, 1),
        "peak_mb": round(step.peak / _MB, 1),
        "build_s": round(step.build_s, 1),
        "hoisted": step.hoisted,
        "graph_breaks": "" if step.breaks is None else step.breaks,
        "error": _rounded(error),
        "failed": "",
        "backend": variant.backend,
        "skipped": "",
        **mac_shares(step.macs),
    }


def _failed(model: str, variant: Variant, reason: str) -> dict[str, Any]:
    return {
        "model": model,
        "variant": variant.name,
        "failed": reason,
        "backend": variant.backend,
        "skipped": "",
    }


def _variants(job: GpuUNetJob, backends: Sequence[str]) -> list[Variant]:
    """The variants of a job, `EAGER` first; W4A8 on each backend."""
    found = [Variant(EAGER)]
    for name in job.variants:
        if name in (STATIC, DYNAMIC):
            found += [Variant(name, backend) for backend in backends]
        elif name != EAGER:
            found.append(Variant(name))
    return found


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
