"""Distances of embeddings against closed forms and independent sums."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from ptq4adm.errors import NonFiniteError, ShapeError
from ptq4adm.evaluation.distances import (
    draw_rows,
    frechet_distance,
    frechet_distance_infinity,
    kernel_distance,
)


def _normal(count: int, dimension: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dimension, generator=generator, dtype=torch.float64)


def _white(count: int, dimension: int, seed: int) -> torch.Tensor:
    """Clips whose sample mean is 0 and whose sample covariance is the identity."""
    x = _normal(count, dimension, seed)
    q, _ = torch.linalg.qr(x - x.mean(0))
    return q * (count - 1) ** 0.5


def test_frechet_of_scaled_and_shifted_gaussians() -> None:
    x = _white(40, 3, 0)
    scale = torch.tensor([2.0, 0.5, 3.0], dtype=torch.float64)
    shift = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    expected = float(shift.square().sum() + (scale - 1).square().sum())
    result = frechet_distance(x, _white(40, 3, 1) * scale + shift)
    assert result.value == pytest.approx(expected, rel=1e-10)
    assert result.clips == 40
    assert result.warnings == ()


@pytest.mark.parametrize("count", [4, 30])
def test_frechet_equals_product_eigenvalues(count: int) -> None:
    x, y = _normal(count, 7, 2), _normal(count, 7, 3) @ _normal(7, 7, 4) + 1.0
    a, b = np.cov(x.numpy().T), np.cov(y.numpy().T)
    # the unsymmetric product has the same eigenvalues
    cross = np.sqrt(np.clip(np.linalg.eigvals(a @ b).real, 0, None)).sum()
    mean = np.square(x.numpy().mean(0) - y.numpy().mean(0)).sum()
    expected = mean + np.trace(a) + np.trace(b) - 2 * cross
    result = frechet_distance(x, y)
    assert result.value == pytest.approx(expected, rel=1e-5)
    assert bool(result.warnings) == (count <= 7)


def test_frechet_ignores_order_and_scales_by_the_square() -> None:
    x, y = _normal(20, 5, 5), _normal(20, 5, 6) * 2
    value = frechet_distance(x, y).value
    assert frechet_distance(y.flip(0), x.flip(0)).value == pytest.approx(value, rel=1e-10)
    assert frechet_distance(3 * x, 3 * y).value == pytest.approx(9 * value, rel=1e-10)
    assert frechet_distance(x, x.flip(0)).value == pytest.approx(0.0, abs=1e-10)
    assert frechet_distance(x[:, :1], x[:, :1] + 2).value == pytest.approx(4.0, rel=1e-10)


def test_kernel_distance_equals_a_sum_over_pairs() -> None:
    x, y = _normal(6, 3, 7), _normal(6, 3, 8) + 0.5

    def k(a: torch.Tensor, b: torch.Tensor) -> float:
        return (sum(float(p) * float(q) for p, q in zip(a, b, strict=True)) / 3 + 1) ** 3

    pairs = list(itertools.permutations(range(6), 2))
    within = sum(k(s[i], s[j]) for s in (x, y) for i, j in pairs) / 30
    across = sum(k(a, b) for a in x for b in y) / 36
    assert kernel_distance(x, y).value == pytest.approx(within - 2 * across, rel=1e-10)


def test_kernel_distance_is_unbiased() -> None:
    values = [kernel_distance(_normal(8, 2, 2 * i), _normal(8, 2, 2 * i + 1)).value
              for i in range(400)]  # fmt: skip
    error = np.std(values) / 20
    assert abs(np.mean(values)) < 4 * error


def test_kernel_distance_of_pairs_leaves_them_out() -> None:
    x, y = _normal(6, 3, 7), _normal(6, 3, 8) + 0.5
    table = [((a @ b.T) / 3 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    off = [float(t[~torch.eye(6, dtype=torch.bool)].mean()) for t in table]
    expected = off[0] + off[1] - 2 * off[2]
    assert kernel_distance(x, y, paired=True).value == pytest.approx(expected, rel=1e-10)
    assert kernel_distance(x, x, paired=True).value == pytest.approx(0.0, abs=1e-12)


def test_kernel_distance_of_pairs_is_unbiased() -> None:
    values = []
    for i in range(400):
        x = _normal(8, 2, 2 * i)
        y = (x + _normal(8, 2, 2 * i + 1)) / 2**0.5
        values.append(kernel_distance(x, y, paired=True).value)
    assert abs(np.mean(values)) < 4 * np.std(values) / 20


def test_frechet_of_equal_sets_in_many_dimensions_is_zero() -> None:
    x = _normal(40, 200, 20) * torch.logspace(-4, 2, 200, dtype=torch.float64)
    assert frechet_distance(x, x).value == pytest.approx(0.0, abs=1e-9 * float(x.square().sum()))


def test_frechet_infinity_extrapolates_the_line_through_its_subsets() -> None:
    x, y = _normal(64, 3, 12), _normal(64, 3, 13) * 1.5
    generator = torch.Generator().manual_seed(5)
    inverses, means = [], []
    for inverse in np.linspace(2 / 64, 1 / 64, 6):
        size = round(1 / inverse)
        values = []
        for _ in range(16 if size < 64 else 1):
            i, j = draw_rows(64, size, False, generator)
            values.append(frechet_distance(x[i], y[j]).value)
        inverses.append(1 / size)
        means.append(np.mean(values))
    found = frechet_distance_infinity(x, y, seed=5)
    assert found.value == pytest.approx(np.polyfit(inverses, means, 1)[1], rel=1e-9)
    assert found.warnings == ()
    assert "at least 186 clips" in frechet_distance_infinity(*[_normal(60, 62, 0)] * 2).warnings[0]


def test_frechet_infinity_takes_the_bias_away() -> None:
    plain, extrapolated = [], []
    for i in range(20):
        x, y = _normal(150, 30, 2 * i), _normal(150, 30, 2 * i + 1) * 1.2
        plain.append(frechet_distance(x, y).value)
        extrapolated.append(frechet_distance_infinity(x, y).value)
    assert np.mean(plain) > 1.2 + 2.0
    assert np.mean(extrapolated) == pytest.approx(30 * 0.2**2, abs=0.3)


def test_pairs_are_drawn_together() -> None:
    generator = torch.Generator().manual_seed(0)
    i, j = draw_rows(50, 20, True, generator)
    assert torch.equal(i, j)
    assert len(i.unique()) == 20
    i, j = draw_rows(50, 20, False, generator)
    assert not torch.equal(i, j)


def test_bad_embeddings_are_refused() -> None:
    x = _normal(5, 2, 11)
    with pytest.raises(ShapeError, match="5 reference and 4 test clips"):
        frechet_distance(x, x[:4])
    with pytest.raises(ShapeError, match=r"got \(5, 2\) and \(5, 1\)"):
        kernel_distance(x, x[:, :1])
    with pytest.raises(NonFiniteError):
        frechet_distance(x, x / 0)
    with pytest.raises(ShapeError, match="got 3 clips"):
        frechet_distance_infinity(x[:3], x[:3])
