"""The variants of a UNet's step on a GPU: how each is made, checked and timed."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptq4adm.bench.gpu_unet_models import StepModels
from ptq4adm.bench.macs import count_macs
from ptq4adm.bench.problem import relative_error
from ptq4adm.errors import BenchmarkError
from ptq4adm.nn.forwards import is_hoisted
from ptq4adm.nn.storage import resident_bytes

EAGER, GRAPH, COMPILED = "fp16-eager", "fp16-graph", "fp16-compiled-graph"
STATIC, DYNAMIC = "w4a8-static-graph", "w4a8-dynamic-graph"
# largest relative RMS error against `EAGER` that is still the same computation; a network of random
# weights answers noise with noise, and 4 bits cost it more than a trained one
TOLERANCES = {EAGER: 0.0, GRAPH: 1e-2, COMPILED: 3e-2, STATIC: 0.4, DYNAMIC: 0.4}
_WARM_UPS = 3


@dataclass(frozen=True)
class Variant:
    """What is run.

    Attributes:
        name: of `TOLERANCES`.
        backend: this package's; empty for float16.
    """

    name: str
    backend: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.backend}".rstrip()


@dataclass
class Step:
    """One variant, ready to run.

    Attributes:
        run: one step; returns [2, C, H, W].
        weights: bytes that the model holds.
        peak: most bytes held while a step runs, the model's included; nothing else's.
        build_s: seconds of making it, compilation included.
        hoisted: modules whose result is kept over the steps.
        breaks: how often PyTorch's compiler had to leave its graph; None if it was not used.
        macs: multiply-adds with weights by backend; None where they were not counted.
    """

    run: Callable[[], Tensor]
    weights: int = 0
    peak: int = 0
    build_s: float = 0.0
    hoisted: int = 0
    breaks: int | None = None
    macs: dict[str, int] | None = None


def make_step(unets: StepModels, variant: Variant) -> Step:
    """One variant; its memory is measured on an eager step."""
    device, name = unets.device, variant.name
    began = time.perf_counter()
    kept = 0
    if name == COMPILED:
        unet, kept = unets.constant_half()
    elif name in (EAGER, GRAPH):
        unet = unets.half()
    else:
        unet = unets.quantized(variant.backend, is_static=name == STATIC)
    gc.collect()
    called: Callable[..., Any] = torch.compile(unet) if name == COMPILED else unet

    def run() -> Tensor:
        with torch.no_grad():
            return unets.call(called)

    kept = kept or sum(map(is_hoisted, unet.modules()))
    step = Step(run, resident_bytes(unet), hoisted=kept)
    if name == COMPILED:
        step.breaks = _graph_breaks(run)
    else:
        step.macs = count_macs(run)
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


def check_step(label: str, got: Tensor, expected: Tensor, tolerance: float) -> float:
    """Relative RMS error of a step's output.

    Raises:
        BenchmarkError: if it is above the tolerance, or no number.
    """
    error = relative_error(got, expected)
    if not error <= tolerance:  # NaN fails as well
        raise BenchmarkError(
            f"{label}: relative error {error:.3g} of the output is above {tolerance}; it computes "
            "something else and is not timed"
        )
    return error


def step_seconds(run: Callable[[], Tensor], device: torch.device) -> float:
    """Seconds of one step."""
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


def turns(variants: Sequence[Variant], rounds: int) -> Iterator[Variant]:
    """Variants in rounds, each beginning with the next one."""
    for done in range(rounds):
        for turn in range(len(variants)):
            yield variants[(done + turn) % len(variants)]
