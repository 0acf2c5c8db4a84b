"""Weight orders of the backends: exact inverses, refused shapes."""

from __future__ import annotations

import pytest
import torch

from ptq4adm.errors import ShapeError, UnknownBackendError
from ptq4adm.ops.prepack import packed_shape, prepack, to_canonical
from ptq4adm.packing.layout import KLayout, pack_int4, weight_to_rows


def _canonical(bits: int, out_features: int, layout: KLayout) -> torch.Tensor:
    low, high = (-8, 8) if bits == 4 else (-127, 128)
    shape = (out_features, layout.in_channels, *layout.kernel_size)
    rows = weight_to_rows(torch.randint(low, high, shape, dtype=torch.int8), layout)
    return pack_int4(rows) if bits == 4 else rows


@pytest.mark.parametrize("backend", ["reference", "cpu", "cuda"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("out_features", [1, 15, 16, 17, 320])
@pytest.mark.parametrize("layout", [KLayout((64,)), KLayout((70, 5), (3, 3))], ids=["64", "70+5"])
def test_to_canonical_is_inverse_of_prepack(backend, bits, out_features, layout) -> None:
    qweight = _canonical(bits, out_features, layout)
    packed = prepack(qweight, bits=bits, layout=layout, backend=backend)
    assert tuple(packed.shape) == packed_shape(bits, out_features, layout.k_padded, backend)
    assert packed.dtype == qweight.dtype
    assert packed.is_contiguous()
    restored = to_canonical(
        packed, bits=bits, layout=layout, out_features=out_features, backend=backend
    )
    assert torch.equal(restored, qweight)


def test_cpu_order_of_four_bits_is_as_drawn() -> None:
    layout = KLayout((64,))
    w_q = torch.randint(-8, 8, (32, 64), dtype=torch.int8)
    packed = prepack(pack_int4(w_q), bits=4, layout=layout, backend="cpu")
    for panel in range(2):
        for step in range(16):
            for i in range(32):
                byte = int(packed[panel, step * 32 + i])
                k = step * 4 + i % 4
                assert byte & 15 == int(w_q[panel * 16 + i // 4, k]) + 8
                assert byte >> 4 == int(w_q[panel * 16 + 8 + i // 4, k]) + 8


def test_cpu_order_of_eight_bits_is_as_drawn() -> None:
    layout = KLayout((64,))
    w_q = torch.randint(-127, 128, (32, 64), dtype=torch.int8)
    packed = prepack(w_q, bits=8, layout=layout, backend="cpu")
    for panel in range(2):
        for step in range(16):
            for i in range(64):
                expected = w_q[panel * 16 + i // 4, step * 4 + i % 4]
                assert packed[panel, step * 64 + i] == expected


@pytest.mark.parametrize("bits", [4, 8])
def test_cuda_order_is_as_drawn(bits) -> None:
    """Every weight at the place that the drawings in prepack.py and fragments.h give it."""
    layout = KLayout((128,))
    low, high = (-8, 8) if bits == 4 else (-127, 128)
    w_q = torch.randint(low, high, (32, 128), dtype=torch.int8)
    canonical = pack_int4(w_q) if bits == 4 else w_q
    packed = prepack(canonical, bits=bits, layout=layout, backend="cuda")
    unit = 512 if bits == 4 else 1024
    for n in range(32):
        for k in range(128):
            h, g = n % 16 // 8, n % 8
            j, q, t, b = k % 64 // 32, k % 32 // 16, k % 16 // 4, k % 4
            lane, first = 4 * g + t, k // 64 * unit
            if bits == 4:
                byte = int(packed[n // 16, first + 16 * lane + 4 * (2 * h + j) + b])
                got = ((byte >> 4 * q & 15) ^ 8) - 8
            else:
                place = first + 512 * j + 16 * lane + 4 * (2 * h + q) + b
                got = int(packed[n // 16, place])
            assert got == int(w_q[n, k]), (n, k)


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_orders_of_panels_pad_channels_with_zero_weights(backend) -> None:
    layout = KLayout((64,))
    packed = prepack(_canonical(4, 17, layout), bits=4, layout=layout, backend=backend)
    padded = to_canonical(packed, bits=4, layout=layout, out_features=32, backend=backend)
    assert int(padded[17:].sum()) == 0


def test_wrong_shapes_are_refused() -> None:
    layout = KLayout((64,))
    with pytest.raises(ShapeError, match=r"qweight \[3, 64\]: expected \[3, 32\]"):
        prepack(torch.zeros(3, 64, dtype=torch.uint8), bits=4, layout=layout, backend="cpu")
    with pytest.raises(ShapeError, match=r"qweight \[3, 32\]: expected \[1, 512\]"):
        to_canonical(
            torch.zeros(3, 32, dtype=torch.uint8),
            bits=4,
            layout=layout,
            out_features=3,
            backend="cpu",
        )


def test_backend_without_an_order_is_refused() -> None:
    with pytest.raises(UnknownBackendError, match="backend 'npu' has no weight order"):
        prepack(_canonical(4, 3, KLayout((64,))), bits=4, layout=KLayout((64,)), backend="npu")
