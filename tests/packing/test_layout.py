"""The canonical order of packed weights: exact inverses, and every byte where the page says."""

from __future__ import annotations

import pytest
import torch

from ptq4adm.errors import DtypeError, RangeError, ShapeError
from ptq4adm.packing.layout import (
    BLOCK_K,
    KLayout,
    expand_multipliers,
    pack_int4,
    rows_to_weight,
    unpack_int4,
    weight_to_rows,
)

LAYOUTS = [
    KLayout((64,)),
    KLayout((1,)),
    KLayout((63,)),
    KLayout((65,), (3, 3)),
    KLayout((128,), (3, 3)),
    KLayout((20,), (1, 5)),
    KLayout((40, 70)),
    KLayout((64, 128), (3, 3)),
]


def _name(layout: KLayout) -> str:
    return f"{'+'.join(map(str, layout.segments))}@{layout.kernel_size[0]}x{layout.kernel_size[1]}"


def _weight(layout: KLayout, out_features: int = 5) -> torch.Tensor:
    shape = (out_features, layout.in_channels, *layout.kernel_size)
    return torch.randint(-8, 8, shape, dtype=torch.int8)


@pytest.mark.parametrize("layout", LAYOUTS, ids=_name)
def test_rows_to_weight_is_inverse_of_weight_to_rows(layout: KLayout) -> None:
    weight = _weight(layout)
    rows = weight_to_rows(weight, layout)
    assert rows.shape == (5, layout.k_padded)
    assert rows.is_contiguous()
    assert torch.equal(rows_to_weight(rows, layout), weight)


@pytest.mark.parametrize("layout", LAYOUTS, ids=_name)
def test_padding_is_zero_and_whole_blocks(layout: KLayout) -> None:
    ones = torch.ones(2, layout.in_channels, *layout.kernel_size, dtype=torch.int8)
    rows = weight_to_rows(ones, layout)
    assert int(rows.sum()) == 2 * layout.k
    assert sum(layout.segment_k_padded) == layout.k_padded
    assert all(size % BLOCK_K == 0 for size in layout.segment_k_padded)


def test_k_order_is_segment_row_column_channel() -> None:
    layout = KLayout((2, 3), (2, 2))
    weight = torch.zeros(1, 5, 2, 2)
    for segment, first, channels in ((0, 0, 2), (1, 2, 3)):
        for row in range(2):
            for column in range(2):
                for channel in range(channels):
                    tap = row * 2 + column
                    expected = (segment * 4 + tap) * 64 + channel  # both segments pad to 64
                    weight.zero_()[0, first + channel, row, column] = 1
                    assert weight_to_rows(weight, layout).argmax().item() == expected


def test_linear_weight_of_two_dimensions_is_accepted() -> None:
    layout = KLayout((70,))
    weight = _weight(layout)
    rows = weight_to_rows(weight.flatten(1), layout)
    assert torch.equal(rows, weight_to_rows(weight, layout))
    assert torch.equal(rows_to_weight(rows, layout).flatten(1), weight.flatten(1))


@pytest.mark.parametrize("columns", [64, 128, 23040])
def test_unpack_is_inverse_of_pack(columns: int) -> None:
    w_q = torch.randint(-8, 8, (3, columns), dtype=torch.int8)
    packed = pack_int4(w_q)
    assert packed.shape == (3, columns // 2)
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack_int4(packed), w_q)


def test_pack_is_inverse_of_unpack_for_every_byte() -> None:
    packed = torch.arange(256, dtype=torch.int64).to(torch.uint8).reshape(2, 128)
    assert torch.equal(pack_int4(unpack_int4(packed)), packed)


def test_pack_puts_k_in_the_low_and_k_plus_32_in_the_high_nibble() -> None:
    w_q = (torch.arange(128) % 16 - 8).to(torch.int8).reshape(1, 128)
    packed = pack_int4(w_q)[0].tolist()
    for block in range(2):
        for j in range(32):
            low = int(w_q[0, block * 64 + j]) & 15
            high = int(w_q[0, block * 64 + j + 32]) & 15
            assert packed[block * 32 + j] == low | high << 4


def test_multipliers_repeat_over_blocks_of_64() -> None:
    w_mult = torch.tensor([[1, 15], [2, 3]], dtype=torch.uint8)
    expanded = expand_multipliers(w_mult)
    assert expanded.shape == (2, 128)
    assert expanded.dtype == torch.int8
    assert expanded[0, 63] == 1
    assert expanded[0, 64] == 15
    assert expanded[1].sum() == 64 * 5


def test_layout_counts_padded_and_real_channels() -> None:
    layout = KLayout((65, 64), (3, 3))
    assert layout.k == 9 * 129
    assert layout.channel_padded(0) == 128
    assert layout.segment_k_padded == (9 * 128, 9 * 64)


def test_value_outside_four_bits_is_refused() -> None:
    with pytest.raises(RangeError, match=r"values in \[0, 8\] do not fit"):
        pack_int4(torch.arange(9).clamp(max=8).repeat(64)[:64].reshape(1, 64).to(torch.int8))


def test_pack_refuses_wrong_dtype_and_shape() -> None:
    with pytest.raises(DtypeError, match=r"w_q: expected torch\.int8, got torch\.int32"):
        pack_int4(torch.zeros(1, 64, dtype=torch.int32))
    with pytest.raises(ShapeError, match=r"w_q \[1, 63\]: expected \[N, a multiple of 64\]"):
        pack_int4(torch.zeros(1, 63, dtype=torch.int8))
    with pytest.raises(DtypeError, match="qweight: expected"):
        unpack_int4(torch.zeros(1, 32, dtype=torch.int8))
    with pytest.raises(ShapeError, match="multiple of 32"):
        unpack_int4(torch.zeros(1, 33, dtype=torch.uint8))


def test_weight_of_another_shape_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"weight \[5, 64, 3, 3\]: expected \[N, 64, 1, 1\]"):
        weight_to_rows(torch.zeros(5, 64, 3, 3), KLayout((64,)))
    with pytest.raises(ShapeError, match=r"rows \[5, 65\]: expected \[N, 64\]"):
        rows_to_weight(torch.zeros(5, 65), KLayout((64,)))


@pytest.mark.parametrize(
    ("segments", "kernel_size", "message"),
    [
        ((), (1, 1), "one or two positive channel counts"),
        ((64, 0), (1, 1), "one or two positive channel counts"),
        ((64,), (0, 3), "two positive sizes"),
        ((14592,), (3, 3), "not below 131072"),
    ],
)
def test_impossible_layout_is_refused(
    segments: tuple[int, ...], kernel_size: tuple[int, int], message: str
) -> None:
    with pytest.raises(ShapeError, match=message):
        KLayout(segments, kernel_size)
