"""Integer accumulators: reference and cpu (every instruction set) equal the exact oracle."""

from __future__ import annotations

import pytest
import torch

from ptq4adm.ops import cpu, reference
from ptq4adm.ops.arguments import Conv2dGeometry

MODES = [(4, False), (4, True), (8, False)]
MODE_IDS = ["w4", "w4-groups", "w8"]

# rows, K, channels: 1, tile - 1, tile, tile + 1 of the tiles 4 x 16 and 6 x 64, of the blocks of
# 64 k and the chunks of 512 and 1024; rows in several blocks; odd; real
LINEAR_SIZES = [
    (1, 1, 1),
    (3, 63, 15),
    (4, 64, 16),
    (5, 65, 17),
    (33, 127, 33),
    (131, 320, 40),
    (7, 512, 48),
    (6, 513, 31),
    (77, 768, 128),
    (257, 1100, 3),
    (5, 1023, 63),
    (6, 1024, 64),
    (7, 1025, 65),
    (13, 36, 80),
    (11, 2112, 112),
    (12, 44, 4),
    (1100, 72, 8),
    (2, 640, 5120 // 16),
]


@pytest.mark.parametrize(("bits", "is_grouped"), MODES, ids=MODE_IDS)
@pytest.mark.parametrize("size", LINEAR_SIZES, ids=str)
def test_linear_equals_the_oracle(make_case, isa, size, bits, is_grouped) -> None:
    M, K, N = size
    case = make_case(bits, (M,), (K,), N, is_grouped=is_grouped)
    (expected,) = case.oracle()
    assert torch.equal(reference.accumulate_linear(case.call)[0], expected)
    assert torch.equal(cpu.accumulate_linear(case.native, isa)[0], expected)


@pytest.mark.parametrize(("bits", "is_grouped"), MODES, ids=MODE_IDS)
def test_conv2d_equals_the_oracle(make_case, isa, convolution, bits, is_grouped) -> None:
    shape, channels, geometry = convolution
    case = make_case(bits, shape, (channels,), 19, geometry, is_grouped=is_grouped)
    (expected,) = case.oracle()
    assert torch.equal(reference.accumulate_conv2d(case.call, geometry)[0], expected)
    assert torch.equal(cpu.accumulate_conv2d(case.native, geometry, isa)[0], expected)


@pytest.mark.parametrize(("bits", "is_grouped"), MODES, ids=MODE_IDS)
@pytest.mark.parametrize("segments", [(64, 64), (40, 70), (128, 3)], ids=str)
def test_two_segments_stay_apart(make_case, isa, segments, bits, is_grouped) -> None:
    linear = make_case(bits, (9,), segments, 21, is_grouped=is_grouped)
    geometry = Conv2dGeometry((3, 3), padding=(1, 1), upsample=(5, 7))
    conv2d = make_case(bits, (2, 4, 3), segments, 21, geometry, is_grouped=is_grouped)
    for got, canonical, expected in zip(
        cpu.accumulate_linear(linear.native, isa)
        + cpu.accumulate_conv2d(conv2d.native, geometry, isa),
        reference.accumulate_linear(linear.call)
        + reference.accumulate_conv2d(conv2d.call, geometry),
        linear.oracle() + conv2d.oracle(),
        strict=True,
    ):
        assert torch.equal(canonical, expected)
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("bits", "is_grouped", "w_value"),
    [(4, False, -8), (4, False, 7), (4, True, -8), (4, True, 7), (8, False, 127), (8, False, -127)],
)
@pytest.mark.parametrize("x_value", [127, -127, -128])
@pytest.mark.parametrize("K", [64, 23040, 131008])
def test_extremes_do_not_saturate(make_case, isa, K, x_value, bits, is_grouped, w_value) -> None:
    case = make_case(bits, (2,), (K,), 17, is_grouped=is_grouped, w_value=w_value, x_value=x_value)
    expected = x_value * w_value * (15 if is_grouped else 1) * K
    assert abs(expected) < 2**31
    assert bool((reference.accumulate_linear(case.call)[0] == expected).all())
    assert bool((cpu.accumulate_linear(case.native, isa)[0] == expected).all())


@pytest.mark.parametrize("bits", [4, 8])
def test_extremes_of_alternating_sign_do_not_saturate(make_case, isa, bits) -> None:
    """The largest sums of neighbouring products, which cancel later."""
    case = make_case(bits, (4,), (23040,), 16)
    extreme = 8 if bits == 4 else 127
    sign = torch.where(torch.arange(23040) // 32 % 2 == 0, 1, -1)
    x_q = (127 * sign).to(torch.int8).repeat(4, 1)
    native = case.native
    native.x_q.copy_(x_q)
    case.call.x_q.copy_(x_q)
    expected = (x_q.double() @ case.weight[:, :, 0, 0].double().T).to(torch.int32)
    assert int(case.weight.abs().max()) == extreme
    assert torch.equal(cpu.accumulate_linear(native, isa)[0], expected)
    assert torch.equal(reference.accumulate_linear(case.call)[0], expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_identity_times_weight_is_the_decoded_weight(make_case, isa, bits) -> None:
    case = make_case(bits, (130,), (130,), 50)
    identity = torch.eye(130, dtype=torch.int8)
    case.native.x_q.copy_(identity)
    case.call.x_q.copy_(identity)
    decoded = case.weight[:, :, 0, 0].to(torch.int32)
    assert torch.equal(cpu.accumulate_linear(case.native, isa)[0].T, decoded)
    assert torch.equal(reference.accumulate_linear(case.call)[0].T, decoded)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("bits", [4, 8])
def test_result_does_not_depend_on_threads(make_case, isa, bits, threads) -> None:
    """Sizes that split into row blocks, into panel groups, and unevenly."""
    torch.set_num_threads(threads)
    for M, K, N in ((517, 600, 80), (5, 2000, 200), (301, 64, 17)):
        case = make_case(bits, (M,), (K,), N)
        assert torch.equal(cpu.accumulate_linear(case.native, isa)[0], case.oracle()[0])


def test_activations_need_not_be_contiguous(make_case, isa) -> None:
    case = make_case(4, (10,), (70,), 20)
    wide = torch.zeros(10, 140, dtype=torch.int8)
    wide[:, ::2] = case.native.x_q
    case.native.x_q = wide[:, ::2]
    assert torch.equal(cpu.accumulate_linear(case.native, isa)[0], case.oracle()[0])


def test_no_rows_give_no_rows(make_case, isa) -> None:
    case = make_case(4, (0,), (70,), 20)
    assert cpu.accumulate_linear(case.native, isa)[0].shape == (0, 20)
    assert reference.linear(case.call).shape == cpu.linear(case.native, isa).shape == (0, 20)
    geometry = Conv2dGeometry((1, 1))
    image = make_case(4, (0, 3, 3), (70,), 20, geometry)
    assert cpu.conv2d(image.native, geometry, isa).shape == (0, 3, 3, 20)
    assert reference.conv2d(image.call, geometry).shape == (0, 3, 3, 20)


@pytest.mark.parametrize(("bits", "is_grouped"), MODES, ids=MODE_IDS)
@pytest.mark.parametrize("offset", [1, 3])
def test_memory_need_not_be_aligned(make_case, isa, offset, bits, is_grouped) -> None:
    geometry = Conv2dGeometry((3, 3), padding=(1, 1))
    case = make_case(bits, (1, 5, 7), (70,), 21, geometry, is_grouped=is_grouped)

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        wide = torch.zeros(tensor.numel() + offset, dtype=tensor.dtype)
        wide[offset:] = tensor.flatten()
        return wide[offset:].view(tensor.shape)

    case.native.x_q, case.native.qweight = moved(case.native.x_q), moved(case.native.qweight)
    case.native.w_scale = moved(case.native.w_scale)
    assert case.native.x_q.data_ptr() % 4 != 0
    assert torch.equal(cpu.accumulate_conv2d(case.native, geometry, isa)[0], case.oracle()[0])
    expected = reference.conv2d(case.call, geometry)
    assert torch.equal(cpu.conv2d(case.native, geometry, isa), expected)
