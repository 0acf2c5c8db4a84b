"""What the tuner asks of a backend: which tiles a product may have, and where the best is kept."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from ptq4adm.bench.gpu_backends import CUDA, TRITON
from ptq4adm.bench.gpu_calls import Tile
from ptq4adm.errors import ConfigError
from ptq4adm.kernels import tuner
from ptq4adm.kernels.tuning import BLOCK_K, Problem, TileConfig
from ptq4adm.ops import cuda_choice, cuda_tiles
from ptq4adm.ops.cuda_tiles import CudaTile

# a grid of this many blocks a multiprocessor gains nothing from more of them
_FULL_GRID = 4


class TileSet(Protocol):
    """The tiles of one backend."""

    def candidates(self, problem: Problem, limit: int | None) -> tuple[Tile, ...]:
        """Tiles to measure, that which is used without measurements first; None: no limit."""

    def is_measured(self, problem: Problem, folder: Path | None) -> bool:
        """Whether the files hold a tile for this very M that can be used."""

    def write(self, problem: Problem, tile: Tile, folder: Path | None) -> Path:
        """Add the tile of one M to its file, and return the file."""


class TritonTiles:
    """`kernels.tuner`: a file for each class of products; compiling is the price of a tile."""

    def candidates(self, problem: Problem, limit: int | None) -> tuple[Tile, ...]:
        """The planned tile, the plan's best ones and their neighbours."""
        return tuner.candidates(problem, tuner.MOST_CANDIDATES if limit is None else limit)

    def is_measured(self, problem: Problem, folder: Path | None) -> bool:
        """See `tuner.is_measured`."""
        return tuner.is_measured(problem, folder)

    def write(self, problem: Problem, tile: Tile, folder: Path | None) -> Path:
        """See `tuner.write`."""
        assert isinstance(tile, TileConfig)
        return tuner.write(problem, tile, folder)


class CudaTiles:
    """The compiled kernels: every tile and split, into one file a GPU."""

    def candidates(self, problem: Problem, limit: int | None) -> tuple[Tile, ...]:
        """The counted tile, then all others, those that differ least from it first.

        Sums are split only where a split has a step at least, and whole tiles do not fill the GPU.
        """
        steps = problem.K // BLOCK_K
        counted = cuda_choice.counted_tile(problem)
        found = [
            tile
            for whole in cuda_choice.possible_tiles(problem)
            for split in cuda_choice.SPLITS
            if _is_worth_it(tile := replace(whole, split_k=split), steps, problem)
        ]
        found.sort(key=lambda tile: _distance(tile, counted))
        return tuple(dict.fromkeys([counted, *found]))[:limit]

    def is_measured(self, problem: Problem, folder: Path | None) -> bool:
        """Whether the GPU's file holds a tile for this very M."""
        return problem.M in _measured(problem, folder)

    def write(self, problem: Problem, tile: Tile, folder: Path | None) -> Path:
        """Add the tile of one M to the GPU's file, and return the file.

        Raises:
            ConfigError: if the emulator's times would be written into the package.
        """
        assert isinstance(tile, CudaTile)
        path = _file(problem, folder)
        tiles = {name: dict(by_m) for name, by_m in cuda_tiles.load(path, problem.device).items()}
        by_m = tiles.setdefault(cuda_tiles.class_name(problem), {})
        by_m[problem.M] = tile
        cuda_tiles.save(path, problem.device, tiles)
        return path


def _is_worth_it(tile: CudaTile, steps: int, problem: Problem) -> bool:
    blocks = -(-problem.M // tile.block_m) * -(-problem.N // tile.block_n)
    is_full = blocks >= _FULL_GRID * problem.multiprocessors
    return tile.split_k == 1 or (tile.split_k <= steps and not is_full)


def _distance(tile: CudaTile, other: CudaTile) -> float:
    """How many doublings of rows, channels and splits are between two tiles."""
    pairs = zip(
        (tile.block_m, tile.block_n, tile.split_k),
        (other.block_m, other.block_n, other.split_k),
        strict=True,
    )
    return sum(abs(math.log2(mine / its)) for mine, its in pairs)


def _measured(problem: Problem, folder: Path | None) -> dict[int, CudaTile]:
    tiles = cuda_tiles.load(_file(problem, folder), problem.device)
    return tiles.get(cuda_tiles.class_name(problem), {})


def _file(problem: Problem, folder: Path | None) -> Path:
    if folder is None and problem.capability == 0:
        raise ConfigError(
            f"device {problem.device!r}: the emulator's times say nothing of a GPU; give "
            "--output DIR to rehearse"
        )
    return cuda_tiles.config_file(problem.device, folder)


TILE_SETS: dict[str, TileSet] = {TRITON: TritonTiles(), CUDA: CudaTiles()}
