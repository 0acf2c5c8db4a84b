"""Divergences and the inception score against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ptq4adm.errors import NonFiniteError, RangeError, ShapeError
from ptq4adm.evaluation.classes import inception_score, kl_sigmoid, kl_softmax


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def test_divergences_are_the_formulas() -> None:
    x, y = 3 * torch.randn(5, 7), 3 * torch.randn(5, 7)
    p, q = _softmax(x.double().numpy()), _softmax(y.double().numpy())
    np.testing.assert_allclose(kl_softmax(x, y), (p * np.log(p / q)).sum(1), rtol=1e-9)
    p, q = (1 / (1 + np.exp(-z.double().numpy())) for z in (x, y))
    expected = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    np.testing.assert_allclose(kl_sigmoid(x, y), expected.sum(1), rtol=1e-9)


def test_divergences_are_zero_for_equals_and_finite_for_extremes() -> None:
    x = torch.tensor([[1000.0, -1000.0, 0.0]])
    for divergence in (kl_softmax, kl_sigmoid):
        assert divergence(x, x).tolist() == [0.0]
        assert torch.isfinite(divergence(x, -x)).all()
        assert divergence(x, -x).item() > 900


def test_inception_score_of_one_split_is_the_formula() -> None:
    x = 2 * torch.randn(30, 6)
    p = _softmax(x.double().numpy())
    expected = np.exp((p * np.log(p / p.mean(0))).sum(1).mean())
    assert inception_score(x, splits=1) == pytest.approx(expected, rel=1e-9)


def test_inception_score_is_the_mean_of_the_splits_in_a_seeded_order() -> None:
    x = 2 * torch.randn(31, 6)
    order = torch.randperm(31, generator=torch.Generator().manual_seed(3))
    scores = [inception_score(part, splits=1) for part in x[order].tensor_split(4)]
    assert inception_score(x, splits=4, seed=3) == pytest.approx(np.mean(scores), rel=1e-9)
    assert inception_score(x, splits=4, seed=3) != inception_score(x, splits=4, seed=4)


def test_inception_score_reaches_one_and_the_number_of_classes() -> None:
    assert inception_score(torch.randn(1, 5).repeat(20, 1), splits=2) == pytest.approx(1.0)
    assert inception_score(100 * torch.eye(5), splits=1) == pytest.approx(5.0)


def test_bad_logits_are_refused() -> None:
    x = torch.randn(4, 3)
    with pytest.raises(ShapeError, match=r"\(4, 3\) and \(4, 2\)"):
        kl_softmax(x, x[:, :2])
    with pytest.raises(ShapeError, match="logits"):
        kl_sigmoid(x[0], x[0])
    with pytest.raises(NonFiniteError, match="logits"):
        kl_softmax(x, x / 0)
    for splits in (0, 3):
        with pytest.raises(RangeError, match="expected 1 to 2"):
            inception_score(x, splits=splits)
