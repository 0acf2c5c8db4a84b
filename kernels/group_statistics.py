"""Mean and deviation of groups of channels: what ``kernels/groupnorm.py`` normalizes with.

The image is [B, pixels, C], channels side by side, read in tiles of pixels by channels, along the
channels. A program takes whole groups of one chunk of pixels:

    pixels  |  groups of 10 channels, 4 a program: 40 channels, 80 bytes of float16
    chunk 0 |  b0 b0 b0 b0 | b1 b1 b1 b1 | ...          and writes of each group: base, mean - base,
    chunk 1 |  b0 b0 b0 b0 | b1 b1 b1 b1 | ...          and the sum of (x - mean)^2 over the chunk

Sums are taken of x - base, where base is the group's mean over the first pixel of the sample, and
of squares about the tile's own mean: nothing cancels, however large the mean is. From the mean of n
of N numbers to the mean of all it is at most sqrt(N / n) deviations, here sqrt(pixels). Tiles and
chunks are combined by the formula of Chan, Golub and LeVeque ("Updating formulae and a pairwise
algorithm for computing sample variances", 1979), chunks by the kernel that normalizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ptq4adm.kernels.device import reciprocal_deviation
from ptq4adm.kernels.launch import launch, multiprocessors

# chunks of a sample; more would cost the kernel that combines them more than they speed up this
_MOST_CHUNKS = 32
# channels of a program, at least: 64 bytes of a pixel, two sectors, are read together
_LEAST_WIDTH = 32
_MOST_CHANNELS = 1024
# elements of a tile: 4 warps hold 32 each, as sums over it need barriers
_TILE = 4096
_LEAST_TILE = 1024
_NUM_WARPS = 4


@triton.jit
def of_channels(values, is_member):
    """Values of groups [GROUPS] to values of their channels [CHANNELS]."""
    return tl.sum(tl.where(is_member, values[None, :], 0.0), axis=1)


@triton.jit
def _sum_groups(sums, is_member):
    """Sums of channels [CHANNELS] to sums of groups [GROUPS]."""
    return tl.sum(tl.where(is_member, sums[:, None], 0.0), axis=0)


@triton.jit
def _load_tile(first_ptr, offs_p, offs_c, last_pixel, channels, pixel_stride):
    """A tile as it is in memory, [PIXELS, CHANNELS], zero outside; and which of it is inside."""
    mask = (offs_p < last_pixel)[:, None] & (offs_c < channels)[None, :]
    offs = offs_p.to(tl.int64)[:, None] * pixel_stride + offs_c[None, :]
    return tl.load(first_ptr + offs, mask=mask, other=0.0), mask


@triton.jit
def _statistics_kernel(
    # tensors
    x_ptr,  # float [B, pixels, C]
    partials_ptr,  # fp32 [3, B, G, chunks]: base, mean - base, sum of (x - mean)^2
    # sizes
    B,
    pixels,
    C,
    G,
    chunks,
    chunk_pixels,
    sample_stride,
    pixel_stride,
    GROUP_CHANNELS: tl.constexpr,  # C / G
    # tile
    GROUPS: tl.constexpr,  # of a program
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    # --- which groups, which chunk ----------------------------------------------------------
    WIDTH: tl.constexpr = GROUPS * GROUP_CHANNELS  # channels of a program
    TILES: tl.constexpr = (WIDTH + CHANNELS - 1) // CHANNELS  # side by side: 1, or of one group
    LANES: tl.constexpr = CHANNELS if TILES > 1 else GROUP_CHANNELS  # of a group in a tile
    blocks = tl.cdiv(G, GROUPS)
    block = tl.program_id(0) % blocks
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    chunk = tl.program_id(1)
    first_pixel = chunk * chunk_pixels
    last_pixel = tl.minimum(first_pixel + chunk_pixels, pixels)
    channels = tl.minimum(C - block * WIDTH, WIDTH)
    first_ptr = x_ptr + sample * sample_stride + block * WIDTH
    offs_p = tl.arange(0, PIXELS)
    lanes = tl.arange(0, CHANNELS)
    groups = tl.arange(0, GROUPS)
    # lanes behind the last group read nothing; in a group wider than a tile, every lane is of it
    is_member = tl.minimum(lanes // GROUP_CHANNELS, GROUPS - 1)[:, None] == groups[None, :]

    # --- main loop over tiles ---------------------------------------------------------------
    # each tile is on its way while the one before is summed
    x, mask = _load_tile(first_ptr, first_pixel + offs_p, lanes, last_pixel, channels, pixel_stride)
    first = tl.load(first_ptr + lanes, mask=lanes < channels, other=0.0).to(tl.float32)
    base = _sum_groups(first, is_member) / LANES
    base_of_channels = of_channels(base, is_member)[None, :]
    count = tl.zeros((GROUPS,), dtype=tl.float32)
    mean = tl.zeros((GROUPS,), dtype=tl.float32)  # relative to base
    squares = tl.zeros((GROUPS,), dtype=tl.float32)
    for tile in range(0, tl.cdiv(last_pixel - first_pixel, PIXELS) * TILES):
        pixel = first_pixel + tile // TILES * PIXELS
        lane = tile % TILES * CHANNELS
        next_x, next_mask = _load_tile(
            first_ptr,
            first_pixel + (tile + 1) // TILES * PIXELS + offs_p,
            (tile + 1) % TILES * CHANNELS + lanes,
            last_pixel,
            channels,
            pixel_stride,
        )
        n = tl.minimum(last_pixel - pixel, PIXELS) * tl.minimum(GROUP_CHANNELS - lane, LANES)
        n = n.to(tl.float32)
        centered = tl.where(mask, x.to(tl.float32) - base_of_channels, 0.0)
        tile_mean = _sum_groups(tl.sum(centered, axis=0), is_member) / n
        centered = tl.where(mask, centered - of_channels(tile_mean, is_member)[None, :], 0.0)
        tile_squares = _sum_groups(tl.sum(centered * centered, axis=0), is_member)
        # Chan's formula, for the numbers so far and those of the tile
        share = n / (count + n)
        distance = tile_mean - mean
        squares += tile_squares + distance * distance * count * share
        mean += distance * share
        count += n
        x, mask = next_x, next_mask

    # --- store ------------------------------------------------------------------------------
    group = block * GROUPS + groups
    field = B * G * chunks
    offs = (sample * G + group) * chunks + chunk
    tl.store(partials_ptr + offs, base, mask=group < G)
    tl.store(partials_ptr + field + offs, mean, mask=group < G)
    tl.store(partials_ptr + 2 * field + offs, squares, mask=group < G)


@triton.jit
def combine_chunks(
    partials_ptr,  # see _statistics_kernel
    sample,
    group,  # [GROUPS]
    B,
    pixels,
    G,
    chunks,
    chunk_pixels,
    eps,
    GROUP_CHANNELS: tl.constexpr,
    CHUNKS: tl.constexpr,  # power of two, at least chunks
):
    """Base, mean - base and 1 / sqrt(var + eps) of groups, each [GROUPS]."""
    chunk = tl.arange(0, CHUNKS)
    field = B * G * chunks
    offs = (sample * G + group)[:, None] * chunks + chunk[None, :]
    mask = (group < G)[:, None] & (chunk < chunks)[None, :]
    means = tl.load(partials_ptr + field + offs, mask=mask, other=0.0)
    squares = tl.load(partials_ptr + 2 * field + offs, mask=mask, other=0.0)
    base = tl.load(partials_ptr + (sample * G + group) * chunks, mask=group < G, other=0.0)
    # a chunk that the mask leaves out counts no pixels
    n = tl.minimum(tl.maximum(pixels - chunk * chunk_pixels, 0), chunk_pixels)
    n = (n * GROUP_CHANNELS).to(tl.float32)[None, :]
    total = pixels * (GROUP_CHANNELS * 1.0)
    mean = tl.sum(means * n, axis=1) / total
    distance = means - mean[:, None]
    variance = tl.sum(squares + distance * distance * n, axis=1) / total
    return base, mean, reciprocal_deviation(variance, eps)


@dataclass(frozen=True, slots=True)
class StatisticsTile:
    """How the statistics are cut into programs.

    Attributes:
        groups: of a program, a power of two.
        channels: of a tile, a power of two; fewer than a group has if it is wide.
        pixels: of a tile, a power of two.
        chunk_pixels: of a program, a multiple of ``pixels``.
        chunks: of a sample.
    """

    groups: int
    channels: int
    pixels: int
    chunk_pixels: int
    chunks: int


@cache
def plan_statistics(
    batch: int, pixels: int, channels: int, groups: int, multiprocessors: int
) -> StatisticsTile:
    """Return the tile of an image, from its sizes.

    A program takes as many groups as begin on 16 bytes of float16 and are not too narrow: 4 of 10
    channels, 8 of 4, 1 of 40. It takes one tile where ``_MOST_CHUNKS`` allow it, and a smaller one
    where there would be multiprocessors without a program.
    """
    width = channels // groups
    count = 1
    while (
        count < groups
        and (count * width % 8 or count * width < _LEAST_WIDTH)
        and 2 * count * width <= _MOST_CHANNELS
    ):
        count *= 2
    columns = min(triton.next_power_of_2(count * width), _MOST_CHANNELS)
    rows = min(_TILE // columns, triton.next_power_of_2(pixels))
    blocks = batch * triton.cdiv(groups, count)
    while rows * columns > _LEAST_TILE and blocks * triton.cdiv(pixels, rows) < multiprocessors:
        rows //= 2
    chunk_pixels = rows * triton.cdiv(triton.cdiv(pixels, rows), _MOST_CHUNKS)
    return StatisticsTile(count, columns, rows, chunk_pixels, triton.cdiv(pixels, chunk_pixels))


def group_statistics(x: Tensor, num_groups: int) -> tuple[Tensor, StatisticsTile]:
    """Take the statistics of groups of channels, a chunk of pixels at a time.

    Args:
        x: float32, float16 or bfloat16 [B, pixels, C], channels side by side, samples and pixels
            at any distance; not empty.
        num_groups: G, a divisor of C.

    Returns:
        float32 [3, B, G, chunks], for ``combine_chunks``; and the chunks.
    """
    B, pixels, C = x.shape
    tile = plan_statistics(B, pixels, C, num_groups, multiprocessors(x.device))
    partials = torch.empty(3, B, num_groups, tile.chunks, dtype=torch.float32, device=x.device)
    launch(
        _statistics_kernel,
        (B * triton.cdiv(num_groups, tile.groups), tile.chunks),
        x.device,
        x,
        partials,
        B,
        pixels,
        C,
        num_groups,
        tile.chunks,
        tile.chunk_pixels,
        x.stride(0),
        x.stride(1),
        GROUP_CHANNELS=C // num_groups,
        GROUPS=tile.groups,
        CHANNELS=tile.channels,
        PIXELS=tile.pixels,
        num_warps=_NUM_WARPS,
    )
    return partials, tile
