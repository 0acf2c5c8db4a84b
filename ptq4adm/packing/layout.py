"""The order of quantized weights in memory: the one authority on it.

Canonical K order of one output channel: (segment, kernel row, kernel column, input channel), the
channel fastest. Each tap's channels are zero-padded to a multiple of ``BLOCK_K`` = 64, so a block
of 64 never straddles a tap or a segment::

    tap (0, 0)                 tap (0, 1)                        padded K of one segment
    | c0 c1 ... cC-1 0 ... 0 | c0 c1 ... cC-1 0 ... 0 | ...      = kh * kw * channel_padded

Four-bit weights, format ``split-half-64``: 64 weights of a block become 32 bytes; byte j holds
k = j in its low and k = j + 32 in its high nibble, both in two's complement::

    byte j of a block    |  w[j + 32]  |   w[j]    |
                           bits 7..4     bits 3..0

Eight-bit weights keep the same K order, one signed byte each. ``docs/packed-weight.md`` draws both
and is executed by a test. The orders that single backends derive from this one are in
``ptq4adm.ops.backends``; they are never saved.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq4adm.errors import DtypeError, RangeError, ShapeError

FORMAT = "split-half-64"
BLOCK_K = 64  # weights in a block; also the group of ``w_mult``
HALF_BLOCK = BLOCK_K // 2  # bytes in a packed block
MAX_K = 131072  # exclusive: 128 * 128 * K stays below 2**31, so an int32 accumulator is exact
INT4_MIN, INT4_MAX = -8, 7


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple of ``multiple`` that is at least ``value``."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class KLayout:
    """How the reduction dimension of one layer is laid out.

    Attributes:
        segments: input channels of each segment; two where the two halves of a skip concat have
            their own activation scales. A linear layer has ``(in_features,)``.
        kernel_size: (rows, columns) of the convolution kernel; (1, 1) for a linear layer.

    Raises:
        ShapeError: if a size is not positive, there are not one or two segments, or K is too big.
    """

    segments: tuple[int, ...]
    kernel_size: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        if len(self.segments) not in (1, 2) or min(self.segments) < 1:
            raise ShapeError(
                f"segments = {self.segments}: expected one or two positive channel counts"
            )
        if len(self.kernel_size) != 2 or min(self.kernel_size) < 1:
            raise ShapeError(f"kernel_size = {self.kernel_size}: expected two positive sizes")
        if self.k_padded >= MAX_K:
            raise ShapeError(
                f"K = {self.k_padded} (padded) is not below {MAX_K}: the int32 accumulator would "
                "no longer be exact; keep this layer in float"
            )

    @property
    def taps(self) -> int:
        """Number of kernel positions."""
        return self.kernel_size[0] * self.kernel_size[1]

    @property
    def in_channels(self) -> int:
        """Input channels over all segments."""
        return sum(self.segments)

    @property
    def k(self) -> int:
        """Length of the reduction without padding."""
        return self.in_channels * self.taps

    def channel_padded(self, segment: int) -> int:
        """Return the channels of one tap of a segment after zero-padding."""
        return round_up(self.segments[segment], BLOCK_K)

    @property
    def segment_k_padded(self) -> tuple[int, ...]:
        """Padded K of each segment."""
        return tuple(self.taps * round_up(channels, BLOCK_K) for channels in self.segments)

    @property
    def k_padded(self) -> int:
        """Padded K over all segments: the length of a canonical row."""
        return sum(self.segment_k_padded)


def weight_to_rows(weight: Tensor, layout: KLayout) -> Tensor:
    """Put a weight into canonical K order, zero-padded.

    Args:
        weight: any dtype [N, C, kh, kw], or [N, C] for a kernel of (1, 1).
        layout: the layer's layout; C = ``layout.in_channels``.

    Returns:
        The same dtype [N, k_padded], contiguous.

    Raises:
        ShapeError: if the weight does not have the layout's shape.
    """
    weight_4d = weight[:, :, None, None] if weight.dim() == 2 else weight
    expected = (layout.in_channels, *layout.kernel_size)
    if weight_4d.dim() != 4 or tuple(weight_4d.shape[1:]) != expected:
        raise ShapeError(
            f"weight {list(weight.shape)}: expected [N, {', '.join(map(str, expected))}] for "
            f"segments {layout.segments} and kernel {layout.kernel_size}"
        )
    parts = []
    for segment, part in enumerate(weight_4d.split(layout.segments, dim=1)):
        taps = part.permute(0, 2, 3, 1)  # [N, kh, kw, C_segment]
        padding = layout.channel_padded(segment) - layout.segments[segment]
        parts.append(torch.nn.functional.pad(taps, (0, padding)).flatten(1))
    return torch.cat(parts, dim=1)


def rows_to_weight(rows: Tensor, layout: KLayout) -> Tensor:
    """Undo ``weight_to_rows``.

    Args:
        rows: any dtype [N, k_padded].
        layout: the layer's layout.

    Returns:
        The same dtype [N, C, kh, kw]; for a linear layer take ``.flatten(1)``.

    Raises:
        ShapeError: if ``rows`` is not two-dimensional with ``layout.k_padded`` columns.
    """
    if rows.dim() != 2 or rows.shape[1] != layout.k_padded:
        raise ShapeError(f"rows {list(rows.shape)}: expected [N, {layout.k_padded}]")
    parts = []
    for segment, part in enumerate(rows.split(layout.segment_k_padded, dim=1)):
        shape = (rows.shape[0], *layout.kernel_size, layout.channel_padded(segment))
        taps = part.reshape(shape)[..., : layout.segments[segment]]
        parts.append(taps.permute(0, 3, 1, 2))
    return torch.cat(parts, dim=1).contiguous()


def pack_int4(w_q: Tensor) -> Tensor:
    """Pack rows of four-bit integers, two a byte, in the split-half order of this module.

    Args:
        w_q: int8 [N, Kp], values in [-8, 7], Kp a multiple of 64.

    Returns:
        uint8 [N, Kp / 2].

    Raises:
        DtypeError: if ``w_q`` is not int8.
        ShapeError: if ``w_q`` is not [N, multiple of 64].
        RangeError: if a value does not fit in four bits.
    """
    _check_rows("w_q", w_q, torch.int8, BLOCK_K)
    if w_q.numel() and (int(w_q.min()) < INT4_MIN or int(w_q.max()) > INT4_MAX):
        raise RangeError(
            f"w_q: values in [{int(w_q.min())}, {int(w_q.max())}] do not fit in four bits; "
            f"clamp them to [{INT4_MIN}, {INT4_MAX}]"
        )
    blocks = w_q.view(torch.uint8).reshape(w_q.shape[0], -1, 2, HALF_BLOCK)
    low, high = blocks.unbind(dim=2)  # [N, Kp / 64, 32] each
    return ((low & 0x0F) | (high << 4)).flatten(1)


def unpack_int4(qweight: Tensor) -> Tensor:
    """Undo ``pack_int4``.

    Args:
        qweight: uint8 [N, Kp / 2], Kp a multiple of 64.

    Returns:
        int8 [N, Kp], values in [-8, 7].

    Raises:
        DtypeError: if ``qweight`` is not uint8.
        ShapeError: if ``qweight`` is not [N, multiple of 32].
    """
    _check_rows("qweight", qweight, torch.uint8, HALF_BLOCK)
    blocks = qweight.reshape(qweight.shape[0], -1, 1, HALF_BLOCK)
    nibbles = torch.cat((blocks & 0x0F, blocks >> 4), dim=2)  # [N, Kp / 64, 2, 32]
    return (nibbles.to(torch.int8) ^ 8).sub_(8).flatten(1)  # sign extension of four bits


def expand_multipliers(w_mult: Tensor) -> Tensor:
    """Repeat group multipliers so that there is one for every k.

    Args:
        w_mult: uint8 [N, Kp / 64], values in 1..15.

    Returns:
        int8 [N, Kp]; ``w_q * expand_multipliers(w_mult)`` is the effective int8 weight.
    """
    return w_mult.to(torch.int8).repeat_interleave(BLOCK_K, dim=1)


def _check_rows(name: str, rows: Tensor, dtype: torch.dtype, multiple: int) -> None:
    if rows.dtype != dtype:
        raise DtypeError(f"{name}: expected {dtype}, got {rows.dtype}")
    if rows.dim() != 2 or rows.shape[1] % multiple:
        raise ShapeError(f"{name} {list(rows.shape)}: expected [N, a multiple of {multiple}]")
