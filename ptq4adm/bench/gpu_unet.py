"""Whole steps of real UNets on a GPU: float16 eager, in a CUDA graph, compiled; W4A8 in a graph.

One step is one call of the UNet at batch 2 (guidance) with random weights. Every variant gets the
same inputs and the same constant work done ahead (`ptq4adm.nn.prepared`: time projections, keys and
values of the text); float16 is channels_last. Variants live in one process and take turns.
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
from tqdm.auto import tqdm

from ptq4adm.bench.gpu_environment import find_device, gpu_environment
from ptq4adm.bench.gpu_report import columns, describe_run
from ptq4adm.bench.gpu_shapes import TOY_MODEL
from ptq4adm.bench.gpu_unet_models import StepModels
from ptq4adm.bench.problem import relative_error
from ptq4adm.bench.shapes import MODELS
from ptq4adm.bench.timing import Timing
from ptq4adm.errors import BenchmarkError, ConfigError, MissingComponentError
from ptq4adm.nn.base import resident_bytes

EAGER, GRAPH, COMPILED = "fp16-eager", "fp16-graph", "fp16-compiled-graph"
STATIC, DYNAMIC = "w4a8-static-graph", "w4a8-dynamic-graph"
# largest relative RMS error against `EAGER` that is still the same computation; a network of random
# weights answers noise with noise, and 4 bits cost it more than a trained one
TOLERANCES = {EAGER: 0.0, GRAPH: 1e-2, COMPILED: 3e-2, STATIC: 0.4, DYNAMIC: 0.4}
DEFAULT_VARIANTS = (EAGER, GRAPH, STATIC, DYNAMIC)
_WARM_UPS = 3
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


def run_gpu_unets(job: GpuUNetJob, *, progress: bool = True) -> dict[str, Any]:
    """Measure every model.

    Args:
        job: what.
        progress: show a bar on a terminal.

    Returns:
        ``run``: columns of every row; ``rows``: one a model and variant; ``missing``: model and
        variant to reason; ``left_out``: models for which the time did not suffice.

    Raises:
        BackendUnavailableError: if there is no GPU.
        BenchmarkError: if an output is wrong.
        MissingComponentError: if diffusers is not installed.
    """
    started = time.perf_counter()
    if importlib.util.find_spec("diffusers") is None:
        raise MissingComponentError(
            "diffusers is not installed, and the UNets are its classes: pip install diffusers"
        )
    device = find_device(is_rehearsal=job.is_rehearsal)
    torch.backends.cudnn.benchmark = True
    rows: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    left_out = []
    models = (TOY_MODEL,) if job.is_rehearsal else job.models
    for model in tqdm(models, desc="UNets", disable=None if progress else True):
        if job.deadline is not None and time.perf_counter() - started > job.deadline:
            left_out.append(model)
            continue
        found, reasons = measure_model(job, model, device)
        rows += found
        missing |= {f"{model} {name}": reason for name, reason in reasons.items()}
    run = gpu_environment(device)
    return {"run": run, "rows": rows, "missing": missing, "left_out": left_out}


def measure_model(
    job: GpuUNetJob, model: str, device: torch.device
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Make, check and time the variants of one model.

    Returns:
        rows: one a variant.
        missing: variant to reason.

    Raises:
        BenchmarkError: if an output is wrong.
    """
    names = [EAGER, *(name for name in job.variants if name != EAGER)]
    made: dict[str, _Step] = {}
    errors: dict[str, float] = {}
    missing: dict[str, str] = {}
    with ExitStack() as stack:
        unets = StepModels(model, device, job.backend, stack)
        expected: Tensor | None = None
        for name in names:
            try:
                step = _make_step(unets, name)
            except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
                if name != COMPILED:  # PyTorch's compiler may fail; the rest is what is measured
                    raise
                missing[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                continue
            got = step.run().float()
            expected = got if expected is None else expected
            errors[name] = _check(f"{name} of {model}", got, expected, TOLERANCES[name])
            made[name] = step
        seconds: dict[str, list[float]] = {name: [] for name in made}
        for name in _turns(list(made), job.rounds):
            seconds[name].append(_seconds(made[name].run, device))
    base = Timing.of(seconds[GRAPH if GRAPH in made else EAGER]).median_s
    rows = []
    for name, step in made.items():
        timing = Timing.of(seconds[name])
        rows.append(
            {
                "model": model,
                "variant": name,
                "ms": _rounded(timing.median_s * 1e3),
                "p20_ms": _rounded(timing.p20_s * 1e3),
                "p80_ms": _rounded(timing.p80_s * 1e3),
                "samples": timing.samples,
                "ratio_fp16_graph": _rounded(base / timing.median_s),
                "weights_mb": round(step.weights / _MB, 1),
                "peak_mb": round(step.peak / _MB, 1),
                "build_s": round(step.build_s, 1),
                "error": _rounded(errors[name]),
            }
        )
    return rows, missing


# --- variants -----------------------------------------------------------------------------------


@dataclass
class _Step:
    """One variant, ready to run.

    Attributes:
        run: one step; returns [2, C, H, W].
        weights: bytes that the model holds.
        peak: most bytes held while a step runs, the model's included; nothing else's.
        build_s: seconds of making it, compilation included.
    """

    run: Callable[[], Tensor]
    weights: int = 0
    peak: int = 0
    build_s: float = 0.0


def _make_step(unets: StepModels, name: str) -> _Step:
    """One variant; its memory is measured on an eager step."""
    device = unets.device
    began = time.perf_counter()
    if name in (EAGER, GRAPH, COMPILED):
        unet = unets.half()
    else:
        unet = unets.quantized(is_static=name == STATIC)
    gc.collect()
    called: Callable[..., Any] = torch.compile(unet) if name == COMPILED else unet

    def run() -> Tensor:
        with torch.no_grad():
            return unets.call(called)

    step = _Step(run, resident_bytes(unet))
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


# --- checks, time, text -------------------------------------------------------------------------


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


def format_unets(result: dict[str, Any]) -> str:
    """The text that `ptq4adm bench --device cuda --unet` prints."""
    table = [
        ["model", "variant", "ms", "x fp16 graph", "weights MB", "peak MB", "error", "build s"]
    ]
    for row in result["rows"]:
        table.append(
            [
                row["model"],
                row["variant"],
                f"{row['ms']:.2f}",
                f"{row['ratio_fp16_graph']:.2f}",
                f"{row['weights_mb']:.0f}",
                f"{row['peak_mb']:.0f}",
                f"{row['error']:.2g}",
                f"{row['build_s']:.0f}",
            ]
        )
    lines = [describe_run(result["run"]), "", *columns(table, left=2), ""]
    lines += [f"not measured: {name}: {why}" for name, why in result["missing"].items()]
    lines += [f"no time for: {model}" for model in result["left_out"]]
    return "\n".join(lines)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
