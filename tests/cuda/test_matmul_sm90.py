"""Matrix products for sm_90a on the emulator: whole kernels, against the oracle and the reference.

The emulator checks barriers, proxies, asynchronous products and their registers besides every
access, so each test is a race check as well. Emulation is slow: few steps of few tiles, that end
within a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from emulated_backend import (
    BITS,
    BOX_CONVOLUTIONS,
    MODES,
    OUTPUTS,
    SAME,
    SM90A_TILES,
    TERMS,
    M,
    assert_close_after_gelu,
    assert_equal,
    assert_exact,
    emulate,
    gated,
    on_cuda,
    scaled,
    sm90a_tile,
)
from operator_cases import build_case

from ptq4adm.ops import cuda_matmul, reference

K_ALIGNED = 208  # three steps and a quarter, rows of whole 16 bytes


SMALL, SPLIT = sm90a_tile(64, 64), sm90a_tile(64, 64, 3)
WHOLE_OR_SPLIT = pytest.mark.parametrize("tile", [SMALL, SPLIT], ids=["whole", "split"])
EVERY_TILE = pytest.mark.parametrize("size", SM90A_TILES, ids=lambda size: f"{size[0]}x{size[1]}")


@pytest.fixture(autouse=True)
def _emulated(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ModuleType]:
    """Backend ``cuda`` on the emulator: CPU tensors, every address registered, outputs poisoned."""
    compiled = request.getfixturevalue("matmul_sm90_emulated")
    with emulate(compiled, monkeypatch):
        yield compiled


@pytest.fixture(params=[False, True], ids=["forward", "backward"])
def both_orders(request: pytest.FixtureRequest, matmul_sm90_emulated: ModuleType) -> None:
    """Blocks and threads in either order; boxes land as soon, or as late, as they may."""
    matmul_sm90_emulated.run_backward(request.param)


# --- accumulators -------------------------------------------------------------------------------

SIZES = {
    "whole": ((64,), (128,), 64),
    "ragged": ((67,), (80,), 37),
    "tiny": ((1,), (16,), 1),
    "long": ((5,), (1040,), 40),
    "two segments": ((9,), (64, 80), 48),
    "two ragged segments": ((66,), (144, 48), 35),
}


@MODES
@pytest.mark.parametrize("size", SIZES)
def test_linear_equals_the_oracle(size, bits, is_grouped) -> None:
    """``long`` goes round the ring of eight stages twice."""
    shape, segments, N = SIZES[size]
    assert_exact(build_case(bits, shape, segments, N, is_grouped=is_grouped), SMALL)


@MODES
@EVERY_TILE
@pytest.mark.usefixtures("both_orders")
def test_every_tile_equals_the_oracle(size, bits, is_grouped) -> None:
    """Two tiles by two, the last of each with a few rows and channels; two segments."""
    case = build_case(bits, (size[0] + 3,), (144, 32), size[1] + 5, is_grouped=is_grouped)
    assert_exact(case, sm90a_tile(*size))


@MODES
@pytest.mark.usefixtures("both_orders")
def test_splits_equal_the_oracle(bits, is_grouped) -> None:
    """Seven of nine steps leave blocks without any; whichever block comes last adds up."""
    for segments, splits in (((576,), 7), ((320, 208), 3)):
        case = build_case(bits, (5,), segments, 35, is_grouped=is_grouped)
        assert_exact(case, sm90a_tile(64, 64, splits))


@EVERY_TILE
@pytest.mark.usefixtures("both_orders")
def test_ring_goes_round(size) -> None:
    """More steps than stages."""
    assert_exact(build_case(4, (3,), (640,), 70), sm90a_tile(*size))


@pytest.mark.parametrize("name", BOX_CONVOLUTIONS)
@WHOLE_OR_SPLIT
@pytest.mark.usefixtures("both_orders")
def test_convolutions_equal_the_oracle(name, tile) -> None:
    shape, segments, geometry = BOX_CONVOLUTIONS[name]
    assert_exact(build_case(4, shape, segments, 19, geometry), tile)


@MODES
def test_every_weight_convolves(bits, is_grouped) -> None:
    case = build_case(bits, (2, 5, 6), (80,), 70, SAME, is_grouped=is_grouped)
    assert_exact(case, sm90a_tile(128, 64, 2))


@EVERY_TILE
@pytest.mark.usefixtures("both_orders")
def test_every_tile_convolves(size) -> None:
    """Tiles that end inside an image, hold several, and are not filled by whole rows."""
    assert_exact(build_case(4, (3, 7, 9), (64,), 37, SAME), sm90a_tile(*size))


@BITS
def test_real_sums_do_not_saturate(bits) -> None:
    """The longest K of TANGO, 9 x 2560, of extremes."""
    w_value = -8 if bits == 4 else -127
    case = build_case(bits, (1, 1, 2), (2560,), 17, SAME, w_value=w_value, x_value=-128)
    assert_exact(case, sm90a_tile(64, 64, 4))


# --- results ------------------------------------------------------------------------------------

N = {"odd": 37, "fours": 36}


@WHOLE_OR_SPLIT
@pytest.mark.parametrize("width", N)
@pytest.mark.parametrize("name", ["scales", "temb, one a row", "all"])
def test_terms(name, width, tile) -> None:
    n = N[width]
    assert_equal(scaled(build_case(4, (M,), (K_ALIGNED,), n), **TERMS[name](n)), tile)


@MODES
@pytest.mark.parametrize("width", N)
@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs(name, width, bits, is_grouped) -> None:
    n = N[width]
    case = build_case(bits, (M,), (K_ALIGNED,), n, is_grouped=is_grouped)
    assert_equal(scaled(case, **TERMS["all"](n), **OUTPUTS[name]), SMALL)


@pytest.mark.parametrize("tile", [SMALL, SPLIT, sm90a_tile(128, 128)], ids=str)
@pytest.mark.parametrize("form", ["one", "row", "table"])
def test_two_segments_have_their_own_scales(form, tile) -> None:
    size = {"one": 1, "row": M, "table": 10}[form]
    step = torch.tensor([7]) if form == "table" else None
    case = scaled(
        build_case(4, (M,), (K_ALIGNED, 144), 36),
        torch.rand(size),
        x2_scale=torch.rand(size),
        step=step,
    )
    assert_equal(case.with_options(**TERMS["all"](36)), tile)


@EVERY_TILE
def test_every_tile_stores_rows_with_their_scales(size) -> None:
    rows, channels = size[0] + 3, size[1] + 4
    case = scaled(build_case(4, (rows,), (64,), channels), torch.rand(rows))
    assert_equal(case.with_options(residual=torch.randn(rows, channels).half()), sm90a_tile(*size))


@pytest.mark.parametrize("index", [-1, 10])
def test_a_step_outside_the_table_shows_as_nan(index) -> None:
    case = scaled(build_case(4, (M,), (K_ALIGNED,), 36), torch.rand(10), step=torch.tensor([index]))
    assert bool(cuda_matmul.linear(on_cuda(case), SMALL).isnan().all())


def test_minus_zero_is_kept() -> None:
    case = build_case(4, (M,), (K_ALIGNED,), 36, x_value=0)
    case = case.with_scales(torch.tensor(1.0), -torch.ones(36))
    case = case.with_options(temb=torch.full((2, 36), -0.0))
    assert bool(torch.signbit(reference.linear(case.call)).all())
    assert bool(torch.signbit(cuda_matmul.linear(on_cuda(case), SMALL)).all())


@pytest.mark.parametrize("out", ["float32", "float16", "int8"])
@pytest.mark.parametrize(
    "tile", [SMALL, sm90a_tile(64, 64, 2), sm90a_tile(128, 128), sm90a_tile(128, 256)], ids=str
)
@pytest.mark.parametrize("channels", [64, 96, 38], ids=lambda n: f"N{n}")
def test_gated_result_equals_the_reference(channels, tile, out) -> None:
    """38 channels do not split into whole units: gated outside of the kernel."""
    assert_close_after_gelu(gated(channels, out, K_ALIGNED), tile)


@BITS
@pytest.mark.parametrize("out", ["float32", "bfloat16", "int8"])
def test_convolution_epilogue_follows_pixels_and_samples(out, bits) -> None:
    case = scaled(
        build_case(bits, (3, 5, 6), (64, 32), 36, SAME),
        torch.rand(10) * 0.01,
        x2_scale=torch.rand(10) * 0.01,
        step=torch.tensor([7]),
        bias=torch.randn(36),
        temb=torch.randn(3, 36).half(),
        residual=torch.randn(3, 5, 6, 36).bfloat16(),
    )
    change = {"out_scale": torch.rand(10)} if out == "int8" else {"out_dtype": getattr(torch, out)}
    assert_equal(case.with_options(**change), sm90a_tile(64, 64, 2))


def test_both_segments_of_an_image_have_their_own_scale() -> None:
    case = scaled(build_case(4, (2, 3, 5), (80, 48), 37, SAME), torch.rand(()))
    assert_equal(case.with_options(x2_scale=torch.tensor(0.7)), SMALL)
