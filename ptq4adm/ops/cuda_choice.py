"""Which tile a product of backend ``cuda`` has: measured where it was, else by counting blocks."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from ptq4adm.errors import ConfigError
from ptq4adm.kernels.tuning import Problem
from ptq4adm.ops import cuda_backend, cuda_tiles
from ptq4adm.ops.cuda_tiles import SM90A, CudaTile
from ptq4adm.packing.layout import BLOCK_K

_SM90 = 90  # the capability that has the family sm90a
# how well the tensor cores are fed, beside the largest tile: assumed from what a block reads for
# each product, until the tuner has measured
_TILE_WORTH = {(128, 128): 1.0, (128, 64): 0.95, (64, 64): 0.8, (64, 32): 0.6}
_FIXED_STEPS = 4  # of k that filling the pipeline and storing the result are worth
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
_LEAST_STEPS = 4  # a split has


@cache  # every product asks
def choose_tile(M: int, N: int, steps: int, processors: int) -> CudaTile:
    """Return the tile and split that should take the least time; counted, not measured.

    Always of family ``sm80``, until ``sm90a`` has won on a recorded row.

    Args:
        M: rows of the product.
        N: output channels, before gating.
        steps: of 64 k, over all taps and segments.
        processors: multiprocessors of the GPU.
    """

    def cost(tile: CudaTile) -> float:
        blocks = -(-M // tile.block_m) * -(-N // tile.block_n) * tile.split_k
        # a slab is written and read again, and the last block reads all of them
        fixed = _FIXED_STEPS if tile.split_k == 1 else 2 * _FIXED_STEPS + tile.split_k
        size = tile.block_m * tile.block_n / _TILE_WORTH[tile.block_m, tile.block_n]
        return -(-blocks // processors) * size * (-(-steps // tile.split_k) + fixed)

    splits = [split for split in SPLITS if split == 1 or steps >= _LEAST_STEPS * split]
    return min((CudaTile(*size, split) for size in _TILE_WORTH for split in splits), key=cost)


def counted_tile(problem: Problem) -> CudaTile:
    """Return the tile of a product that `choose_tile` takes."""
    return choose_tile(problem.M, problem.N, problem.K // BLOCK_K, problem.multiprocessors)


def possible_tiles(problem: Problem) -> list[CudaTile]:
    """Return every tile that a product can have on its GPU in this build, without split K."""
    compiled = cuda_backend.module()
    found = [CudaTile(info.block_m, info.block_n) for info in compiled.matmul_tiles()]
    has_boxes = problem.box is not None or problem.kernel.endswith("gemm")
    if problem.capability == _SM90 and has_boxes:
        found += [
            CudaTile(info.block_m, info.block_n, family=SM90A)
            for info in compiled.matmul_sm90a_tiles()
        ]
    return found


def find_tile(problem: Problem) -> CudaTile:
    """Return the tile of a product: measured, if there is one for its class, else counted.

    Args:
        problem: the product; its ``capability`` 0 stands for the emulator, its ``box`` is there if
            a convolution's activations can come as boxes.

    Raises:
        ConfigError: if the GPU's file of tiles is broken, or holds a tile that there is not.
    """
    measured = cuda_tiles.find(problem)
    if measured is None:
        return counted_tile(problem)
    if replace(measured, split_k=1) not in possible_tiles(problem):
        path = cuda_tiles.config_file(problem.device)
        raise ConfigError(
            f"{path}: {measured}: this build has no such tile; run ptq4adm tune --backend cuda "
            "--fresh, or build for the GPU (PTQ4ADM_CUDA_ARCHS)"
        )
    return measured
