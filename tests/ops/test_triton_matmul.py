"""Backend ``triton``: equal to the exact oracle and the reference, interpreted or on a GPU.

Tiles, splits and the product itself are tested in tests/kernels; here are the convolutions, and
what the operators add.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from operator_cases import call_on, triton_devices
from torch import Tensor

from ptq4adm.errors import BackendUnavailableError, ConfigError, ShapeError
from ptq4adm.kernels.tuning import TileConfig, illegal_reason
from ptq4adm.ops import reference, triton_matmul
from ptq4adm.ops.arguments import Conv2dGeometry

MODES = [(4, False), (4, True), (8, False)]
MODE_IDS = ["w4", "w4-groups", "w8"]
SAME = Conv2dGeometry((3, 3), padding=(1, 1))


@pytest.fixture(params=triton_devices())
def device(request: pytest.FixtureRequest) -> str:
    """The GPU if there is one, else the CPU, where kernels are interpreted."""
    return str(request.param)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what is allocated, so that an element nobody wrote shows."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        tensor = empty(*args, **kwargs)  # type: ignore[call-overload]
        return tensor.fill_(float("nan") if tensor.is_floating_point() else -77)

    monkeypatch.setattr(triton_matmul.torch, "empty", poisoned)


def _assert_exact(case, geometry, device, config=None) -> None:
    got = triton_matmul.accumulate_conv2d(call_on(case.call, device), geometry, config)
    for mine, expected in zip(got, case.oracle(), strict=True):
        assert torch.equal(mine.cpu(), expected)


# --- accumulators -------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "is_grouped"), MODES, ids=MODE_IDS)
def test_conv2d_equals_the_oracle(make_case, device, convolution, bits, is_grouped) -> None:
    shape, channels, geometry = convolution
    case = make_case(bits, shape, (channels,), 19, geometry, is_grouped=is_grouped)
    _assert_exact(case, geometry, device)


@pytest.mark.parametrize(("bits", "is_grouped"), MODES, ids=MODE_IDS)
def test_conv2d_of_two_segments_in_unequal_shares(
    make_case, device, convolution, bits, is_grouped
) -> None:
    shape, channels, geometry = convolution
    case = make_case(bits, shape, (channels, 72), 70, geometry, is_grouped=is_grouped)
    for splits in (2, 5):
        config = TileConfig(64, 64, 64, 4, 1, split_k=splits)
        if illegal_reason(config, triton_matmul.conv2d_problem(case.call, geometry)) is None:
            _assert_exact(case, geometry, device, config)


# batch, H, W, channels: every width of a latent, tiles that end inside an image, over several
# images, and below the last row; channels of whole and of broken blocks
BOXES = {
    "level 0": ((2, 9, 16), 64, SAME),
    "level 1": ((2, 5, 8), 128, SAME),
    "level 2": ((3, 7, 4), 64, SAME),
    "level 3": ((5, 3, 2), 192, SAME),
    "one column": ((3, 5, 1), 64, SAME),
    "16 channels": ((1, 4, 4), 16, SAME),
    "80 channels": ((2, 3, 8), 80, SAME),
    "no padding": ((1, 6, 10), 64, Conv2dGeometry((3, 3))),
    "wide padding": ((1, 2, 4), 64, Conv2dGeometry((3, 3), padding=(3, 3))),
    "dilation": ((2, 9, 8), 64, Conv2dGeometry((3, 3), padding=(2, 2), dilation=(2, 2))),
    "3x1": ((1, 6, 8), 64, Conv2dGeometry((3, 1), padding=(1, 0))),
}


@pytest.mark.parametrize(("bits", "is_grouped"), MODES, ids=MODE_IDS)
@pytest.mark.parametrize("name", BOXES)
def test_boxes_equal_the_oracle(make_case, device, name, bits, is_grouped) -> None:
    shape, channels, geometry = BOXES[name]
    case = make_case(bits, shape, (channels,), 70, geometry, is_grouped=is_grouped)
    if device == "cuda" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("boxes need compute capability 9.0")
    for block_m, splits in ((16, 1), (64, 3)):
        config = TileConfig(block_m, 64, 64, 4, 1, split_k=splits, form="tma")
        _assert_exact(case, geometry, device, config)


def test_boxes_are_refused_where_they_cannot_be_cut(make_case) -> None:
    tma = TileConfig(16, 64, form="tma", num_stages=1)
    for shape, channels, geometry in (
        ((1, 4, 6), 64, SAME),  # rows of six
        ((1, 4, 4), 24, SAME),  # pixels at 24 bytes
        ((1, 4, 4), 64, replace(SAME, stride=(2, 2))),
        ((1, 4, 4), 64, replace(SAME, upsample=(8, 8))),
    ):
        case = make_case(4, shape, (channels,), 16, geometry)
        with pytest.raises(ConfigError, match="form 'tma': needs stride 1"):
            triton_matmul.conv2d(case.call, geometry, tma)
    case = make_case(4, (1, 4, 4), (64, 64), 16, SAME)
    with pytest.raises(ConfigError, match="form 'tma'"):
        triton_matmul.conv2d(case.call, SAME, tma)


def test_real_sums_do_not_saturate(make_case, device) -> None:
    """The longest K of TANGO, 9 x 2560, of extremes."""
    case = make_case(4, (1, 1, 2), (2560,), 17, SAME, w_value=-8, x_value=-128)
    _assert_exact(case, SAME, device)


def test_images_need_not_be_contiguous(make_case, device) -> None:
    case = make_case(4, (2, 5, 7), (70,), 20, SAME)
    call = call_on(case.call, device)
    wide = torch.zeros(2, 5, 7, 140, dtype=torch.int8, device=device)
    wide[..., ::2] = call.x_q
    call.x_q = wide[..., ::2]
    assert torch.equal(triton_matmul.accumulate_conv2d(call, SAME)[0].cpu(), case.oracle()[0])


def test_boxes_are_cut_whatever_the_stride_of_a_single_image(make_case, device) -> None:
    """PyTorch calls memory contiguous however far apart one image is from no other."""
    if device == "cuda" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("boxes need compute capability 9.0")
    case = make_case(4, (1, 4, 8), (64,), 20, SAME)
    call = call_on(case.call, device)
    call.x_q = call.x_q.as_strided(call.x_q.shape, (1, *call.x_q.stride()[1:]))
    assert call.x_q.is_contiguous()
    config = TileConfig(32, 64, num_stages=1, form="tma")
    got = triton_matmul.accumulate_conv2d(call, SAME, config)[0]
    assert torch.equal(got.cpu(), case.oracle()[0])


def test_groups_are_part_of_what_a_tile_is_chosen_by(make_case) -> None:
    for is_grouped in (False, True):
        linear = make_case(4, (5,), (64,), 16, is_grouped=is_grouped).call
        assert triton_matmul.linear_problem(linear).is_grouped == is_grouped
        conv2d = make_case(4, (1, 4, 4), (64,), 16, SAME, is_grouped=is_grouped).call
        assert triton_matmul.conv2d_problem(conv2d, SAME).is_grouped == is_grouped


def test_a_step_may_not_reach_over_the_tap_of_a_convolution(make_case) -> None:
    """Even the only one: a convolution's last step is not masked."""
    geometry = Conv2dGeometry((1, 1), stride=(2, 2))
    call = make_case(4, (1, 4, 4), (64,), 16, geometry).call
    with pytest.raises(ConfigError, match=r"block_k = 128: a tap of \(64,\) channels ends"):
        triton_matmul.conv2d(call, geometry, TileConfig(32, 32, 128, num_stages=1))


def test_no_rows_give_no_rows(make_case, device) -> None:
    linear = call_on(make_case(4, (0,), (70,), 20).call, device)
    assert triton_matmul.linear(linear).shape == (0, 20)
    for geometry in (SAME, Conv2dGeometry((1, 1))):
        image = call_on(make_case(4, (0, 3, 3), (70,), 20, geometry).call, device)
        assert triton_matmul.conv2d(image, geometry).shape == (0, 3, 3, 20)


# --- outputs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["gather", "tma"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("out", ["float32", "float16", "bfloat16", "int8"])
def test_conv2d_epilogue_equals_the_reference(make_case, device, out, bits, form) -> None:
    if form == "tma" and device == "cuda" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("boxes need compute capability 9.0")
    case = make_case(bits, (3, 5, 8), (64,), 37, SAME)
    case = case.with_scales(torch.rand(10) * 0.01, torch.rand(37)).with_options(
        step=torch.tensor([7]),
        bias=torch.randn(37),
        temb=torch.randn(3, 37).half(),
        residual=torch.randn(3, 5, 8, 37).bfloat16(),
    )
    case = (
        case.with_options(out_scale=torch.rand(10))
        if out == "int8"
        else case.with_options(out_dtype=getattr(torch, out))
    )
    config = TileConfig(32, 64, 64, 4, 1, split_k=2, form=form)
    got = triton_matmul.conv2d(call_on(case.call, device), SAME, config)
    expected = reference.conv2d(case.call, SAME)
    assert got.dtype == expected.dtype
    if out == "bfloat16" and device == "cpu":
        # the interpreter cuts float32 off where a GPU rounds it
        case = case.with_options(out_dtype=torch.float32)
        bits32 = reference.conv2d(case.call, SAME).view(torch.int32)
        expected = (bits32 & -65536).view(torch.float32).bfloat16()
    assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_pointwise_conv2d_is_a_product_of_its_pixels(make_case, device, bits) -> None:
    """The shortcut of an up block: two segments with scales of their own."""
    geometry = Conv2dGeometry((1, 1))
    case = make_case(bits, (2, 3, 5), (72, 40), 37, geometry)
    case = case.with_scales(torch.tensor(0.02), torch.rand(37)).with_options(
        x2_scale=torch.tensor(0.7), bias=torch.randn(37), residual=torch.randn(2, 3, 5, 37)
    )
    assert triton_matmul.conv2d_problem(case.call, geometry).kernel == f"w{bits}a8_gemm"
    got = triton_matmul.conv2d(call_on(case.call, device), geometry)
    assert torch.equal(got.cpu(), reference.conv2d(case.call, geometry))


def test_gated_convolution(make_case, device) -> None:
    case = make_case(4, (2, 3, 5), (64,), 38, SAME)
    case = case.with_scales(torch.tensor(0.001), torch.rand(38)).with_options(geglu=True)
    got = triton_matmul.conv2d(call_on(case.call, device), SAME).cpu()
    expected = reference.conv2d(case.call, SAME)
    assert got.shape == expected.shape == (2, 3, 5, 19)
    assert float((got - expected).abs().max()) <= 2e-6 * float(expected.abs().max())


def test_step_outside_the_table_shows_as_nan(make_case, device) -> None:
    """A kernel cannot raise; the step is checked on the host when it is set."""
    for index in (-1, 10):
        case = make_case(4, (2, 3, 5), (64,), 20, SAME)
        case = case.with_scales(torch.rand(10), torch.rand(20))
        case = case.with_options(step=torch.tensor(index))
        assert bool(triton_matmul.conv2d(call_on(case.call, device), SAME).isnan().all())


# --- refused ------------------------------------------------------------------------------------


def test_illegal_tile_is_refused(make_case) -> None:
    call = make_case(4, (5,), (64,), 20).call
    with pytest.raises(ConfigError, match="split_k = 2: there are 1 steps of 64 k"):
        triton_matmul.linear(call, TileConfig(16, 64, num_stages=1, split_k=2))


def test_tensors_of_several_devices_are_refused(make_case) -> None:
    call = make_case(4, (5,), (64,), 20).call
    for change in ({"qweight": call.qweight.to("meta")}, {"w_scale": call.w_scale.to("meta")}):
        with pytest.raises(BackendUnavailableError, match="cpu and meta; move"):
            triton_matmul.linear(replace(call, **change))
    options = replace(call.options, bias=torch.zeros(20, device="meta"))
    with pytest.raises(BackendUnavailableError, match="cpu and meta; move"):
        triton_matmul.linear(replace(call, options=options))


def test_more_elements_than_offsets_reach_are_refused(make_case) -> None:
    call = make_case(4, (5,), (64,), 20).call
    rows = call.x_q[:1].expand(2**25, 64)  # no memory
    with pytest.raises(ShapeError, match=r"x_q: 2147483648 elements.*split the batch"):
        triton_matmul.linear(replace(call, x_q=rows))
