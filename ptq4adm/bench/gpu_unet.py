"""Whole steps of real UNets on a GPU: float16 eager, in a CUDA graph, compiled; W4A8 in a graph.

One step is one call of the UNet at batch 2 (guidance) with random weights. Every variant gets the
same inputs and the same constant work done ahead (`ptq4adm.nn.prepared`: time projections, keys and
values of the text); float16 is channels_last. Variants live in one process and take turns. Rows are
handed out model by model; a variant that is wrong or does not run becomes a row with the reason.
"""

from __future__ import annotations

import gc
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptq4adm.bench.gpu_environment import find_device, gpu_environment
from ptq4adm.bench.gpu_faults import FAULTS, describe_fault
from ptq4adm.bench.gpu_processes import run_processes
from ptq4adm.bench.gpu_progress import with_progress
from ptq4adm.bench.gpu_report import UNET, Save
from ptq4adm.bench.gpu_shapes import TOY_MODEL
from ptq4adm.bench.gpu_unet_models import StepModels, compile_steps
from ptq4adm.bench.problem import relative_error
from ptq4adm.bench.shapes import MODELS
from ptq4adm.bench.timing import Timing
from ptq4adm.errors import BenchmarkError, ConfigError, MissingComponentError
from ptq4adm.kernels import launch
from ptq4adm.nn.forwards import is_hoisted
from ptq4adm.nn.storage import resident_bytes

EAGER, GRAPH, COMPILED = "fp16-eager", "fp16-graph", "fp16-compiled-graph"
STATIC, DYNAMIC = "w4a8-static-graph", "w4a8-dynamic-graph"
# largest relative RMS error against `EAGER` that is still the same computation; a network of random
# weights answers noise with noise, and 4 bits cost it more than a trained one
TOLERANCES = {EAGER: 0.0, GRAPH: 1e-2, COMPILED: 3e-2, STATIC: 0.4, DYNAMIC: 0.4}
DEFAULT_VARIANTS = (EAGER, GRAPH, STATIC, DYNAMIC)
_WARM_UPS = 3
_COMPILE_SHARE = 0.35  # of the deadline, at most: what is not ready then compiles at a warm-up
_MB = 1e6


@dataclass(frozen=True)
class GpuUNetJob:
    """What to measure.

    Args:
        models: names of `shapes.MODELS`.
        variants: names of `TOLERANCES`; `EAGER` is always there, the others are held to it.
        rounds: timed steps of each variant.
        backend: this package's kernels.
        is_rehearsal: in Triton's interpreter, without graphs.
        deadline: seconds after which no other model is begun; None for no limit.

    Raises:
        ConfigError: if a value is unknown or out of range.
    """

    models: tuple[str, ...] = ("tango", "audioldm-s", "audioldm-l", "make-an-audio")
    variants: tuple[str, ...] = DEFAULT_VARIANTS
    rounds: int = 20
    backend: str = "triton"
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
        and no time if it is wrong or does not run; ``missing``: model and variant to reason;
        ``left_out``: models for which the time did not suffice; ``failed``, and ``uncompiled``
        (ahead, which costs time only): in words.

    Raises:
        BackendUnavailableError: if there is no GPU, or it is lost.
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
    missing: dict[str, str] = {}
    left_out: list[str] = []
    models = (TOY_MODEL,) if job.is_rehearsal else job.models
    uncompiled = _compile_ahead(job, models, device)
    longest = 0.0
    for model in with_progress(models, "UNets", "model", is_shown=progress):
        began = time.perf_counter()
        # the next one takes about as long as the longest so far, and has no rows if it is cut
        if job.deadline is not None and began + longest > started + job.deadline:
            left_out.append(model)
            continue
        found, reasons = measure_model(job, model, device)
        keep(run, {UNET: found})
        rows += found
        missing |= {f"{model} {name}": reason for name, reason in reasons.items()}
        longest = max(longest, time.perf_counter() - began)
    failed = [f"{r['model']} {r['variant']}: {r['failed']}" for r in rows if r["failed"]]
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
    if device.type != "cuda" or job.backend != "triton" or not modes or COMPILED in job.variants:
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
    job: GpuUNetJob, model: str, device: torch.device
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Make, check and time the variants of one model.

    Returns:
        rows: one a variant; without a time if it failed.
        missing: variant to reason.

    Raises:
        BackendUnavailableError: if the GPU is lost.
    """
    names = [EAGER, *(name for name in job.variants if name != EAGER)]
    made: dict[str, _Step] = {}
    errors: dict[str, float] = {}
    reasons: dict[str, str] = {}
    missing: dict[str, str] = {}
    with ExitStack() as stack:
        try:
            unets = StepModels(model, device, job.backend, stack)
        except FAULTS as error:
            return [_failed(model, EAGER, describe_fault(error, device))], missing
        expected: Tensor | None = None
        for name in names:
            try:
                step = _make_step(unets, name)
                got = step.run().float()
                if expected is None and name != EAGER:
                    raise BenchmarkError(f"{EAGER} does not run, so there is nothing to compare")
                expected = got if expected is None else expected
                errors[name] = _check(f"{name} of {model}", got, expected, TOLERANCES[name])
                made[name] = step
            except FAULTS as error:
                reason = describe_fault(error, device)
                # PyTorch's compiler may fail, but what it returns has to be right
                is_failure = name != COMPILED or isinstance(error, BenchmarkError)
                (reasons if is_failure else missing)[name] = reason
        seconds: dict[str, list[float]] = {name: [] for name in made}
        for name in _turns(list(made), job.rounds):
            if name not in made:
                continue
            try:
                seconds[name].append(_seconds(made[name].run, device))
            except FAULTS as error:
                reasons[name] = describe_fault(error, device)
                del made[name]
    base = next((Timing.of(seconds[name]) for name in (GRAPH, EAGER) if name in made), None)
    rows = [_failed(model, name, reason) for name, reason in reasons.items()]
    rows += [
        _row(model, name, step, Timing.of(seconds[name]), base, errors[name])
        for name, step in made.items()
    ]
    return rows, missing


def _row(
    model: str, name: str, step: _Step, timing: Timing, base: Timing | None, error: float
) -> dict[str, Any]:
    return {
        "model": model,
        "variant": name,
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
    }


def _failed(model: str, name: str, reason: str) -> dict[str, Any]:
    return {"model": model, "variant": name, "failed": reason}


# --- variants -----------------------------------------------------------------------------------


@dataclass
class _Step:
    """One variant, ready to run.

    Attributes:
        run: one step; returns [2, C, H, W].
        weights: bytes that the model holds.
        peak: most bytes held while a step runs, the model's included; nothing else's.
        build_s: seconds of making it, compilation included.
        hoisted: modules whose result is kept over the steps.
        breaks: how often PyTorch's compiler had to leave its graph; None if it was not used.
    """

    run: Callable[[], Tensor]
    weights: int = 0
    peak: int = 0
    build_s: float = 0.0
    hoisted: int = 0
    breaks: int | None = None


def _make_step(unets: StepModels, name: str) -> _Step:
    """One variant; its memory is measured on an eager step."""
    device = unets.device
    began = time.perf_counter()
    kept = 0
    if name == COMPILED:
        unet, kept = unets.constant_half()
    elif name in (EAGER, GRAPH):
        unet = unets.half()
    else:
        unet = unets.quantized(is_static=name == STATIC)
    gc.collect()
    called: Callable[..., Any] = torch.compile(unet) if name == COMPILED else unet

    def run() -> Tensor:
        with torch.no_grad():
            return unets.call(called)

    kept = kept or sum(map(is_hoisted, unet.modules()))
    step = _Step(run, resident_bytes(unet), hoisted=kept)
    if name == COMPILED:
        step.breaks = _graph_breaks(run)
    if device.type != "cuda":
        step.build_s = time.perf_counter() - began
        return step
    for _ in range(_WARM_UPS):
        run()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    step.peak = step.weights + torch.cuda.max_memory_allocated(device) - held
    if name != EAGER:
        step.run = _captured(run)
    step.build_s = time.perf_counter() - began
    return step


def _graph_breaks(run: Callable[[], Tensor]) -> int:
    """Compile by a first step; returns how many breaks there were."""
    counters: Any = torch._dynamo.utils.counters
    torch._dynamo.reset()  # what another model left would count as well
    counters.clear()
    run()
    return sum(counters["graph_break"].values())


def _captured(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same step as a replay of a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


# --- checks, time ------------------------------------------------------------------------------


def _check(label: str, got: Tensor, expected: Tensor, tolerance: float) -> float:
    error = relative_error(got, expected)
    if not error <= tolerance:  # NaN fails as well
        raise BenchmarkError(
            f"{label}: relative error {error:.3g} of the output is above {tolerance}; it computes "
            "something else and is not timed"
        )
    return error


def _seconds(run: Callable[[], Tensor], device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    run()  # brings its weights and the clocks up after the variant before
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    torch.cuda.synchronize(device)
    return float(first.elapsed_time(last)) * 1e-3


def _turns(names: Sequence[str], rounds: int) -> Iterator[str]:
    for done in range(rounds):
        for turn in range(len(names)):
            yield names[(done + turn) % len(names)]


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
