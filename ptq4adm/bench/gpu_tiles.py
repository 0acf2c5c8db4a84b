"""How this package's products of a layer are cut into tiles, for rows and for the tuner."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ptq4adm.bench.gpu_calls import empty_call
from ptq4adm.bench.gpu_shapes import GpuLayer
from ptq4adm.kernels import tuning
from ptq4adm.kernels.tuning import Problem, TileConfig

if TYPE_CHECKING:
    from ptq4adm.bench.gpu_problem import GpuProblem


def tuning_problem(
    layer: GpuLayer,
    bits: int,
    device: torch.device,
    *,
    is_gated: bool = False,
    is_grouped: bool = False,
) -> Problem:
    """What the tile of a layer is chosen by.

    Args:
        layer: a matrix product.
        bits: of its weights.
        device: the GPU.
        is_gated: whether a GEGLU follows in the same kernel.
        is_grouped: whether groups of 64 weights have multipliers.
    """
    call = empty_call(layer, bits, device, is_gated=is_gated, is_grouped=is_grouped)
    return call.problem()


def tile_of(problem: GpuProblem, bits: int, *, is_gated: bool = False) -> str:
    """The tile that a product runs with, in words; empty for a backend without tiles."""
    if problem.backend != "triton":
        return ""
    asked = tuning_problem(problem.layer, bits, problem.device, is_gated=is_gated)
    return describe(tuning.find_config(asked))


def describe(config: TileConfig) -> str:
    """Like ``128x64x64 w4 s4 k2 tma``: rows x channels x k, warps, stages, splits, form."""
    split = f" k{config.split_k}" if config.split_k > 1 else ""
    return (
        f"{config.block_m}x{config.block_n}x{config.block_k} w{config.num_warps} "
        f"s{config.num_stages}{split} {config.form}"
    )


def use_configs(folder: Path | None) -> None:
    """Take measured tiles from another folder than the package's; None leaves it."""
    if folder is not None:
        tuning.CONFIGS = folder
        tuning.load_configs.cache_clear()
        tuning.find_config.cache_clear()
