"""Compile kernels on all cores before they are needed: one process would take minutes.

Children compile for the GPU from CPU tensors, without touching it (`kernels.launch.compile_only`),
into Triton's cache on disk, where the measuring process finds them. A kernel takes 0.1 to 1.4 s of
one core, so callers compile and measure in batches, and nothing is begun after a deadline.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as TimedOutError
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

import torch

from ptq4adm.bench.gpu_activations import compile_quantizer
from ptq4adm.bench.gpu_calls import empty_call
from ptq4adm.bench.gpu_progress import with_progress
from ptq4adm.bench.gpu_shapes import GpuLayer
from ptq4adm.kernels import launch
from ptq4adm.kernels.tuning import TMA, TileConfig

_MOST_WORKERS = 24
_LONGEST = 300
T = TypeVar("T")


@dataclass(frozen=True)
class Wanted:
    """One kernel, or the few of one norm or gate, to compile.

    Attributes:
        layer: whose sizes are passed.
        config: the tile; None for a norm or a gate.
        bits: of the weights.
        is_gated: with GEGLU.
        is_int8: a product with int8 output; a norm or gate with a static scale.
        is_grouped: groups of 64 weights have multipliers.
    """

    layer: GpuLayer
    config: TileConfig | None = None
    bits: int = 4
    is_gated: bool = False
    is_int8: bool = False
    is_grouped: bool = False

    def key(self) -> Hashable:
        """Equal for calls that most likely are one kernel: Triton tells sizes apart by these."""
        shape, config = self.layer.shape, self.config
        if config is None:
            return shape, self.is_int8
        sizes = (shape.M, shape.N, shape.in_channels, shape.height, shape.width)
        kinds = tuple((size == 1, size % 16 == 0) for size in sizes)
        is_masked = shape.in_channels % config.block_k != 0
        form = (shape.kind, shape.width if config.form == TMA else 0)
        variant = (self.bits, self.is_gated, self.is_int8, self.is_grouped)
        return form, variant, config, kinds, is_masked


class Precompiler:
    """Processes that compile, kept from one batch to the next; a context manager.

    Args:
        device: the GPU that kernels are for; one that is no GPU compiles nothing.
        ends: `time.perf_counter` after which nothing is waited for; None for no limit.
        progress: show a bar on a terminal.

    Attributes:
        failed: what could not be compiled, in words; it will fail again where it is run.
    """

    def __init__(
        self, device: torch.device, *, ends: float | None = None, progress: bool = True
    ) -> None:
        self.failed: list[str] = []
        self._device, self._ends, self._progress = device, ends, progress
        self._done: set[Hashable] = set()
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Precompiler:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the processes; what they are at is waited for, a second or two."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def compile(self, wanted: Iterable[Wanted]) -> bool:
        """Compile what an earlier batch did not.

        Args:
            wanted: kernels.

        Returns:
            Whether all was tried before the deadline.
        """
        tasks = {task.key(): task for task in wanted}
        tasks = {key: task for key, task in tasks.items() if key not in self._done}
        workers = min(_MOST_WORKERS, len(os.sched_getaffinity(0)))
        if self._device.type != "cuda" or workers < 2 or not tasks:
            return True
        if self._pool is None:
            # spawned: a forked child would inherit the GPU's state
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(workers, mp_context=context)
        target = (launch.capability(self._device), launch.multiprocessors(self._device))
        futures = {
            self._pool.submit(compile_task, task, *target): (key, task)
            for key, task in tasks.items()
        }
        is_complete = self._collect(futures)
        if not is_complete:
            self.close()
        return is_complete

    def _collect(self, futures: dict[Future[None], tuple[Hashable, Wanted]]) -> bool:
        left = None if self._ends is None else max(0.0, self._ends - time.perf_counter())
        finished = with_progress(
            as_completed(futures, timeout=left),
            "compile",
            "kernel",
            total=len(futures),
            is_shown=self._progress,
        )
        try:
            for future in finished:
                key, task = futures[future]
                self._done.add(key)
                error = future.exception()
                if error is not None:
                    self.failed.append(_describe(task, error))
        except TimedOutError:
            return False
        return True


def compiled_batches(
    items: Sequence[T],
    wanted: Callable[[list[T]], list[Wanted]],
    compiler: Precompiler,
    *,
    size: int,
) -> Iterator[tuple[T, bool]]:
    """Compile for some items, hand them out, compile for the next: nothing compiles meanwhile.

    Args:
        items: in order.
        wanted: kernels of several items.
        compiler: whose deadline holds.
        size: items of a batch.

    Yields:
        An item, and whether its batch was compiled before the deadline.
    """
    is_ready = True
    for first in range(0, len(items), size):
        batch = list(items[first : first + size])
        is_ready = is_ready and compiler.compile(wanted(batch))
        for item in batch:
            yield item, is_ready


def _describe(task: Wanted, error: BaseException) -> str:
    reason = f"{task.layer.shape}, {task.config}: {type(error).__name__}: {error}"
    return " ".join(reason.split())[:_LONGEST]


def compile_task(task: Wanted, capability: int, multiprocessors: int) -> None:
    """Compile, in a child, for a GPU of a compute capability and number of multiprocessors."""
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    with launch.compile_only(capability, multiprocessors), torch.inference_mode():
        if task.config is None:
            compile_quantizer(task.layer, is_static=task.is_int8)
        else:
            call = empty_call(
                task.layer,
                task.bits,
                cpu,
                is_gated=task.is_gated,
                is_int8=task.is_int8,
                is_grouped=task.is_grouped,
            )
            call.run(task.config)
