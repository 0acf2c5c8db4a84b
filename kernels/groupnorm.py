"""Group norm, SiLU and quantization: statistics, then norm and quantization, two launches.

    y[b, p, c] = (x[b, p, c] - mean[b, g]) * rstd[b, g] * weight[c] + bias[c],   g = c / (C / G)
    y          = y * sigmoid(y)                                           if asked for          (1)

then as in ``kernels/quantize.py``. A measured scale takes one more launch in between.

The image is [B, pixels, C], channels side by side, and both kernels read it in tiles of pixels by
channels, along the channels. A program of the statistics takes whole groups of one chunk of pixels:

    pixels  |  groups of 10 channels, 4 a program: 40 channels, 80 bytes of float16
    chunk 0 |  b0 b0 b0 b0 | b1 b1 b1 b1 | ...          and writes of each group: base, mean - base,
    chunk 1 |  b0 b0 b0 b0 | b1 b1 b1 b1 | ...          and the sum of (x - mean)^2 over the chunk

Sums are taken of x - base, where base is the group's mean over the first pixel of the sample, and
of squares about the tile's own mean: nothing cancels, however large the mean is. From the mean of n
of N numbers to the mean of all it is at most sqrt(N / n) deviations, here sqrt(pixels). The second
kernel combines the chunks of the groups it needs (Chan, Golub and LeVeque, "Updating formulae and a
pairwise algorithm for computing sample variances", 1979).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from ptq4adm.kernels.activation import PARTIALS, TILE, Scale, given_scale, measured_scale
from ptq4adm.kernels.device import absmax_bits, quantize, reciprocal_deviation, silu
from ptq4adm.kernels.launch import launch
from torch import Tensor

# --- statistics ---------------------------------------------------------------------------------


@triton.jit
def _sum_groups(sums, is_member):
    """Sums of channels [CHANNELS] to sums of groups [GROUPS]."""
    return tl.sum(tl.where(is_member, sums[:, None], 0.0), axis=0)


@triton.jit
def _of_channels(values, is_member):
    """Values of groups [GROUPS] to values of their channels [CHANNELS]."""
    return tl.sum(tl.where(is_member, values[None, :], 0.0), axis=1)


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
    # of a group in a tile
    LANES: tl.constexpr = CHANNELS if GROUP_CHANNELS > CHANNELS else GROUP_CHANNELS
    program = tl.program_id(0)
    blocks = tl.cdiv(G, GROUPS)
    block = program % blocks
    chunk = program // blocks % chunks
    sample = (program // blocks // chunks).to(tl.int64)
    groups = tl.arange(0, GROUPS)
    lanes = tl.arange(0, CHANNELS)
    # lanes behind the last group read nothing; in a group wider than a tile, every lane is of it
    is_member = tl.minimum(lanes // GROUP_CHANNELS, GROUPS - 1)[:, None] == groups[None, :]
    channels = tl.minimum(C - block * WIDTH, WIDTH)
    first_ptr = x_ptr + sample * sample_stride + block * WIDTH
    first = tl.load(first_ptr + lanes, mask=lanes < channels, other=0.0).to(tl.float32)
    base = _sum_groups(first, is_member) / LANES
    base_of_channels = _of_channels(base, is_member)[None, :]

    # --- main loop over tiles ---------------------------------------------------------------
    count = tl.zeros((GROUPS,), dtype=tl.float32)
    mean = tl.zeros((GROUPS,), dtype=tl.float32)  # relative to base
    squares = tl.zeros((GROUPS,), dtype=tl.float32)
    last_pixel = tl.minimum(chunk * chunk_pixels + chunk_pixels, pixels)
    for pixel in range(chunk * chunk_pixels, last_pixel, PIXELS):
        offs_p = (pixel + tl.arange(0, PIXELS)).to(tl.int64)
        mask_p = (offs_p < last_pixel)[:, None]
        for lane in range(0, WIDTH, CHANNELS):
            mask = mask_p & (lane + lanes < channels)[None, :]
            offs = offs_p[:, None] * pixel_stride + (lane + lanes)[None, :]
            x = tl.load(first_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            x = tl.where(mask, x - base_of_channels, 0.0)
            n = tl.minimum(last_pixel - pixel, PIXELS) * tl.minimum(GROUP_CHANNELS - lane, LANES)
            n = n.to(tl.float32)
            tile_mean = _sum_groups(tl.sum(x, axis=0), is_member) / n
            x = tl.where(mask, x - _of_channels(tile_mean, is_member)[None, :], 0.0)
            tile_squares = _sum_groups(tl.sum(x * x, axis=0), is_member)
            # Chan's formula, for the numbers so far and those of the tile
            share = n / (count + n)
            distance = tile_mean - mean
            squares += tile_squares + distance * distance * count * share
            mean += distance * share
            count += n

    # --- store ------------------------------------------------------------------------------
    group = block * GROUPS + groups
    field = B * G * chunks
    offs = (sample * G + group) * chunks + chunk
    tl.store(partials_ptr + offs, base, mask=group < G)
    tl.store(partials_ptr + field + offs, mean, mask=group < G)
    tl.store(partials_ptr + 2 * field + offs, squares, mask=group < G)


# --- norm ---------------------------------------------------------------------------------------


@triton.jit
def _combine_chunks(
    partials_ptr,
    sample,
    group,  # [GROUPS]
    B,
    pixels,
    G,
    chunks,
    chunk_pixels,
    eps,
    GROUP_CHANNELS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Base, mean - base and 1 / sqrt(var + eps) of groups, each [GROUPS]."""
    chunk = tl.arange(0, CHUNKS)
    field = B * G * chunks
    offs = (sample * G + group)[:, None] * chunks + chunk[None, :]
    mask = (group < G)[:, None] & (chunk < chunks)[None, :]
    means = tl.load(partials_ptr + field + offs, mask=mask, other=0.0)
    squares = tl.load(partials_ptr + 2 * field + offs, mask=mask, other=0.0)
    # chunks of the mask count no pixels
    n = tl.minimum(tl.maximum(pixels - chunk * chunk_pixels, 0), chunk_pixels)
    n = (n * GROUP_CHANNELS).to(tl.float32)[None, :]
    total = pixels * (GROUP_CHANNELS * 1.0)
    mean = tl.sum(means * n, axis=1) / total
    distance = means - mean[:, None]
    variance = tl.sum(squares + distance * distance * n, axis=1) / total
    base = tl.load(partials_ptr + (sample * G + group) * chunks, mask=group < G, other=0.0)
    return base, mean, reciprocal_deviation(variance, eps)


@triton.jit
def _channel_norms(
    partials_ptr,
    weight_ptr,
    bias_ptr,
    sample,
    channel,  # [CHANNELS]
    B,
    pixels,
    C,
    G,
    chunks,
    chunk_pixels,
    eps,
    GROUP_CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Base, gain and offset of channels, y = (x - base) * gain + offset, each [1, CHANNELS]."""
    group = channel // GROUP_CHANNELS
    groups = tl.min(group, axis=0) + tl.arange(0, GROUPS)
    base, mean, rstd = _combine_chunks(
        partials_ptr, sample, groups, B, pixels, G, chunks, chunk_pixels, eps, GROUP_CHANNELS,
        CHUNKS,
    )  # fmt: skip
    is_member = group[:, None] == groups[None, :]
    weight = tl.load(weight_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
    gain = _of_channels(rstd, is_member) * weight
    offset = tl.fma(-_of_channels(mean, is_member), gain, bias)
    return _of_channels(base, is_member)[None, :], gain[None, :], offset[None, :]


@triton.jit
def _normalized_tile(
    x_ptr,  # of the sample
    offs_p,
    channel,
    pixels,
    C,
    pixel_stride,
    base,
    gain,
    offset,
    IS_SILU: tl.constexpr,
):
    """Equation (1) for a tile: float32 [PIXELS, CHANNELS], and which of it is inside."""
    mask = (offs_p < pixels)[:, None] & (channel < C)[None, :]
    offs = offs_p[:, None] * pixel_stride + channel[None, :]
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    y = tl.fma(x - base, gain, offset)
    if IS_SILU:
        y = silu(y)
    return y, mask


@triton.jit
def _which_tiles(pixels, C, program_pixels, CHANNELS: tl.constexpr):
    """Sample (int64), first pixel and channels [CHANNELS] of this program; channels run fastest."""
    program = tl.program_id(0)
    blocks = tl.cdiv(C, CHANNELS)
    parts = tl.cdiv(pixels, program_pixels)
    channel = program % blocks * CHANNELS + tl.arange(0, CHANNELS)
    first_pixel = program // blocks % parts * program_pixels
    return (program // blocks // parts).to(tl.int64), first_pixel, channel


@triton.jit
def _absmax_kernel(
    # tensors
    x_ptr,  # float [B, pixels, C]
    partials_ptr,  # see _statistics_kernel
    weight_ptr,  # float [C]
    bias_ptr,  # float [C]
    absmax_ptr,  # int32 [programs]
    # sizes
    B,
    pixels,
    C,
    G,
    chunks,
    chunk_pixels,
    sample_stride,
    pixel_stride,
    program_pixels,
    eps,
    GROUP_CHANNELS: tl.constexpr,
    # tile
    GROUPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    IS_SILU: tl.constexpr,
):
    sample, first_pixel, channel = _which_tiles(pixels, C, program_pixels, CHANNELS)
    base, gain, offset = _channel_norms(
        partials_ptr, weight_ptr, bias_ptr, sample, channel, B, pixels, C, G, chunks, chunk_pixels,
        eps, GROUP_CHANNELS, GROUPS, CHUNKS,
    )  # fmt: skip
    bits = tl.zeros((CHANNELS,), dtype=tl.int32)
    for pixel in range(first_pixel, tl.minimum(first_pixel + program_pixels, pixels), PIXELS):
        y, mask = _normalized_tile(
            x_ptr + sample * sample_stride, (pixel + tl.arange(0, PIXELS)).to(tl.int64), channel,
            pixels, C, pixel_stride, base, gain, offset, IS_SILU,
        )  # fmt: skip
        bits = tl.maximum(bits, tl.max(tl.where(mask, absmax_bits(y), 0), axis=0))
    tl.store(absmax_ptr + tl.program_id(0), tl.max(bits, axis=0))


@triton.jit
def _quantize_kernel(
    # tensors
    x_ptr,  # float [B, pixels, C]
    partials_ptr,  # see _statistics_kernel
    weight_ptr,  # float [C]
    bias_ptr,  # float [C]
    x_q_ptr,  # int8 [B, pixels, C]
    # sizes
    B,
    pixels,
    C,
    G,
    chunks,
    chunk_pixels,
    sample_stride,
    pixel_stride,
    program_pixels,
    eps,
    # see Scale.arguments
    scale_ptr,
    x_scale_ptr,
    table_size,
    step_ptr,
    absmax_ptr,
    absmax_count,
    PARTIALS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    # tile
    GROUPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    IS_SILU: tl.constexpr,
):
    sample, first_pixel, channel = _which_tiles(pixels, C, program_pixels, CHANNELS)
    base, gain, offset = _channel_norms(
        partials_ptr, weight_ptr, bias_ptr, sample, channel, B, pixels, C, G, chunks, chunk_pixels,
        eps, GROUP_CHANNELS, GROUPS, CHUNKS,
    )  # fmt: skip
    if x_scale_ptr is not None:
        scale = given_scale(scale_ptr, x_scale_ptr, table_size, step_ptr)
    else:
        scale = measured_scale(scale_ptr, absmax_ptr, absmax_count, PARTIALS)
    for pixel in range(first_pixel, tl.minimum(first_pixel + program_pixels, pixels), PIXELS):
        offs_p = (pixel + tl.arange(0, PIXELS)).to(tl.int64)
        y, mask = _normalized_tile(
            x_ptr + sample * sample_stride, offs_p, channel, pixels, C, pixel_stride, base, gain,
            offset, IS_SILU,
        )  # fmt: skip
        offs = (sample * pixels + offs_p)[:, None] * C + channel[None, :]
        tl.store(x_q_ptr + offs, quantize(y, scale), mask=mask)


# --- launches -----------------------------------------------------------------------------------

# chunks of a sample that the second kernel combines; more would cost it more than they speed up
# the first
_MOST_CHUNKS = 32
# channels of a statistics program, at least: 64 bytes of a pixel, two sectors, are read together
_LEAST_WIDTH = 32
_MOST_CHANNELS = 1024
# elements of a tile of the statistics: 4 warps hold 32 each, as sums over it need barriers
_STATISTICS_TILE = 4096


@dataclass(frozen=True, slots=True)
class StatisticsTile:
    """How the statistics are cut into programs.

    Attributes:
        groups: of a program, a power of two.
        channels: of a tile, a power of two; fewer than the groups have if they are wide.
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
def plan_statistics(pixels: int, channels: int, groups: int) -> StatisticsTile:
    """Return the tile of an image, from its sizes alone.

    A program takes as many groups as begin on 16 bytes of float16 and are not too narrow: 4 of 10
    channels, 8 of 4, 1 of 40. It takes one tile where ``_MOST_CHUNKS`` allow it.
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
    rows = min(_STATISTICS_TILE // columns, triton.next_power_of_2(pixels))
    tiles = triton.cdiv(pixels, rows)
    chunk_pixels = rows * triton.cdiv(tiles, _MOST_CHUNKS)
    return StatisticsTile(count, columns, rows, chunk_pixels, triton.cdiv(pixels, chunk_pixels))


@dataclass(frozen=True, slots=True)
class NormTile:
    """How the norm and quantization is cut into programs.

    Attributes:
        channels: of a tile, a power of two.
        pixels: of a tile, a power of two.
        groups: that a tile's channels belong to, at most, rounded up to a power of two.
        program_pixels: of a program, a multiple of ``pixels``.
        programs: of the launch.
    """

    channels: int
    pixels: int
    groups: int
    program_pixels: int
    programs: int


@cache
def plan_norm(batch: int, pixels: int, channels: int, groups: int) -> NormTile:
    """Return the tile of an image, from its sizes alone.

    Channels are cut where nothing is left over, as far as that leaves whole sectors: 320 into five
    times 64. Programs take several tiles of pixels where there would be more than ``PARTIALS``.
    """
    width = channels // groups
    columns = min(channels & -channels, 128)
    if columns < 32:
        columns = min(triton.next_power_of_2(channels), 128)
    rows = min(TILE // columns, triton.next_power_of_2(pixels))
    blocks = triton.cdiv(channels, columns)
    most = max(
        (min(first + columns, channels) - 1) // width - first // width + 1
        for first in range(0, channels, columns)
    )
    tiles = triton.cdiv(pixels, rows)
    program_pixels = rows * triton.cdiv(batch * blocks * tiles, PARTIALS)
    programs = batch * blocks * triton.cdiv(pixels, program_pixels)
    return NormTile(columns, rows, triton.next_power_of_2(most), program_pixels, programs)


def groupnorm_silu_quantize(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    x_q: Tensor,
    scale: Scale,
    *,
    is_silu: bool,
) -> None:
    """Normalize groups of channels, apply SiLU if asked, quantize with one scale.

    Args:
        x: float32, float16 or bfloat16 [B, pixels, C], channels side by side, samples and pixels
            at any distance; not empty.
        num_groups: G, a divisor of C.
        weight: float32, float16 or bfloat16 [C], contiguous.
        bias: the same.
        eps: added to the variance.
        x_q: int8 [B, pixels, C], contiguous.
        scale: of one element; ``partials`` is made here.
        is_silu: apply y * sigmoid(y) after the norm.
    """
    B, pixels, C = x.shape
    chunk = plan_statistics(pixels, C, num_groups)
    tile = plan_norm(B, pixels, C, num_groups)
    partials = torch.empty(3, B, num_groups, chunk.chunks, dtype=torch.float32, device=x.device)
    sizes = (B, pixels, C, num_groups, chunk.chunks, chunk.chunk_pixels, x.stride(0), x.stride(1))
    launch(
        _statistics_kernel,
        (B * chunk.chunks * triton.cdiv(num_groups, chunk.groups),),
        x.device,
        x,
        partials,
        *sizes,
        GROUP_CHANNELS=C // num_groups,
        GROUPS=chunk.groups,
        CHANNELS=chunk.channels,
        PIXELS=chunk.pixels,
        num_warps=4,
    )
    tensors = (x, partials, weight, bias)
    shape: dict[str, Any] = {
        "GROUP_CHANNELS": C // num_groups,
        "GROUPS": tile.groups,
        "CHUNKS": triton.next_power_of_2(chunk.chunks),
        "CHANNELS": tile.channels,
        "PIXELS": tile.pixels,
        "IS_SILU": is_silu,
        "num_warps": 4,
    }
    sizes = (*sizes, tile.program_pixels, eps)
    grid = (tile.programs,)
    if scale.table is None:
        scale.partials = torch.empty(tile.programs, dtype=torch.int32, device=x.device)
        launch(_absmax_kernel, grid, x.device, *tensors, scale.partials, *sizes, **shape)
    given, measured = scale.arguments(), scale.partial_arguments()
    measured["absmax_ptr"] = measured.pop("partials_ptr")
    measured["absmax_count"] = measured.pop("partials")
    launch(_quantize_kernel, grid, x.device, *tensors, x_q, *sizes, **given, **measured, **shape)
