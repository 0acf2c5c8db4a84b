"""Intervals hold what they should, as often as they say."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ptq4adm.errors import RangeError, ShapeError
from ptq4adm.evaluation.distances import frechet_distance, frechet_distance_infinity
from ptq4adm.evaluation.intervals import interval, standard_error

REPEATS = 60


def _frechet(x: Tensor, y: Tensor) -> float:
    return frechet_distance(x, y).value


def _sets(
    count: int, dimension: int, shift: float, scale: float, paired: bool, seed: int
) -> tuple[Tensor, Tensor]:
    """Gaussians of a known distance, |shift|^2 + D (scale - 1)^2; pairs are almost the same."""
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, count, dimension, generator=g, dtype=torch.float64)
    if paired:
        y = (x + 0.1 * y) / 1.01**0.5
    return x, y * scale + shift / math.sqrt(dimension)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize(
    ("count", "dimension", "shift", "scale"),
    [(120, 4, 2.0, 1.3), (120, 24, 0.0, 1.0), (120, 24, 1.0, 1.2)],
)
def test_intervals_hold_the_expected_and_the_true_distance(
    count: int, dimension: int, shift: float, scale: float, paired: bool
) -> None:
    true = shift**2 + dimension * (scale - 1) ** 2
    found = []
    for seed in range(REPEATS):
        x, y = _sets(count, dimension, shift, scale, paired, seed)
        error = standard_error(_frechet, x, y, paired=paired, subsets=30, seed=seed)
        limit = frechet_distance_infinity(x, y, paired=paired, seed=seed).value
        found.append((_frechet(x, y), limit, error))
    expected = sum(value for value, _, _ in found) / REPEATS

    def held(figure: int, target: float) -> int:
        intervals = [interval(f[figure], f[2]) for f in found]
        return sum(i.low <= target <= i.high for i in intervals)

    # 57 of 60 are due; fewer than 50 happen once in 10^4
    assert held(0, expected) >= 50
    assert held(1, true) >= 50
    # and they are no wider than they need to be: a half more at most
    spread = torch.tensor([value for value, _, _ in found]).std()
    assert sum(error for _, _, error in found) / REPEATS < 2.0 * spread


def test_a_bootstrap_would_not_hold_its_own_figure() -> None:
    """Why intervals are made of halves: the reason must stay true."""
    x, y = _sets(120, 64, 0.0, 1.0, False, 0)
    g = torch.Generator().manual_seed(0)
    values = []
    for _ in range(50):
        i, j = torch.randint(120, (2, 120), generator=g)
        values.append(_frechet(x[i], y[j]))
    assert min(values) > _frechet(x, y)
    error = standard_error(_frechet, x, y, paired=False)
    found = interval(_frechet(x, y), error)
    assert found.low < _frechet(x, y) < found.high


def test_of_a_mean_it_is_the_usual_standard_error() -> None:
    x = torch.randn(400, dtype=torch.float64)
    found = standard_error(lambda a, _: float(a.mean()), x, x, paired=True, subsets=3000)
    assert found == pytest.approx(float(x.std()) / 20.0, rel=0.05)


@pytest.mark.parametrize("count", [8, 9, 31])
def test_odd_counts_are_scaled_as_even_ones(count: int) -> None:
    x = torch.randn(count, dtype=torch.float64)
    found = standard_error(lambda a, _: float(a.mean()), x, x, paired=True, subsets=4000)
    assert found == pytest.approx(float(x.std()) / math.sqrt(count), rel=0.06)


def test_seeds_repeat_and_matter() -> None:
    x, y = _sets(20, 3, 1.0, 1.0, False, 0)
    first, again, other = (
        standard_error(_frechet, x, y, paired=False, subsets=10, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other


def test_the_interval_is_normal_and_ends_at_the_floor() -> None:
    found = interval(1.0, 0.5, level=0.95)
    assert (found.low, found.high) == pytest.approx((1 - 0.9799820, 1 + 0.9799820))
    assert interval(0.1, 0.5, floor=0.0).low == 0.0
    # rounding can bring a distance below its floor; it stays in its interval
    assert interval(-1e-15, 0.0, floor=0.0).low == -1e-15
    for level in (0.0, 1.0, math.nan):
        with pytest.raises(RangeError, match="between 0 and 1"):
            interval(1.0, 0.5, level=level)


def test_few_or_unequal_clips_are_refused() -> None:
    x = torch.randn(8, 2)
    with pytest.raises(ShapeError, match="got 7 reference and 7"):
        standard_error(_frechet, x[:7], x[:7], paired=False)
    with pytest.raises(ShapeError, match="got 8 reference and 7"):
        standard_error(_frechet, x, x[:7], paired=False)
