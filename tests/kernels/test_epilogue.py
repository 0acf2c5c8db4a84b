"""Epilogue: every term, form of scale and output dtype, bit for bit as the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ptq4adm.kernels.tuning import TileConfig
from ptq4adm.ops import reference

M, K, N = 20, 72, 38  # tiles of 16 end within all of them
SMALL = TileConfig(16, 16, 64, 4, 1)
SPLIT = TileConfig(16, 16, 64, 4, 1, split_k=2)
TILES = pytest.mark.parametrize("config", [SMALL, SPLIT], ids=["whole", "split"])
BITS = pytest.mark.parametrize("bits", [4, 8])
STEP = 7
TABLE = 10


def _scaled(case, x_scale: Tensor | None = None, **options: object):
    """A case with scales that leave no product exact, and options."""
    x_scale = torch.tensor(0.0123) if x_scale is None else x_scale
    return case.with_scales(x_scale, torch.rand(N) + 0.5).with_options(**options)


def _assert_equal(case, finish, config: TileConfig) -> None:
    got, expected = finish(case.call, config), reference.linear(case.call)
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)


# --- terms --------------------------------------------------------------------------------------

TERMS = {
    "scales": {},
    "bias": {"bias": torch.randn(N)},
    "bias fp16": {"bias": torch.randn(N).half()},
    "temb": {"temb": torch.randn(2, N)},
    "temb fp16": {"temb": torch.randn(4, N).half()},
    "residual": {"residual": torch.randn(M, N)},
    "residual fp16": {"residual": torch.randn(M, N).half()},
    "residual bf16": {"residual": torch.randn(M, N).bfloat16()},
    "all": {
        "bias": torch.randn(N),
        "temb": torch.randn(2, N),
        "residual": torch.randn(M, N).half(),
    },
}


@BITS
@TILES
@pytest.mark.parametrize("name", TERMS)
def test_terms(make_case, finish, name, config, bits) -> None:
    _assert_equal(_scaled(make_case(bits, (M,), (K,), N), **TERMS[name]), finish, config)


def test_terms_with_groups(make_case, finish) -> None:
    case = _scaled(make_case(4, (M,), (K,), N, is_grouped=True), **TERMS["all"])
    _assert_equal(case, finish, SMALL)


@TILES
@pytest.mark.parametrize("samples", [1, 2, 3, 6, 24, 48])
def test_samples_end_anywhere_in_a_tile(make_case, finish, samples, config) -> None:
    """Of 48 rows: one sample over three tiles, several in a tile, one a row."""
    case = _scaled(make_case(4, (48,), (K,), N), temb=torch.randn(samples, N))
    _assert_equal(case, finish, config)


def test_a_sample_that_is_not_finite_stays_by_itself(make_case, finish) -> None:
    temb = torch.randn(4, N)
    temb[1], temb[2] = float("nan"), float("inf")
    case = _scaled(make_case(4, (M,), (K,), N), temb=temb)
    got, expected = finish(case.call, SMALL), reference.linear(case.call)
    assert bool(got[5:10].isnan().all())
    assert bool(got[10:15].isposinf().all())
    assert torch.equal(got[:5], expected[:5])
    assert torch.equal(got[15:], expected[15:])


def test_minus_zero_is_kept(make_case, finish) -> None:
    case = make_case(4, (M,), (K,), N, x_value=0)
    case = case.with_scales(torch.tensor(1.0), -torch.ones(N))
    case = case.with_options(temb=torch.full((2, N), -0.0))
    assert bool(torch.signbit(reference.linear(case.call)).all())
    assert bool(torch.signbit(finish(case.call, SMALL)).all())


# --- forms of scales ----------------------------------------------------------------------------


@BITS
@TILES
def test_a_scale_for_every_row(make_case, finish, config, bits) -> None:
    case = _scaled(make_case(bits, (M,), (K,), N), torch.rand(M))
    _assert_equal(case, finish, config)


@TILES
@pytest.mark.parametrize("index", [0, STEP, TABLE - 1])
def test_a_row_of_a_table(make_case, finish, index, config) -> None:
    case = _scaled(make_case(4, (M,), (K,), N), torch.rand(TABLE), step=torch.tensor([index]))
    _assert_equal(case, finish, config)


@pytest.mark.parametrize("index", [-1, TABLE, 2**40])
def test_a_step_outside_the_table_shows_as_nan(make_case, finish, index) -> None:
    case = _scaled(make_case(4, (M,), (K,), N), torch.rand(TABLE), step=torch.tensor([index]))
    assert bool(finish(case.call, SMALL).isnan().all())


@TILES
@pytest.mark.parametrize("form", ["one", "row", "table"])
def test_two_segments_have_their_own_scales(make_case, finish, form, config) -> None:
    size = {"one": 1, "row": M, "table": TABLE}[form]
    step = torch.tensor([STEP]) if form == "table" else None
    case = _scaled(
        make_case(4, (M,), (K, 130), N), torch.rand(size), x2_scale=torch.rand(size), step=step
    )
    _assert_equal(case.with_options(**TERMS["all"]), finish, config)


def test_one_scale_beside_a_table(make_case, finish) -> None:
    case = _scaled(
        make_case(8, (M,), (K, K), N),
        torch.rand(1),
        x2_scale=torch.rand(TABLE),
        step=torch.tensor(STEP),
    )
    _assert_equal(case, finish, SMALL)


# --- outputs ------------------------------------------------------------------------------------


@TILES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_float_outputs(make_case, finish, device, dtype, config) -> None:
    case = _scaled(make_case(4, (M,), (K,), N), out_dtype=dtype, **TERMS["all"])
    got, expected = finish(case.call, config), reference.linear(case.call)
    if dtype == torch.bfloat16 and device == "cpu":
        # the interpreter cuts float32 off where a GPU rounds it
        exact = reference.linear(case.with_options(out_dtype=torch.float32).call)
        expected = (exact.view(torch.int32) & -65536).view(torch.float32).bfloat16()
    assert got.dtype == dtype
    assert torch.equal(got, expected)


@BITS
@TILES
def test_int8_output(make_case, finish, config, bits) -> None:
    """With a scale that clamps some and lets others end on half steps."""
    case = _scaled(make_case(bits, (M,), (K,), N), out_scale=torch.tensor(0.4))
    _assert_equal(case, finish, config)
    values = reference.linear(case.call)
    assert {-127, 127} <= set(values.flatten().tolist()), "the case does not clamp"


def test_int8_output_with_a_table(make_case, finish) -> None:
    step = torch.tensor([STEP])
    case = _scaled(make_case(4, (M,), (K,), N), step=step, out_scale=torch.rand(TABLE) + 1)
    _assert_equal(case, finish, SMALL)


def test_halves_are_rounded_to_even(make_case, finish) -> None:
    case = make_case(4, (M,), (K,), N).with_scales(torch.tensor(0.5), torch.ones(N))
    _assert_equal(case.with_options(out_scale=torch.tensor(1.0)), finish, SMALL)


def test_the_greatest_sums_become_floats_exactly_as_in_the_reference(make_case, finish) -> None:
    case = make_case(4, (1,), (131008,), 2, w_value=-8, x_value=-127)
    case = case.with_scales(torch.tensor(0.3), torch.rand(2))
    _assert_equal(case, finish, TileConfig(16, 16, 128, 4, 1))


# --- gated GELU ---------------------------------------------------------------------------------


def _gated(make_case, bits: int = 4, channels: int = N, **options: object):
    case = make_case(bits, (M,), (K,), channels)
    case = case.with_scales(torch.tensor(0.01), torch.rand(channels))
    return case.with_options(geglu=True, bias=torch.randn(channels), **options)


@BITS
@TILES
@pytest.mark.parametrize("channels", [2, 38, 64, 70])
def test_gated_values_meet_their_gates(make_case, finish, channels, config, bits) -> None:
    """Halves end within a tile, within the eight rows of a fragment, or after one channel."""
    case = _gated(make_case, bits, channels)
    got, expected = finish(case.call, config), reference.linear(case.call)
    assert got.shape == expected.shape == (M, channels // 2)
    # the error function of the device is not the host's
    assert float((got - expected).abs().max()) <= 2e-6 * float(expected.abs().max())


def test_gated_int8_output(make_case, finish) -> None:
    case = _gated(make_case, out_scale=torch.tensor(0.05))
    got, expected = finish(case.call, SMALL), reference.linear(case.call)
    steps = (got.int() - expected.int()).abs()
    assert int(steps.max()) <= 1
    assert int((steps != 0).sum()) <= 1
    assert len(expected.unique()) > 20


def test_gated_residual_is_added_before_gating(make_case, finish) -> None:
    case = _gated(make_case, residual=torch.randn(M, N))
    got, expected = finish(case.call, SMALL), reference.linear(case.call)
    assert float((got - expected).abs().max()) <= 2e-6 * float(expected.abs().max())
    without = reference.linear(
        replace(case.call, options=replace(case.call.options, residual=None))
    )
    assert not torch.equal(expected, without)
