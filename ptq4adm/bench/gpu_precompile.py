"""Compile kernels on all cores before they are needed: one process would take minutes.

Children compile for the GPU from CPU tensors, without touching it (`kernels.launch.compile_only`),
into Triton's cache on disk, where the measuring process finds them.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Hashable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from ptq4adm.bench.gpu_activations import compile_quantizer
from ptq4adm.bench.gpu_calls import empty_call
from ptq4adm.bench.gpu_shapes import GpuLayer
from ptq4adm.kernels import launch
from ptq4adm.kernels.tuning import TMA, TileConfig

_MOST_WORKERS = 24


@dataclass(frozen=True)
class Wanted:
    """One kernel, or the few of one norm or gate, to compile.

    Attributes:
        layer: whose sizes are passed.
        config: the tile; None for a norm or a gate.
        bits: of the weights.
        is_gated: with GEGLU.
        is_int8: a product with int8 output; a norm or gate with a static scale.
    """

    layer: GpuLayer
    config: TileConfig | None = None
    bits: int = 4
    is_gated: bool = False
    is_int8: bool = False

    def key(self) -> Hashable:
        """Equal for calls that most likely are one kernel: Triton tells sizes apart by these."""
        shape, config = self.layer.shape, self.config
        if config is None:
            return shape, self.is_int8
        sizes = (shape.M, shape.N, shape.in_channels, shape.height, shape.width)
        kinds = tuple((size == 1, size % 16 == 0) for size in sizes)
        is_masked = shape.in_channels % config.block_k != 0
        form = (shape.kind, shape.width if config.form == TMA else 0)
        return form, self.bits, self.is_gated, self.is_int8, config, kinds, is_masked


def precompile(
    wanted: Iterable[Wanted], device: torch.device, *, progress: bool = True
) -> list[str]:
    """Compile kernels into Triton's cache.

    Args:
        wanted: what.
        device: the GPU that they are for.
        progress: show a bar on a terminal.

    Returns:
        What could not be compiled, in words; it will fail again where it is run.
    """
    tasks = list({task.key(): task for task in wanted}.values())
    target = (launch.capability(device), launch.multiprocessors(device))
    workers = min(_MOST_WORKERS, len(tasks), len(os.sched_getaffinity(0)))
    if workers < 2:
        return []
    failed = []
    # spawned: a forked child would inherit the GPU's state
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = {pool.submit(compile_task, task, *target): task for task in tasks}
        bar = tqdm(
            as_completed(futures),
            total=len(futures),
            desc=f"compile, {workers} processes",
            unit="kernel",
            disable=None if progress else True,
        )
        for future in bar:
            error = future.exception()
            if error is not None:
                task = futures[future]
                failed.append(f"{task.layer.shape}, {task.config}: {type(error).__name__}: {error}")
    return failed


def compile_task(task: Wanted, capability: int, multiprocessors: int) -> None:
    """Compile, in a child, for a GPU of a compute capability and number of multiprocessors."""
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    with launch.compile_only(capability, multiprocessors), torch.inference_mode():
        if task.config is None:
            compile_quantizer(task.layer, is_static=task.is_int8)
        else:
            call = empty_call(
                task.layer, task.bits, cpu, is_gated=task.is_gated, is_int8=task.is_int8
            )
            call.run(task.config)
