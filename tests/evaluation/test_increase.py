"""The increase of a distance over a baseline, and how narrow pairs make its interval."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ptq4adm.errors import ShapeError
from ptq4adm.evaluation.distances import frechet_distance
from ptq4adm.evaluation.increase import frechet_increase


def _sets(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Real clips, a model's at distance 4 of them, and a quantized one's at 4.41."""
    g = torch.Generator().manual_seed(seed)
    real, model, noise = torch.randn(3, count, 4, generator=g, dtype=torch.float64)
    return real, model + 1.0, (model + 0.1 * noise) / 1.01**0.5 + 1.05


def test_the_value_is_the_ratio_of_the_distances() -> None:
    real, model, quantized = _sets(200, 0)
    found = frechet_increase(real, model, quantized, subsets=10)
    base, other = frechet_distance(real, model).value, frechet_distance(real, quantized).value
    assert found.value == pytest.approx(other / base - 1.0)
    assert (found.baseline, found.test) == pytest.approx((base, other))
    assert frechet_increase(real, model, model, subsets=10).value == 0.0


def test_its_interval_holds_the_expected_increase() -> None:
    found = [frechet_increase(*_sets(200, seed), subsets=40, seed=seed) for seed in range(60)]
    expected = sum(f.value for f in found) / 60
    assert expected == pytest.approx(4.41 / 4.0 - 1.0, abs=0.01)
    # fewer than 50 of 60 happen once in 10^4
    assert sum(f.interval.low <= expected <= f.interval.high for f in found) >= 50
    # unpaired clips of the same two models
    mixed = frechet_increase(*_sets(200, 0)[:2], _sets(200, 1)[2])
    width = mixed.interval.high - mixed.interval.low
    assert found[0].interval.high - found[0].interval.low < 0.4 * width


def test_what_makes_no_sense_is_refused() -> None:
    real, model, quantized = _sets(20, 0)
    with pytest.raises(ShapeError, match="pairs of the same prompt"):
        frechet_increase(real, model, quantized[:19])
    with pytest.raises(ShapeError, match="20 reference and 19 test"):
        frechet_increase(real, model[:19], quantized[:19])
    for base in (real, torch.zeros(20, 4)):
        with pytest.raises(ShapeError, match="the reference itself"):
            frechet_increase(base, base, quantized)
