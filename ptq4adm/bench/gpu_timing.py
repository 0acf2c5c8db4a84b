"""Timing of several GPU computations side by side, as they run inside a step of a UNet.

Every variant is captured in a CUDA graph that holds several calls, each with its own copy of the
weights, so that a replay lasts `LEAST_US` or more and no launch from Python is in it. A UNet
reads a layer's weights once a step, after everything else has passed through L2, but its
activations were written by the kernel before. So ahead of every replay L2 is overwritten and the
activations are read once: weights come from memory, activations from L2 as far as they fit. That
is the same for every variant. Replays take turns, in rounds that each begin with another variant.

In Triton's interpreter the same calls run on the CPU, one at a time, by the host's clock: a
rehearsal, whose times mean nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ptq4adm.bench.timing import Timing

LEAST_US = 200.0
MOST_COPIES = 64
_PROBE_COPIES = 4
_LEAST_ROUNDS, _MOST_ROUNDS = 5, 60
_WARM_UPS = 2


@dataclass(frozen=True)
class GpuCall:
    """One variant, ready to run.

    Attributes:
        run: runs with the i-th copy of its weights (`copies` says how many there must be); returns
            what it computes.
        activations: tensors that the kernel before would have left in L2.
    """

    run: Callable[[int], Any]
    activations: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class GpuTiming:
    """Distribution of one call's duration.

    Attributes:
        us: median microseconds.
        p20_us: a fifth of the replays were faster.
        p80_us: a fifth were slower.
        samples: timed replays.
        copies: calls in a replay, each with weights of its own.
    """

    us: float
    p20_us: float
    p80_us: float
    samples: int
    copies: int

    @classmethod
    def of(cls, seconds: list[float], copies: int) -> GpuTiming:
        """Summary of the seconds of one call in every replay."""
        timing = Timing.of(seconds)
        micro = (timing.median_s * 1e6, timing.p20_s * 1e6, timing.p80_s * 1e6)
        return cls(*micro, timing.samples, copies)


class Timer(Protocol):
    """Times variants on one device."""

    device: torch.device

    def time(self, calls: Mapping[str, GpuCall], *, seconds: float) -> dict[str, GpuTiming]:
        """Time every variant, interleaved, until the seconds are used up."""


class HostTimer:
    """The rehearsal: calls by the host's clock, one copy, at least one round."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def time(self, calls: Mapping[str, GpuCall], *, seconds: float) -> dict[str, GpuTiming]:
        """One call of each variant a round."""
        found: dict[str, list[float]] = {name: [] for name in calls}
        start = time.perf_counter()
        for name in _turns(list(calls), lambda _: time.perf_counter() - start < seconds, 1):
            began = time.perf_counter()
            calls[name].run(0)
            found[name].append(time.perf_counter() - began)
        return {name: GpuTiming.of(times, 1) for name, times in found.items()}


class GraphTimer:
    """CUDA graphs and events; see the module.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        l2_bytes = int(torch.cuda.get_device_properties(device).L2_cache_size)
        self.l2_bytes = l2_bytes or 64 << 20
        self._flush = torch.empty(2 * self.l2_bytes, dtype=torch.int8, device=device)
        self._stream = torch.cuda.Stream(device)
        # one pool for all graphs: they run one after another, and nobody reads their results
        self._pool = torch.cuda.graph_pool_handle()

    def time(self, calls: Mapping[str, GpuCall], *, seconds: float) -> dict[str, GpuTiming]:
        """Capture every variant, then replay in turns until the seconds are used up."""
        captured = {name: self._capture(call) for name, call in calls.items()}
        events: dict[str, list[_Span]] = {name: [] for name in calls}
        start = time.perf_counter()

        def goes_on(done: int) -> bool:
            torch.cuda.synchronize(self.device)  # a round at a time: no long queue
            return done < _MOST_ROUNDS and time.perf_counter() - start < seconds

        for name in _turns(list(calls), goes_on, _LEAST_ROUNDS):
            events[name].append(self._replay(captured[name], calls[name].activations))
        torch.cuda.synchronize(self.device)
        return {
            name: GpuTiming.of([span.seconds() / captured[name].copies for span in spans], copies)
            for name, spans in events.items()
            for copies in (captured[name].copies,)
        }

    def _capture(self, call: GpuCall) -> _Captured:
        for _ in range(_WARM_UPS):  # compiles, and lets libraries choose their kernels
            call.run(0)
        probe = self._record(call.run, _PROBE_COPIES)
        self._replay(probe, call.activations)
        span = self._replay(probe, call.activations)
        torch.cuda.synchronize(self.device)
        copies = copies_for(span.seconds() / probe.copies)
        return probe if copies <= probe.copies else self._record(call.run, copies)

    def _record(self, run: Callable[[int], Any], copies: int) -> _Captured:
        """Capture calls, without the garbage collection and emptied caches of `torch.cuda.graph`.

        Those cost more than a tile's whole measurement.
        """
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        with torch.cuda.stream(self._stream):
            for i in range(copies):  # makes the copies
                run(i)
            self._stream.synchronize()
            graph.capture_begin(pool=self._pool)
            try:
                for i in range(copies):
                    run(i)
            finally:
                graph.capture_end()
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        return _Captured(graph, copies)

    def _replay(self, captured: _Captured, activations: Sequence[Tensor]) -> _Span:
        self._flush.zero_()
        for tensor in activations:
            tensor.amax()
        span = _Span()
        span.first.record()
        captured.graph.replay()
        span.last.record()
        return span


def copies_for(seconds: float) -> int:
    """How many calls of a duration make a replay long enough."""
    wanted = math.ceil(LEAST_US * 1e-6 / max(seconds, 1e-9))
    return max(1, min(MOST_COPIES, wanted))


@dataclass(frozen=True)
class _Captured:
    graph: Any
    copies: int


@dataclass(frozen=True)
class _Span:
    first: Any = field(default_factory=lambda: torch.cuda.Event(enable_timing=True))
    last: Any = field(default_factory=lambda: torch.cuda.Event(enable_timing=True))

    def seconds(self) -> float:
        return float(self.first.elapsed_time(self.last)) * 1e-3


def _turns(
    names: Sequence[str], goes_on: Callable[[int], bool], least_rounds: int
) -> Iterator[str]:
    """Names in rounds, each beginning with the next name, as long as it goes on."""
    done = 0
    while done < least_rounds or goes_on(done):
        for turn in range(len(names)):
            yield names[(done + turn) % len(names)]
        done += 1


def make_timer(device: torch.device) -> Timer:
    """The timer of a device: graphs on a GPU, the host's clock in the interpreter."""
    return GraphTimer(device) if device.type == "cuda" else HostTimer()
