"""How this package's products of a layer are cut into tiles, for rows and for the tuner."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ptq4adm.bench.gpu_backends import BACKENDS, CUDA, TRITON
from ptq4adm.bench.gpu_calls import Tile, empty_call
from ptq4adm.bench.gpu_shapes import GpuLayer
from ptq4adm.kernels import launch, tuning
from ptq4adm.kernels.tuning import Problem, TileConfig
from ptq4adm.ops import cuda_choice, cuda_tiles

if TYPE_CHECKING:
    from ptq4adm.bench.gpu_problem import GpuProblem


def tuning_problem(
    layer: GpuLayer,
    bits: int,
    device: torch.device,
    *,
    is_gated: bool = False,
    is_grouped: bool = False,
    backend: str = TRITON,
) -> Problem:
    """What the tile of a layer is chosen by.

    Args:
        layer: a matrix product.
        bits: of its weights.
        device: the GPU.
        is_gated: whether a GEGLU follows in the same kernel.
        is_grouped: whether groups of 64 weights have multipliers.
        backend: whose tile.
    """
    call = empty_call(
        layer, bits, device, is_gated=is_gated, is_grouped=is_grouped, backend=backend
    )
    return call.problem()


def tile_of(problem: GpuProblem, bits: int, backend: str, *, is_gated: bool = False) -> Tile | None:
    """The tile that a product runs with; None for a backend without tiles."""
    if backend not in BACKENDS:
        return None
    found = tuning_problem(problem.layer, bits, problem.device, is_gated=is_gated, backend=backend)
    return chosen_tile(found, backend)


def chosen_tile(problem: Problem, backend: str) -> Tile:
    """The tile that a backend for GPUs looks up for a problem."""
    return cuda_choice.find_tile(problem) if backend == CUDA else tuning.find_config(problem)


def describe(tile: Tile) -> str:
    """A tile in words.

    Like ``128x64x64 w4 s4 k2 tma`` (``triton``: rows x channels x k, warps, stages, splits, form)
    or ``sm80 128x64 k2`` (``cuda``: family, rows x channels, splits).
    """
    split = f" k{tile.split_k}" if tile.split_k > 1 else ""
    if isinstance(tile, TileConfig):
        return (
            f"{tile.block_m}x{tile.block_n}x{tile.block_k} w{tile.num_warps} "
            f"s{tile.num_stages}{split} {tile.form}"
        )
    return f"{tile.family} {tile.block_m}x{tile.block_n}{split}"


def tile_columns(backend: str, tile: Tile | None) -> dict[str, str | int]:
    """Columns that end a row: backend, family of the cuda backend's kernels, sizes and splits."""
    columns: dict[str, str | int] = {"backend": backend, "family": ""}
    if tile is None:
        return columns | dict.fromkeys(("block_m", "block_n", "split_k"), "")
    if not isinstance(tile, TileConfig):
        columns["family"] = tile.family
    return columns | {
        "block_m": tile.block_m,
        "block_n": tile.block_n,
        "split_k": tile.split_k,
    }


def check_configs(backends: Sequence[str], device: torch.device) -> None:
    """Read the measured tiles of the cuda backend, before anything is measured.

    Raises:
        ConfigError: if the file is broken.
    """
    if CUDA in backends:
        name = launch.device_name(device)
        cuda_tiles.load(cuda_tiles.config_file(name), name)


def use_configs(folder: Path | None) -> None:
    """Take measured tiles from another folder than the package's; None leaves it."""
    if folder is not None:
        tuning.CONFIGS = folder
        tuning.load_configs.cache_clear()
        tuning.find_config.cache_clear()
        cuda_tiles.forget()
