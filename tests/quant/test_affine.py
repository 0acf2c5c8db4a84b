"""Weight quantization against brute force in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ptq4adm.errors import ConfigError, NonFiniteError, ShapeError
from ptq4adm.quant.affine import (
    QMAX,
    QMIN,
    QuantizedRows,
    quantization_error,
    quantize_rows,
)

RATIOS = {
    4: torch.linspace(0.3, 1.0, 71, dtype=torch.float64),
    8: torch.linspace(0.5, 1, 51, dtype=torch.float64),
}


def _rows(N: int = 24, K: int = 256) -> Tensor:
    """Rows of several kinds: Gaussian, tiny, one outlier, negative only, zero, constant."""
    rows = torch.randn(N, K)
    rows[1] *= 1e-6
    rows[2, 7] = 30.0
    rows[3] = -rows[3].abs()
    rows[4] = 0.0
    rows[5] = 0.25
    rows[6, 3] = -50.0
    return rows


def _brute_force_errors(rows: Tensor, scales: Tensor, bits: int, power: float = 2.0) -> Tensor:
    """Sum of |error|^power in float64 of [N, K] rows under [N, C] scales."""
    w, s = rows.double()[:, None, :], scales.double()[:, :, None]
    return ((w / s).round().clamp(QMIN[bits], QMAX[bits]) * s - w).abs().pow(power).sum(dim=2)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_search_by_another_power_finds_the_least_of_the_grid(bits: int) -> None:
    rows = _rows()
    full = rows.abs().amax(dim=1).clamp_min(1e-8) / QMAX[bits]
    candidates = full[:, None].double() * RATIOS[bits]
    best = _brute_force_errors(rows, candidates, bits, 2.4).amin(dim=1)
    found = quantize_rows(rows, bits=bits, observer="p2.4")
    error = _brute_force_errors(rows, found.w_scale[:, None], bits, 2.4)[:, 0]
    assert (error <= best * (1 + 1e-4) + 1e-18).all()
    # it is another search: it clips less on average
    assert found.w_scale.mean() > quantize_rows(rows, bits=bits).w_scale.mean()


def test_groups_are_searched_by_another_power() -> None:
    rows = torch.randn(16, 256)
    found = quantize_rows(rows, bits=4, observer="p2.4", group_size=64)
    plain = quantize_rows(rows, bits=4, group_size=64)

    def error(quantized: QuantizedRows) -> float:
        return float((quantized.dequantize() - rows).abs().pow(2.4).sum())

    assert error(found) < error(plain)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_search_finds_the_least_error_of_the_grid(bits: int) -> None:
    rows = _rows()
    full = rows.abs().amax(dim=1).clamp_min(1e-8) / QMAX[bits]
    best = _brute_force_errors(rows, full[:, None].double() * RATIOS[bits], bits).amin(dim=1)
    found = quantize_rows(rows, bits=bits)
    error = _brute_force_errors(rows, found.w_scale[:, None], bits)[:, 0]
    assert (error <= best * (1 + 1e-4) + 1e-15).all()
    torch.testing.assert_close(
        quantization_error(rows, found).double(), error, rtol=1e-3, atol=1e-9
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_absmax_never_clips_and_the_search_is_never_worse(bits: int) -> None:
    rows = _rows()
    absmax = quantize_rows(rows, bits=bits, observer="absmax")
    half_step = absmax.w_scale[:, None] / 2 * (1 + 1e-5)
    assert ((absmax.dequantize() - rows).abs() <= half_step).all()
    searched = quantize_rows(rows, bits=bits)
    assert (
        quantization_error(rows, searched) <= quantization_error(rows, absmax) * (1 + 1e-5)
    ).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_are_the_rounded_quotients(bits: int) -> None:
    rows = _rows()
    found = quantize_rows(rows, bits=bits)
    expected = (rows / found.w_scale[:, None]).round().clamp(QMIN[bits], QMAX[bits])
    assert torch.equal(found.w_q, expected.to(torch.int8))
    assert found.w_q.dtype == torch.int8
    assert found.w_scale.dtype == torch.float32
    assert found.w_mult is None


def test_a_long_gaussian_row_is_clipped_at_4_bits_and_hardly_at_8() -> None:
    rows = torch.randn(8, 4096)
    for bits, low, high in ((4, 0.55, 0.8), (8, 0.9, 1.0)):
        ratio = quantize_rows(rows, bits=bits).w_scale * QMAX[bits] / rows.abs().amax(dim=1)
        assert low <= float(ratio.mean()) <= high


def test_zeros_stay_zero_and_have_a_usable_scale() -> None:
    for group_size in (None, 64):
        found = quantize_rows(torch.zeros(3, 128), bits=4, group_size=group_size)
        assert (found.w_q == 0).all()
        assert (found.w_scale > 0).all()


def test_scaling_a_row_scales_only_its_scale() -> None:
    rows = torch.randn(5, 128)
    a, b = quantize_rows(rows, bits=4), quantize_rows(rows * 1024, bits=4)
    assert torch.equal(a.w_q, b.w_q)
    assert torch.equal(a.w_scale * 1024, b.w_scale)


def test_results_do_not_depend_on_how_rows_are_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _rows(24, 192)
    whole = quantize_rows(rows, bits=4, group_size=64)
    monkeypatch.setattr("ptq4adm.quant.affine._CHUNK", 200)
    parts = quantize_rows(rows, bits=4, group_size=64)
    assert torch.equal(whole.w_q, parts.w_q)
    assert torch.equal(whole.w_scale, parts.w_scale)


class TestGroups:
    """Integer multipliers per block of 64."""

    def test_they_are_legal_and_the_products_fit_in_int8(self) -> None:
        found = quantize_rows(_rows(), bits=4, group_size=64)
        assert found.w_mult is not None
        assert found.w_mult.dtype == torch.uint8
        assert found.w_mult.shape == (24, 4)
        assert found.w_mult.min() >= 1
        assert found.w_mult.max() <= 15
        product = found.w_q.int() * found.w_mult.int().repeat_interleave(64, dim=1)
        assert product.abs().max() <= 120

    def test_no_single_multiplier_could_be_better(self) -> None:
        rows = _rows(8, 192)
        found = quantize_rows(rows, bits=4, group_size=64)
        assert found.w_mult is not None
        groups = rows.view(8 * 3, 64)
        scales = found.w_scale[:, None, None] * torch.arange(1, 16)  # [N, 1, 15]
        errors = _brute_force_errors(groups, scales.expand(8, 3, 15).reshape(24, 15), 4)
        chosen = errors.gather(1, (found.w_mult.long() - 1).view(24, 1))
        assert (chosen <= errors.amin(dim=1, keepdim=True) * (1 + 1e-4) + 1e-15).all()

    def test_they_help_where_groups_differ_in_range(self) -> None:
        rows = torch.randn(16, 256)
        rows[:, 64:128] *= 0.1
        rows[:, 128:192] *= 0.3
        plain = quantization_error(rows, quantize_rows(rows, bits=4)).sum()
        grouped = quantization_error(rows, quantize_rows(rows, bits=4, group_size=64)).sum()
        assert grouped < 0.8 * plain

    def test_absmax_never_clips(self) -> None:
        rows = _rows()
        found = quantize_rows(rows, bits=4, group_size=64, observer="absmax")
        assert found.w_mult is not None
        step = (found.w_scale[:, None] * found.w_mult).repeat_interleave(64, dim=1)
        assert ((found.dequantize() - rows).abs() <= step / 2 * 1.001).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    rows = torch.randn(4, 64)
    rows[2, 3] = value
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        quantize_rows(rows, bits=4)


def test_wrong_arguments_are_refused() -> None:
    rows = torch.randn(4, 64)
    with pytest.raises(ConfigError, match="needs 4 or 8"):
        quantize_rows(rows, bits=3)
    with pytest.raises(ConfigError, match="'absmax' or 'squared_error'"):
        quantize_rows(rows, bits=4, observer="mse")
    with pytest.raises(ConfigError, match="group_size 32"):
        quantize_rows(rows, bits=4, group_size=32)
    with pytest.raises(ConfigError, match="at 8 bits"):
        quantize_rows(rows, bits=8, group_size=64)
    with pytest.raises(ShapeError, match="multiple of 64"):
        quantize_rows(torch.randn(4, 65), bits=4, group_size=64)
    with pytest.raises(ShapeError, match=r"needs \[N, K\]"):
        quantize_rows(torch.randn(4, 4, 4), bits=4)
