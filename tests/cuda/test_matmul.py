"""Matrix products for sm_80 on the emulator: whole kernels, against the oracle and the reference.

The emulator checks every access (races, copies not waited for, memory outside the tensors), so each
test is a race check as well. Emulation is slow: sizes are small, but end within a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from emulated_backend import (
    BITS,
    MODES,
    OUTPUTS,
    SAME,
    TERMS,
    K,
    M,
    assert_close_after_gelu,
    assert_equal,
    assert_exact,
    emulate,
    gated,
    on_cuda,
    scaled,
)
from operator_cases import CONVOLUTIONS, build_case

from ptq4adm.errors import ConfigError, ShapeError
from ptq4adm.ops import cuda_matmul, reference
from ptq4adm.ops.arguments import Conv2dGeometry
from ptq4adm.ops.cuda_choice import choose_tile
from ptq4adm.ops.cuda_tiles import CudaTile

TILES = [(128, 128), (128, 64), (64, 64), (64, 32)]
SMALL = CudaTile(64, 32)
SPLIT = CudaTile(64, 32, split_k=3)
WHOLE_OR_SPLIT = pytest.mark.parametrize("tile", [SMALL, SPLIT], ids=["whole", "split"])
# linear: rows, K segments, N of each kind: whole tiles, ends everywhere, less than anything
SIZES = {
    "whole": ((64,), (128,), 32),
    "ragged": ((67,), (70,), 37),
    "tiny": ((1,), (1,), 1),
    "long": ((5,), (464,), 40),
    "two segments": ((9,), (64, 80), 48),
    "two ragged segments": ((66,), (130, 33), 35),
}


@pytest.fixture(autouse=True)
def _emulated(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ModuleType]:
    """Backend ``cuda`` on the emulator: CPU tensors, every address registered, outputs poisoned."""
    compiled = request.getfixturevalue("matmul_emulated")
    with emulate(compiled, monkeypatch):
        yield compiled


# --- accumulators -------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("size", SIZES)
def test_linear_equals_the_oracle(size, bits, is_grouped) -> None:
    shape, segments, N = SIZES[size]
    assert_exact(build_case(bits, shape, segments, N, is_grouped=is_grouped), SMALL)


@MODES
@pytest.mark.parametrize("size", TILES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("segments", [(64,), (320, 72)], ids=["one step", "two segments"])
def test_every_tile_equals_the_oracle(segments, size, bits, is_grouped) -> None:
    """Two tiles by two, the last of each with a few rows and channels."""
    case = build_case(bits, (size[0] + 3,), segments, size[1] + 5, is_grouped=is_grouped)
    assert_exact(case, CudaTile(*size))


@MODES
@pytest.mark.parametrize("is_backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("splits", [2, 3, 7])
def test_splits_equal_the_oracle(matmul_emulated, splits, is_backward, bits, is_grouped) -> None:
    """Seven of nine steps leave blocks without any; whichever block comes last adds up."""
    matmul_emulated.run_backward(is_backward)
    for segments in ((576,), (320, 200)):
        case = build_case(bits, (5,), segments, 35, is_grouped=is_grouped)
        assert_exact(case, CudaTile(64, 32, splits))


@MODES
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_equal_the_oracle(name, bits, is_grouped) -> None:
    shape, channels, geometry = CONVOLUTIONS[name]
    case = build_case(bits, shape, (channels,), 19, geometry, is_grouped=is_grouped)
    assert_exact(case, SMALL)


@pytest.mark.parametrize("name", ["3x3", "stride 2", "upsample 2", "upsample odd"])
@pytest.mark.parametrize("splits", [1, 4])
def test_convolutions_of_two_segments(name, splits) -> None:
    shape, channels, geometry = CONVOLUTIONS[name]
    case = build_case(4, shape, (channels, 72), 35, geometry)
    assert_exact(case, CudaTile(64, 64, splits))


@pytest.mark.parametrize("size", TILES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_every_tile_convolves(size) -> None:
    """Tiles that end inside an image and hold several."""
    assert_exact(build_case(4, (3, 7, 8), (64,), 37, SAME), CudaTile(*size))


@BITS
def test_real_sums_do_not_saturate(bits) -> None:
    """The longest K of TANGO, 9 x 2560, of extremes."""
    w_value = -8 if bits == 4 else -127
    case = build_case(bits, (1, 1, 2), (2560,), 17, SAME, w_value=w_value, x_value=-128)
    assert_exact(case, CudaTile(64, 32, 4))


def test_largest_groups_do_not_carry() -> None:
    for w_value in (-8, 7):
        case = build_case(4, (3,), (128,), 17, is_grouped=True, w_value=w_value, x_value=-128)
        assert_exact(case, SMALL)


def test_operands_need_not_be_contiguous_or_aligned() -> None:
    case = build_case(4, (5,), (64,), 20)
    call = on_cuda(case)
    for wide in (torch.zeros(5, 128, dtype=torch.int8), torch.zeros(5 * 64 + 1, dtype=torch.int8)):
        view = wide[:, ::2] if wide.dim() == 2 else wide[1:].view(5, 64)
        view.copy_(call.x_q)
        got = cuda_matmul.accumulate_linear(replace(call, x_q=view), SMALL)
        assert torch.equal(got[0], case.oracle()[0])


# --- results ------------------------------------------------------------------------------------

N = {"odd": 37, "fours": 36}


@WHOLE_OR_SPLIT
@pytest.mark.parametrize("width", N)
@pytest.mark.parametrize("name", TERMS)
def test_terms(name, width, tile) -> None:
    n = N[width]
    assert_equal(scaled(build_case(4, (M,), (K,), n), **TERMS[name](n)), tile)


@MODES
@pytest.mark.parametrize("width", N)
@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs(name, width, bits, is_grouped) -> None:
    n = N[width]
    case = build_case(bits, (M,), (K,), n, is_grouped=is_grouped)
    assert_equal(scaled(case, **TERMS["all"](n), **OUTPUTS[name]), SMALL)


@WHOLE_OR_SPLIT
@pytest.mark.parametrize("form", ["one", "row", "table"])
def test_two_segments_have_their_own_scales(form, tile) -> None:
    size = {"one": 1, "row": M, "table": 10}[form]
    step = torch.tensor([7]) if form == "table" else None
    case = scaled(
        build_case(4, (M,), (K, 130), 36),
        torch.rand(size),
        x2_scale=torch.rand(size),
        step=step,
    )
    assert_equal(case.with_options(**TERMS["all"](36)), tile)


@BITS
def test_a_scale_for_every_row(bits) -> None:
    assert_equal(scaled(build_case(bits, (70,), (K,), 37), torch.rand(70)), SMALL)


@pytest.mark.parametrize("index", [0, 9])
def test_a_row_of_every_table(index) -> None:
    step = torch.tensor(index)
    case = scaled(build_case(4, (M,), (K,), 36), torch.rand(10), step=step)
    assert_equal(case.with_options(out_scale=torch.rand(10) + 0.1), SMALL)


@pytest.mark.parametrize("index", [-1, 10, 2**40])
def test_a_step_outside_the_table_shows_as_nan(index) -> None:
    case = scaled(build_case(4, (M,), (K,), 36), torch.rand(10), step=torch.tensor([index]))
    assert bool(cuda_matmul.linear(on_cuda(case), SMALL).isnan().all())


def test_minus_zero_is_kept() -> None:
    case = build_case(4, (M,), (K,), 36, x_value=0)
    case = case.with_scales(torch.tensor(1.0), -torch.ones(36))
    case = case.with_options(temb=torch.full((2, 36), -0.0))
    assert bool(torch.signbit(reference.linear(case.call)).all())
    assert bool(torch.signbit(cuda_matmul.linear(on_cuda(case), SMALL)).all())


@pytest.mark.parametrize("out", ["float32", "float16", "int8"])
@pytest.mark.parametrize("tile", [SMALL, CudaTile(64, 64, 2), CudaTile(128, 128)], ids=str)
@pytest.mark.parametrize("channels", [64, 96, 38], ids=lambda n: f"N{n}")
def test_gated_result_equals_the_reference(channels, tile, out) -> None:
    """38 channels do not split into whole units: gated outside of the kernel."""
    assert_close_after_gelu(gated(channels, out, K), tile)


@BITS
@pytest.mark.parametrize("out", ["float32", "bfloat16", "int8"])
def test_convolution_epilogue_follows_pixels_and_samples(out, bits) -> None:
    case = scaled(
        build_case(bits, (3, 5, 8), (64, 24), 36, SAME),
        torch.rand(10) * 0.01,
        x2_scale=torch.rand(10) * 0.01,
        step=torch.tensor([7]),
        bias=torch.randn(36),
        temb=torch.randn(3, 36).half(),
        residual=torch.randn(3, 5, 8, 36).bfloat16(),
    )
    change = {"out_scale": torch.rand(10)} if out == "int8" else {"out_dtype": getattr(torch, out)}
    assert_equal(case.with_options(**change), CudaTile(64, 32, 2))


@BITS
def test_pointwise_convolution_is_a_product_of_its_pixels(bits) -> None:
    """The shortcut of an up block: two segments with scales of their own."""
    case = scaled(
        build_case(bits, (2, 3, 5), (72, 40), 37, Conv2dGeometry((1, 1))),
        x2_scale=torch.tensor(0.7),
        residual=torch.randn(2, 3, 5, 37),
    )
    assert_equal(case, SMALL)


def test_no_rows_give_no_rows() -> None:
    linear = on_cuda(build_case(4, (0,), (70,), 20))
    assert cuda_matmul.linear(linear).shape == (0, 20)
    image = on_cuda(build_case(4, (0, 3, 3), (70,), 20, SAME))
    assert cuda_matmul.conv2d(image, SAME).shape == (0, 3, 3, 20)


# --- tiles, and what is refused -----------------------------------------------------------------


def test_tiles_fit_into_every_gpu(matmul_emulated: ModuleType) -> None:
    tiles = matmul_emulated.matmul_tiles()
    assert [(tile.block_m, tile.block_n) for tile in tiles] == TILES
    for tile in tiles:
        assert max(tile.shared_bytes) <= 101_376  # 8.6 and 8.9


def test_chosen_tile_runs_and_fills_the_gpu() -> None:
    assert_exact(build_case(4, (70,), (600,), 40), None)
    assert choose_tile(8192, 1280, 20, 108) == CudaTile(128, 128)
    few_rows = choose_tile(128, 1280, 180, 108)
    blocks = -(-128 // few_rows.block_m) * -(-1280 // few_rows.block_n) * few_rows.split_k
    assert few_rows.split_k > 1
    assert blocks >= 80


def test_illegal_tiles_are_refused() -> None:
    call = on_cuda(build_case(4, (5,), (64,), 20))
    with pytest.raises(ConfigError, match="split_k = 2: there are 1 steps of 64 k"):
        cuda_matmul.linear(call, CudaTile(64, 32, 2))
    with pytest.raises(ValueError, match="no kernel has a tile of this size"):
        cuda_matmul.linear(call, CudaTile(64, 48))


def test_canonical_weight_is_refused() -> None:
    with pytest.raises(ShapeError, match="in the order of backend 'cuda'; call prepack first"):
        cuda_matmul.linear(build_case(4, (5,), (64,), 20).call)
