"""GPTQ against its formulas in float64, and what it must leave alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ptq4adm.errors import ConfigError, NonFiniteError, ShapeError
from ptq4adm.quant.affine import QuantizedRows, quantize_rows
from ptq4adm.quant.gptq import gptq_rows, output_error, shift_target


def _correlated(K: int, M: int, *, rank: int | None = None) -> Tensor:
    """Inputs [K, M] with few directions that matter."""
    rank = rank or max(1, K // 4)
    return torch.randn(K, rank) @ torch.randn(rank, M) + 0.1 * torch.randn(K, M)


def _oracle(rows: Tensor, hessian: Tensor, scale: Tensor, damp: float) -> Tensor:
    """Optimal brain quantization, one weight at a time, with a true inverse in float64."""
    H = hessian.double() + damp * hessian.diagonal().double().mean() * torch.eye(len(hessian))
    left, w_q = rows.double().clone(), torch.zeros_like(rows, dtype=torch.float64)
    inverse = torch.linalg.inv(H)
    for k in range(rows.shape[1]):
        w_q[:, k] = (left[:, k] / scale[:, k]).round().clamp(-8, 7)
        error = (left[:, k] - w_q[:, k] * scale[:, k]) / inverse[k, k]
        left -= error[:, None] * inverse[k]
        # the weight is fixed: take its row and column out of the inverse
        inverse = inverse - inverse[:, k : k + 1] * inverse[k : k + 1] / inverse[k, k]
        inverse[k, :], inverse[:, k], inverse[k, k] = 0, 0, 1
    return w_q


@pytest.mark.parametrize(("N", "K", "block"), [(5, 64, 128), (3, 200, 64), (4, 65, 1), (1, 1, 8)])
def test_it_is_optimal_brain_quantization(N: int, K: int, block: int) -> None:
    rows, X = torch.randn(N, K), _correlated(K, 3 * K + 8)
    hessian = X @ X.T
    start = quantize_rows(rows, bits=4)
    found = gptq_rows(rows, hessian, start, bits=4, block=block, act_order=False)
    scale = start.w_scale.double()[:, None].expand(N, K)
    wrong = found.w_q.double() != _oracle(rows, hessian, scale, 0.01)
    # a tie in float32 may go the other way, and what follows with it
    assert wrong.any(dim=1).float().mean() <= 0.25
    torch.testing.assert_close(found.w_scale, start.w_scale, rtol=0, atol=0)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), [(4, None), (4, 64), (8, None)])
def test_the_output_error_falls(bits: int, group_size: int | None, act_order: bool) -> None:
    rows, X = torch.randn(24, 192), _correlated(192, 1000)
    start = quantize_rows(rows, bits=bits, group_size=group_size)
    found = gptq_rows(rows, X @ X.T, start, bits=bits, act_order=act_order)
    before = output_error(rows, start, X @ X.T).sum()
    assert output_error(rows, found, X @ X.T).sum() < 0.5 * before
    assert found.w_mult is start.w_mult
    low, high = (-8, 7) if bits == 4 else (-127, 127)
    assert low <= int(found.w_q.min())
    assert int(found.w_q.max()) <= high


def test_no_other_last_integer_is_better() -> None:
    # greedy: not the best of all, but the last weight is the best for those before it
    for seed in range(20):
        torch.manual_seed(seed)
        rows, X = torch.randn(3, 5), _correlated(5, 50, rank=1)
        start = QuantizedRows(torch.zeros(3, 5, dtype=torch.int8), torch.full((3,), 0.4))
        found = gptq_rows(rows, X @ X.T, start, bits=4, damp=1e-6, act_order=False)
        errors = output_error(rows, found, X @ X.T)
        for value in range(-8, 8):
            w_q = found.w_q.clone()
            w_q[:, -1] = value
            other = output_error(rows, QuantizedRows(w_q, start.w_scale), X @ X.T)
            assert bool((errors <= other * 1.001 + 1e-6).all())


def test_inputs_that_are_always_zero_change_nothing() -> None:
    rows, X = torch.randn(6, 128), _correlated(128, 400)
    dead = torch.arange(128) % 5 == 0
    X[dead] = 0
    rows[:, 100:] = 0
    X[100:] = 0  # padding
    start = quantize_rows(rows, bits=4)
    found = gptq_rows(rows, X @ X.T, start, bits=4)
    dead[100:] = True
    assert torch.equal(found.w_q[:, dead], start.w_q[:, dead])
    assert not bool(found.w_q[:, 100:].any())
    alone = gptq_rows(
        rows[:, ~dead],
        (X @ X.T)[~dead][:, ~dead],
        QuantizedRows(start.w_q[:, ~dead], start.w_scale),
        bits=4,
    )
    assert torch.equal(found.w_q[:, ~dead], alone.w_q)
    none = gptq_rows(rows, torch.zeros(128, 128), start, bits=4)
    assert torch.equal(none.w_q, start.w_q)


def test_independent_inputs_leave_plain_rounding() -> None:
    rows = torch.randn(6, 70)
    start = quantize_rows(rows, bits=4)
    found = gptq_rows(rows, torch.diag(torch.rand(70) + 0.1), start, bits=4)
    assert torch.equal(found.w_q, start.w_q)


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_hessians_of_one_direction_and_any_size(size: float) -> None:
    rows, direction = torch.randn(4, 320), torch.randn(320)
    hessian = size * direction[:, None] * direction
    start = quantize_rows(rows, bits=4)
    found = gptq_rows(rows, hessian, start, bits=4, damp=1e-7)
    assert (
        output_error(rows, found, hessian).sum() < 0.05 * output_error(rows, start, hessian).sum()
    )


@pytest.mark.parametrize("damp", [1e-8, 0.01])
def test_float32_factors_are_as_good_as_float64(
    monkeypatch: pytest.MonkeyPatch, damp: float
) -> None:
    # a condition number near 1e8, which float32 cannot invert
    rows, X = torch.randn(16, 256), torch.randn(256, 1000) * torch.logspace(0, -4, 256)[:, None]
    mixed = torch.linalg.qr(torch.randn(256, 256)).Q @ X
    hessian = mixed @ mixed.T
    start = quantize_rows(rows, bits=4)
    wide = gptq_rows(rows, hessian, start, bits=4, damp=damp)
    monkeypatch.setattr("ptq4adm.quant.gptq._LARGEST_DOUBLE", 0)
    narrow = gptq_rows(rows, hessian, start, bits=4, damp=damp)
    errors = [float(output_error(rows, found, hessian).sum()) for found in (start, wide, narrow)]
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] < 1.05 * errors[1]


def test_the_shifted_target_solves_its_normal_equations() -> None:
    W, X = torch.randn(5, 40), _correlated(40, 300)
    Z = X + 0.3 * torch.randn(40, 300)
    X[7], Z[7] = 0, 0
    H, C = Z @ Z.T, X @ Z.T
    found = shift_target(W, H, C, damp=0.1)
    kept = torch.arange(40) != 7
    r = 0.1 * H.double().diagonal()[kept].mean()
    left = found[:, kept].double() @ (H[kept][:, kept].double() + r * torch.eye(39))
    right = W[:, kept].double() @ (C[kept][:, kept].double() + r * torch.eye(39))
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4 * float(right.abs().max()))
    assert torch.equal(found[:, 7], W[:, 7])
    torch.testing.assert_close(shift_target(W, H, H), W)
    before, after = ((W @ X - V @ Z).square().sum() for V in (W, found))
    assert after < before


def test_wrong_arguments() -> None:
    rows, hessian = torch.randn(2, 64), torch.eye(64)
    start = quantize_rows(rows, bits=4)
    for change, error, message in (
        ({"bits": 3}, ConfigError, "4 or 8"),
        ({"damp": 0.0}, ConfigError, "damp"),
        ({"damp": float("nan")}, ConfigError, "damp"),
        ({"block": 0}, ConfigError, "block"),
    ):
        with pytest.raises(error, match=message):
            gptq_rows(rows, hessian, start, **{"bits": 4, **change})
    with pytest.raises(ShapeError, match="need"):
        gptq_rows(rows, torch.eye(63), start, bits=4)
    with pytest.raises(ShapeError, match="need"):
        shift_target(rows, hessian, torch.eye(63))
    hessian[3, 4] = float("nan")
    with pytest.raises(NonFiniteError, match="hessian"):
        gptq_rows(rows, hessian, start, bits=4)
    with pytest.raises(NonFiniteError, match="not positive definite"):
        gptq_rows(rows, torch.ones(64, 64) - 1e9 * (1 - torch.eye(64)), start, bits=4)
