"""Functions that several kernels call on the device: decoding weights, rounding, scales.

Weights are decoded by inline assembly, because Triton turns shifts of int8 tensors into a storm of
byte permutations. The interpreter has no inline assembly: ``USE_ASM`` selects plain arithmetic
there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ptq4adm.kernels.launch import IS_INTERPRETED

USE_ASM = tl.constexpr(not IS_INTERPRETED)
SMALLEST_ABSMAX = tl.constexpr(1e-8)  # keeps a silent tensor from dividing by zero
INT8_MAX = tl.constexpr(127.0)
# adding and subtracting 1.5 * 2^23 rounds a small float to the nearest integer, ties to even
_ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def round_to_int8(scaled):
    """clamp(rint_to_even(x), -127, 127) of a float32 tensor; NaN becomes -127."""
    clamped = tl.minimum(tl.maximum(scaled, -INT8_MAX), INT8_MAX)
    return ((clamped + _ROUNDER) - _ROUNDER).to(tl.int8)


@triton.jit
def quantize(x, scale):
    """Quantize float32 with a step as the reference does: times the reciprocal, both rounded."""
    return round_to_int8(x * tl.math.div_rn(1.0, scale))


@triton.jit
def absmax_bits(x):
    """|x| of float32 as int32: as ordered as the floats, and NaN is the largest of all.

    A maximum of these keeps a NaN that a maximum of floats may drop.
    """
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(bits):
    """max(absmax, 1e-8) / 127 of a maximum of ``absmax_bits``; NaN stays NaN."""
    absmax = bits.to(tl.float32, bitcast=True)
    # written so that a NaN fails the comparison and stays
    absmax = tl.where(absmax < SMALLEST_ABSMAX, SMALLEST_ABSMAX, absmax)
    return tl.math.div_rn(absmax, INT8_MAX)


@triton.jit
def load_scale(scale_ptr, step_ptr, table_size):
    """The scale in use: the only one, or row ``step`` of a table.

    A step outside the table cannot raise here: it gives NaN, which every later layer shows. The
    step is checked on the host when it is set.
    """
    # one return: Triton compiles what follows an early one, even where it cannot be reached
    if step_ptr is None:
        scale = tl.load(scale_ptr)
    else:
        row = tl.load(step_ptr)
        is_known = (row >= 0) & (row < table_size)
        scale = tl.load(scale_ptr + row, mask=is_known, other=float("nan"))
    return scale


@triton.jit
def gelu(x):
    """X * Phi(x), by the exact error function."""
    return x * 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))


@triton.jit
def silu(x):
    """X * sigmoid(x) of float32, within 1e-6 of its magnitude."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def reciprocal_deviation(variance, eps):
    """1 / sqrt(variance + eps), both steps rounded to nearest."""
    return tl.math.div_rn(1.0, tl.math.sqrt_rn(variance + eps))


@triton.jit
def decode_int4(packed):
    """Split bytes into 16 times their two nibbles: low, high; int8.

    The nibble in the high half of a byte is 16 * w in two's complement, sign included, so three
    instructions decode eight weights. The factor of 16 leaves with the scale.
    """
    if USE_ASM:
        low, high = tl.inline_asm_elementwise(
            """
            {
            shl.b32 $0, $2, 4;
            and.b32 $0, $0, 0xf0f0f0f0;
            and.b32 $1, $2, 0xf0f0f0f0;
            }
            """,
            "=&r,=r,r",
            [packed],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        low = (packed << 4).to(tl.int8, bitcast=True)
        high = (packed & 0xF0).to(tl.int8, bitcast=True)
    return low, high


@triton.jit
def decode_int4_groups(packed, multiplier, offset):
    """Split bytes into their two nibbles times the multiplier of the group: low, high; int8.

    Four bytes at once: ((w + 8) * s + 128 - 8 s) ^ 128 stays in 0..255 for s in 1..15, so no byte
    carries into the next.

    Args:
        packed: uint8.
        multiplier: int32 of the same shape, s.
        offset: int32 of the same shape, 128 - 8 s in each of four bytes.
    """
    if USE_ASM:
        # four elements share a register of bytes but have a register each of int32: the first
        # is taken, as 32 consecutive bytes of a row are of one group
        low, high = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 nibbles;
            lop3.b32 nibbles, $2, 0x0f0f0f0f, 0x08080808, 0x6a;
            mad.lo.u32 $0, nibbles, $3, $7;
            xor.b32 $0, $0, 0x80808080;
            shr.u32 nibbles, $2, 4;
            lop3.b32 nibbles, nibbles, 0x0f0f0f0f, 0x08080808, 0x6a;
            mad.lo.u32 $1, nibbles, $3, $7;
            xor.b32 $1, $1, 0x80808080;
            }
            """,
            "=&r,=&r,r,r,r,r,r,r,r,r,r",
            [packed, multiplier, offset],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        low = ((((packed & 15) ^ 8).to(tl.int32) - 8) * multiplier).to(tl.int8)
        high = ((((packed >> 4) ^ 8).to(tl.int32) - 8) * multiplier).to(tl.int8)
    return low, high
