"""The paired metrics against their formulas in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ptq4adm.errors import NonFiniteError, ShapeError
from ptq4adm.evaluation.mel import log_mel
from ptq4adm.evaluation.paired import (
    embedding_cosine,
    latent_sqnr_db,
    log_mel_distance_db,
    step_sqnr_db,
)


def test_latent_sqnr_is_the_formula_for_each_sample() -> None:
    reference, test = torch.randn(3, 8, 4, 4), torch.randn(3, 8, 4, 4)
    r, t = reference.double().numpy(), test.double().numpy()
    expected = [10 * np.log10((r[b] ** 2).sum() / ((r[b] - t[b]) ** 2).sum()) for b in range(3)]
    np.testing.assert_allclose(latent_sqnr_db(reference, test).numpy(), expected, rtol=1e-12)


def test_latent_sqnr_of_a_tenth_of_the_signal_is_20_db_and_of_equals_infinite() -> None:
    reference = torch.ones(2, 8, 4, 4)
    assert latent_sqnr_db(reference, 0.9 * reference).tolist() == pytest.approx([20.0, 20.0], 1e-5)
    assert latent_sqnr_db(reference, reference).tolist() == [float("inf")] * 2


def test_latent_sqnr_does_not_lose_small_noise_in_float16() -> None:
    reference = torch.full((1, 1000), 100.0, dtype=torch.float16)
    assert torch.isfinite(latent_sqnr_db(reference, reference * 0.99)).all()


def test_log_mel_distance_of_half_the_amplitude_is_6_db() -> None:
    waveform = torch.randn(2, 16000)
    distance = log_mel_distance_db(waveform, 0.5 * waveform)
    assert distance.tolist() == pytest.approx([6.0206, 6.0206], abs=1e-3)
    assert log_mel_distance_db(waveform, waveform).tolist() == [0.0, 0.0]


def test_log_mel_distance_is_the_formula_for_each_clip() -> None:
    reference, test = torch.randn(2, 8000), torch.randn(2, 8000)
    db = [20 * np.log10(np.exp(log_mel(w).double().numpy())) for w in (reference, test)]
    expected = np.sqrt(((db[0] - db[1]) ** 2).mean((1, 2)))
    np.testing.assert_allclose(log_mel_distance_db(reference, test).numpy(), expected, rtol=1e-9)


def test_shapes_must_agree() -> None:
    with pytest.raises(ShapeError, match="latents"):
        latent_sqnr_db(torch.zeros(2, 3), torch.zeros(1, 3))
    with pytest.raises(ShapeError, match="waveforms"):
        log_mel_distance_db(torch.zeros(2, 4000), torch.zeros(2, 4001))


def test_step_sqnr_is_that_of_every_step() -> None:
    reference, test = torch.randn(4, 3, 8, 4, 4), torch.randn(4, 3, 8, 4, 4)
    found = step_sqnr_db(reference, test)
    assert found.shape == (4, 3)
    for step in range(4):
        assert torch.equal(found[step], latent_sqnr_db(reference[step], test[step]))
    with pytest.raises(ShapeError, match="T, B"):
        step_sqnr_db(reference, test[:3])


def test_embedding_cosine_is_the_formula() -> None:
    x, y = torch.randn(4, 5), torch.randn(4, 5)
    a, b = x.double().numpy(), y.double().numpy()
    expected = (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))
    np.testing.assert_allclose(embedding_cosine(x, y), expected, rtol=1e-12)
    assert embedding_cosine(x, 3 * x).tolist() == pytest.approx([1.0] * 4)
    assert embedding_cosine(x, -x).tolist() == pytest.approx([-1.0] * 4)
    with pytest.raises(ShapeError, match="embeddings"):
        embedding_cosine(x, y[:, :4])
    with pytest.raises(NonFiniteError, match="points nowhere"):
        embedding_cosine(x, 0 * y)
