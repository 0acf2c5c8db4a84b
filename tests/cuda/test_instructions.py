"""Every emulated instruction against the text of the PTX manual, and against CuTe's layouts."""

from __future__ import annotations

import math
import re
from types import ModuleType

import numpy as np
import pytest
import torch
from cute_layouts import cute_text, layout_of, place_of

LANES = range(32)
EDGES = np.array(
    [
        *(0.0, -0.0, 0.5, -0.5, 1.5, 2.5, -2.5, 0.49999997, 8388607.5, 8388609.0, 1e-45, -1e-40),
        *(65503.0, 65504.0, 65519.996, 65520.0, -65520.0, 2.0**-24, 2.0**-25, 2.98e-8, 6.1e-5),
        *(2147483520.0, 2147483648.0, -2147483648.0, -2147483904.0, 3.4028235e38, np.inf, -np.inf),
        np.nan,
    ],
    dtype=np.float32,
)


def _any_floats(count: int, seed: int) -> np.ndarray:
    """float32 of random bits, so of every magnitude, and the edges."""
    bits = np.random.default_rng(seed).integers(0, 2**32, count, dtype=np.uint32)
    return np.concatenate([EDGES, bits.view(np.float32)])


def _assert_equal_bits(got: np.ndarray, want: np.ndarray) -> None:
    """Equal patterns; any NaN equals any NaN."""
    assert got.dtype == want.dtype == np.float32
    both_nan = np.isnan(got) & np.isnan(want)
    wrong = (got.view(np.uint32) != want.view(np.uint32)) & ~both_nan
    assert not wrong.any(), (got[wrong][:5], want[wrong][:5])


# --- fragments ------------------------------------------------------------------------------------


def test_load_matrix_gives_each_lane_its_part_of_a_row(instructions: ModuleType) -> None:
    # manual: lanes 0-7 point at the rows of the first matrix, 8-15 at those of the second, ...;
    # of a row of 8 x 16 bits, four consecutive lanes get 32 bits each, row after row
    rng = np.random.default_rng(0)
    rows = 16 * rng.permutation(40)[:32].astype(np.int32)
    memory = rng.integers(0, 256, 16 * 40, dtype=np.uint8)
    matrices = memory[rows[:, None] + np.arange(16)].reshape(4, 8 * 16).view(np.uint32)
    got = instructions.load_matrix_x4(memory, rows)
    assert np.array_equal(got, matrices.T)


def test_quarters_of_a_tile_are_the_left_operand(instructions: ModuleType) -> None:
    """Upper left, lower left, upper right, lower right of 16 x 32 bytes."""
    tile = np.random.default_rng(9).integers(0, 256, (16, 32), dtype=np.uint8)
    rows = [32 * (lane % 16) + 16 * (lane // 16) for lane in LANES]
    got = instructions.load_matrix_x4(tile.reshape(-1), np.array(rows, dtype=np.int32))
    wanted = np.array([[tile[_manual_a(lane, i)] for i in range(16)] for lane in LANES])
    assert np.array_equal(wanted.view(np.uint32), got)


def test_rows_of_a_matrix_may_be_shared(instructions: ModuleType) -> None:
    memory = np.arange(16, dtype=np.uint8)
    got = instructions.load_matrix_x4(memory, np.zeros(32, dtype=np.int32))
    assert np.array_equal(got, np.tile(memory.view(np.uint32), 8)[:, None].repeat(4, axis=1))


# The manual's figures of mma.m16n8k32 with 8-bit operands: where element i of a lane lies.


def _manual_a(lane: int, i: int) -> tuple[int, int]:
    """(m, k) of a_i, i < 16."""
    group, thread_in_group = lane >> 2, lane % 4
    row = group if 0 <= i < 4 or 8 <= i < 12 else group + 8
    column = thread_in_group * 4 + (i & 3) + (0 if i < 8 else 16)
    return row, column


def _manual_b(lane: int, i: int) -> tuple[int, int]:
    """(n, k) of b_i, i < 8."""
    group, thread_in_group = lane >> 2, lane % 4
    return group, thread_in_group * 4 + (i & 3) + (0 if i < 4 else 16)


def _manual_c(lane: int, i: int) -> tuple[int, int]:
    """(m, n) of c_i, i < 4."""
    group, thread_in_group = lane >> 2, lane % 4
    return (group if i < 2 else group + 8), thread_in_group * 2 + (i & 1)


def _cute_positions() -> list[np.ndarray]:
    """(m, k), (n, k) and (m, n) of the elements of all lanes; CuTe counts down the columns."""
    traits = cute_text("atom/mma_traits_sm80.hpp", "struct MMA_Traits<SM80_16x8x32_S32S8S8S32_TN>")
    assert re.search(r"using CLayout = SM80_16x8_Row;", traits.split("};")[0])
    rows = cute_text("atom/mma_traits_sm80.hpp", "using SM80_16x8_Row")
    found = []
    for text, name, height, values in (
        (traits, "ALayout", 16, 16),
        (traits, "BLayout", 8, 8),
        (rows, "SM80_16x8_Row", 16, 4),
    ):
        layout = layout_of(text, name)
        places = [[place_of(layout, lane, i) for i in range(values)] for lane in LANES]
        found.append(np.stack([np.array(places) % height, np.array(places) // height], axis=-1))
    return found


def _manual_positions() -> list[np.ndarray]:
    maps = ((_manual_a, 16), (_manual_b, 8), (_manual_c, 4))
    return [np.array([[f(lane, i) for i in range(n)] for lane in LANES]) for f, n in maps]


def test_cute_agrees_with_the_manual_on_the_product() -> None:
    for manual, cute, size in zip(
        _manual_positions(), _cute_positions(), (16 * 32, 8 * 32, 16 * 8), strict=True
    ):
        assert np.array_equal(manual, cute)
        assert len(np.unique(manual.reshape(-1, 2), axis=0)) == size


def test_cute_agrees_on_the_fragments_that_are_loaded(instructions: ModuleType) -> None:
    text = cute_text("atom/copy_traits_sm75.hpp", "struct Copy_Traits<SM75_U32x4_LDSM_N>")
    layout = layout_of(text, "DstLayout")  # (lane, bit of its registers) -> bit
    rng = np.random.default_rng(1)
    memory = rng.integers(0, 256, 512, dtype=np.uint8)
    bits = np.unpackbits(memory, bitorder="little")
    wanted = np.array([[bits[place_of(layout, lane, i)] for i in range(128)] for lane in LANES])
    got = instructions.load_matrix_x4(memory, 16 * np.arange(32, dtype=np.int32))
    assert np.array_equal(np.packbits(wanted, axis=1, bitorder="little").view(np.uint32), got)


@pytest.mark.parametrize("source", ["manual", "cute"])
@pytest.mark.parametrize("kind", ["random", "lowest", "wraps"])
def test_multiply(instructions: ModuleType, source: str, kind: str) -> None:
    of_a, of_b, of_c = _manual_positions() if source == "manual" else _cute_positions()
    rng = np.random.default_rng(2)
    if kind == "lowest":
        a, b = np.full((32, 16), -128, np.int8), np.full((32, 8), -128, np.int8)
    else:
        a, b = (rng.integers(-128, 128, (32, n), dtype=np.int8) for n in (16, 8))
    acc = rng.integers(-(2**31), 2**31, (32, 4)).astype(np.int32)
    if kind == "wraps":
        acc[::2], acc[1::2] = 2**31 - 1, -(2**31)

    matrix_a, matrix_b = np.zeros((16, 32), np.int64), np.zeros((8, 32), np.int64)
    matrix_a[of_a[..., 0], of_a[..., 1]] = a
    matrix_b[of_b[..., 0], of_b[..., 1]] = b
    product = matrix_a @ matrix_b.T
    wanted = acc.astype(np.int64) + product[of_c[..., 0], of_c[..., 1]]

    got = instructions.multiply_s8_16x8x32(acc, a.view(np.uint32), b.view(np.uint32))
    assert np.array_equal(got, wanted.astype(np.int32))  # modulo 2^32
    assert (kind != "wraps") or (wanted != got).any()


# --- identity -------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_backward", [False, True])
def test_identity(instructions: ModuleType, is_backward: bool) -> None:
    wanted = [
        [t, t % 32, t // 32, x, y, z, 3, 2, 2]
        for z in range(2)
        for y in range(2)
        for x in range(3)
        for t in range(64)
    ]
    got = instructions.identity(3, 2, 2, 64, is_backward)
    assert got == (wanted[::-1] if is_backward else wanted)


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "formula"),
    [("add_rn", np.add), ("multiply_rn", np.multiply), ("divide_rn", np.divide)],
)
def test_arithmetic_rounds_to_nearest(
    instructions: ModuleType, name: str, formula: np.ufunc
) -> None:
    x, y = _any_floats(20000, 3), _any_floats(20000, 4)[::-1].copy()
    with np.errstate(all="ignore"):
        wanted = formula(x, y)
    _assert_equal_bits(getattr(instructions, name)(x, y), wanted)


def test_product_and_sum_are_not_fused(instructions: ModuleType) -> None:
    rng = np.random.default_rng(5)
    x, y, z = (rng.standard_normal(20000).astype(np.float32) for _ in range(3))
    fused = (x.astype(np.float64) * y + z).astype(np.float32)
    wanted = x * y + z
    assert (fused != wanted).any()
    _assert_equal_bits(instructions.multiply_then_add(x, y, z), wanted)


def test_round_half_even(instructions: ModuleType) -> None:
    halves = np.arange(-1000, 1000, dtype=np.float32) / 2
    x = np.concatenate([_any_floats(20000, 6), halves])
    with np.errstate(invalid="ignore"):
        wanted = np.nan_to_num(np.rint(x.astype(np.float64)), nan=0.0)
    got = instructions.round_half_even(x)
    assert np.array_equal(got, np.clip(wanted, -(2**31), 2**31 - 1).astype(np.int64))


def test_half_from_float(instructions: ModuleType) -> None:
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    halves = np.sort(halves[np.isfinite(halves)]).astype(np.float32)
    ties = (halves[1:].astype(np.float64) + halves[:-1]) / 2  # exact in float32
    around = [ties.astype(np.float32)]
    around += [np.nextafter(around[0], np.float32(sign * np.inf)) for sign in (1, -1)]
    x = np.concatenate([_any_floats(20000, 7), halves, *around])
    with np.errstate(over="ignore"):
        wanted = np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))
    assert np.array_equal(instructions.half_from_float(x), wanted)


def test_bfloat16_from_float(instructions: ModuleType) -> None:
    patterns = np.arange(2**16, dtype=np.uint32) << 16
    x = [_any_floats(20000, 8)]
    x += [(patterns | low).view(np.float32) for low in (0, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
    everything = np.concatenate(x)
    rounded = torch.from_numpy(everything).bfloat16().view(torch.uint16).numpy()
    wanted = np.where(np.isnan(everything), np.uint16(0x7FFF), rounded)
    assert np.array_equal(instructions.bfloat16_from_float(everything), wanted)


def test_halves_and_bfloat16_widen_exactly(instructions: ModuleType) -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    with np.errstate(invalid="ignore"):
        _assert_equal_bits(
            instructions.float_from_half(bits), bits.view(np.float16).astype(np.float32)
        )
    wide = torch.from_numpy(bits).view(torch.bfloat16).float().numpy()
    _assert_equal_bits(instructions.float_from_bfloat16(bits), wide)


def test_erf(instructions: ModuleType) -> None:
    x = np.concatenate([EDGES, np.linspace(-5, 5, 4001, dtype=np.float32)])
    wanted = np.array([math.erf(float(value)) for value in x])
    got = instructions.erf_f32(x).astype(np.float64)
    assert np.array_equal(np.isnan(got), np.isnan(wanted))
    assert np.nanmax(np.abs(got - wanted)) <= 2.0**-23


def test_nan(instructions: ModuleType) -> None:
    assert np.isnan(instructions.nan_f32())
