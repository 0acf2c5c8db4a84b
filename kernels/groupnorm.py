"""Group norm, SiLU and quantization: statistics, then norm and quantization, two launches.

    y[b, p, c] = (x[b, p, c] - mean[b, g]) * rstd[b, g] * weight[c] + bias[c],   g = c / (C / G)
    y          = y * sigmoid(y)                                           if asked for          (1)

then as in ``kernels/quantize.py``. A measured scale takes one more launch in between, which finds
the largest magnitude of y. The image is [B, pixels, C], channels side by side, and a program takes
some channels of some pixels. It first combines the statistics of its groups
(``kernels/group_statistics.py``), which is little work while its first tile is on its way.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ptq4adm.kernels.activation import PARTIALS, TILE, Scale, given_scale, measured_scale
from ptq4adm.kernels.device import absmax_bits, quantize, silu
from ptq4adm.kernels.group_statistics import combine_chunks, group_statistics, of_channels
from ptq4adm.kernels.launch import launch, multiprocessors

# channels of a tile: 64 to 256 bytes of a pixel in float16
_LEAST_CHANNELS = 32
_MOST_CHANNELS = 128
# groups that a tile's channels belong to: more would cost more to combine than to normalize
_MOST_GROUPS = 8
_LEAST_TILE = 1024
_NUM_WARPS = 4


@triton.jit
def _which_tiles(pixels, C, program_pixels, CHANNELS: tl.constexpr):
    """Sample (int64), first and last pixel + 1, and channels [CHANNELS] of this program."""
    blocks = tl.cdiv(C, CHANNELS)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    first_pixel = tl.program_id(1) * program_pixels
    return sample, first_pixel, tl.minimum(first_pixel + program_pixels, pixels), channel


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
    weight = tl.load(weight_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
    group = channel // GROUP_CHANNELS
    groups = tl.min(group, axis=0) + tl.arange(0, GROUPS)
    base, mean, rstd = combine_chunks(
        partials_ptr, sample, groups, B, pixels, G, chunks, chunk_pixels, eps, GROUP_CHANNELS,
        CHUNKS,
    )  # fmt: skip
    is_member = group[:, None] == groups[None, :]
    gain = of_channels(rstd, is_member) * weight
    offset = tl.fma(-of_channels(mean, is_member), gain, bias)
    return of_channels(base, is_member)[None, :], gain[None, :], offset[None, :]


@triton.jit
def _load_tile(x_ptr, offs_p, channel, last_pixel, C, pixel_stride):
    """A tile as it is in memory, [PIXELS, CHANNELS]; zero outside, which is not stored."""
    mask = (offs_p < last_pixel)[:, None] & (channel < C)[None, :]
    offs = offs_p.to(tl.int64)[:, None] * pixel_stride + channel[None, :]
    return tl.load(x_ptr + offs, mask=mask, other=0.0)


@triton.jit
def _normalize(x, base, gain, offset, IS_SILU: tl.constexpr):
    """Equation (1) for a tile, float32."""
    y = tl.fma(x.to(tl.float32) - base, gain, offset)
    if IS_SILU:
        y = silu(y)
    return y


@triton.jit
def _absmax_kernel(
    # tensors
    x_ptr,  # float [B, pixels, C]
    statistics_ptr,  # fp32 [3, B, G, chunks]
    weight_ptr,  # float [C]
    bias_ptr,  # float [C]
    partials_ptr,  # int32 [programs]
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
    GROUP_CHANNELS: tl.constexpr,  # C / G
    # tile
    GROUPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    IS_SILU: tl.constexpr,
):
    sample, first_pixel, last_pixel, channel = _which_tiles(pixels, C, program_pixels, CHANNELS)
    x_ptr += sample * sample_stride
    offs_p = first_pixel + tl.arange(0, PIXELS)
    x = _load_tile(x_ptr, offs_p, channel, last_pixel, C, pixel_stride)
    base, gain, offset = _channel_norms(
        statistics_ptr, weight_ptr, bias_ptr, sample, channel, B, pixels, C, G, chunks,
        chunk_pixels, eps, GROUP_CHANNELS, GROUPS, CHUNKS,
    )  # fmt: skip
    bits = tl.zeros((PIXELS, CHANNELS), dtype=tl.int32)
    for _ in range(first_pixel, last_pixel, PIXELS):
        next_x = _load_tile(x_ptr, offs_p + PIXELS, channel, last_pixel, C, pixel_stride)
        mask = (offs_p < last_pixel)[:, None] & (channel < C)[None, :]
        y = _normalize(x, base, gain, offset, IS_SILU)
        bits = tl.maximum(bits, tl.where(mask, absmax_bits(y), 0))
        x = next_x
        offs_p += PIXELS
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(partials_ptr + program, tl.max(tl.max(bits, axis=1), axis=0))


@triton.jit
def _quantize_kernel(
    # tensors
    x_ptr,  # float [B, pixels, C]
    statistics_ptr,  # fp32 [3, B, G, chunks]
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
    GROUP_CHANNELS: tl.constexpr,  # C / G
    # see Scale.arguments
    scale_ptr,
    x_scale_ptr,
    table_size,
    step_ptr,
    partials_ptr,
    partials,
    PARTIALS: tl.constexpr,
    # tile
    GROUPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    IS_SILU: tl.constexpr,
):
    sample, first_pixel, last_pixel, channel = _which_tiles(pixels, C, program_pixels, CHANNELS)
    x_ptr += sample * sample_stride
    x_q_ptr += sample * pixels * C
    offs_p = first_pixel + tl.arange(0, PIXELS)
    x = _load_tile(x_ptr, offs_p, channel, last_pixel, C, pixel_stride)
    if x_scale_ptr is not None:
        scale = given_scale(scale_ptr, x_scale_ptr, table_size, step_ptr)
    else:
        scale = measured_scale(scale_ptr, partials_ptr, partials, PARTIALS)
    base, gain, offset = _channel_norms(
        statistics_ptr, weight_ptr, bias_ptr, sample, channel, B, pixels, C, G, chunks,
        chunk_pixels, eps, GROUP_CHANNELS, GROUPS, CHUNKS,
    )  # fmt: skip
    for _ in range(first_pixel, last_pixel, PIXELS):
        next_x = _load_tile(x_ptr, offs_p + PIXELS, channel, last_pixel, C, pixel_stride)
        mask = (offs_p < last_pixel)[:, None] & (channel < C)[None, :]
        y = _normalize(x, base, gain, offset, IS_SILU)
        offs = offs_p.to(tl.int64)[:, None] * C + channel[None, :]
        tl.store(x_q_ptr + offs, quantize(y, scale), mask=mask)
        x = next_x
        offs_p += PIXELS


@dataclass(frozen=True, slots=True)
class NormTile:
    """How norm and quantization are cut into programs.

    Attributes:
        channels: of a tile, a power of two.
        pixels: of a tile, a power of two.
        groups: that a tile's channels belong to, at most, rounded up to a power of two.
        program_pixels: of a program, a multiple of ``pixels``.
        grid: channels of samples, and pixels.
    """

    channels: int
    pixels: int
    groups: int
    program_pixels: int
    grid: tuple[int, int]


@cache
def plan_norm(
    batch: int, pixels: int, channels: int, groups: int, multiprocessors: int
) -> NormTile:
    """Return the tile of an image, from its sizes.

    Channels are cut where nothing is left over, as far as that leaves whole sectors: 320 into five
    times 64. Programs take several tiles of pixels where there would be more than ``PARTIALS``, and
    a smaller one where there would be multiprocessors without a program.
    """
    columns = min(channels & -channels, _MOST_CHANNELS)
    if columns < _LEAST_CHANNELS:
        columns = min(triton.next_power_of_2(channels), _MOST_CHANNELS)
    width = channels // groups
    while columns > _LEAST_CHANNELS and _groups_of_a_tile(columns, channels, width) > _MOST_GROUPS:
        columns //= 2
    blocks = batch * triton.cdiv(channels, columns)
    rows = min(TILE // columns, triton.next_power_of_2(pixels))
    while rows * columns > _LEAST_TILE and blocks * triton.cdiv(pixels, rows) < multiprocessors:
        rows //= 2
    program_pixels = rows * triton.cdiv(blocks * triton.cdiv(pixels, rows), PARTIALS)
    return NormTile(
        columns,
        rows,
        triton.next_power_of_2(_groups_of_a_tile(columns, channels, width)),
        program_pixels,
        (blocks, triton.cdiv(pixels, program_pixels)),
    )


def _groups_of_a_tile(columns: int, channels: int, width: int) -> int:
    """Return how many groups of ``width`` channels a tile of ``columns`` touches at most."""
    return max(
        (min(first + columns, channels) - 1) // width - first // width + 1
        for first in range(0, channels, columns)
    )


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
    statistics, chunk = group_statistics(x, num_groups)
    tile = plan_norm(B, pixels, C, num_groups, multiprocessors(x.device))
    tensors = (x, statistics, weight, bias)
    arguments: dict[str, Any] = {
        "B": B,
        "pixels": pixels,
        "C": C,
        "G": num_groups,
        "chunks": chunk.chunks,
        "chunk_pixels": chunk.chunk_pixels,
        "sample_stride": x.stride(0),
        "pixel_stride": x.stride(1),
        "program_pixels": tile.program_pixels,
        "eps": eps,
        "GROUP_CHANNELS": C // num_groups,
        "GROUPS": tile.groups,
        "CHUNKS": triton.next_power_of_2(chunk.chunks),
        "CHANNELS": tile.channels,
        "PIXELS": tile.pixels,
        "IS_SILU": is_silu,
        "num_warps": _NUM_WARPS,
    }
    if scale.table is None:
        scale.partials = torch.empty(
            tile.grid[0] * tile.grid[1], dtype=torch.int32, device=x.device
        )
        launch(_absmax_kernel, tile.grid, x.device, *tensors, scale.partials, **arguments)
    arguments |= scale.arguments() | scale.partial_arguments()
    launch(_quantize_kernel, tile.grid, x.device, *tensors, x_q, **arguments)
