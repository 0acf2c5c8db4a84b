import numpy as np
import pytest
import torch
from classifier import NearestCentroid, features

CLASSES = ["a", "b", "c"]


def _cloud(per_class: int, spread: float, seed: int) -> tuple[np.ndarray, list[str]]:
    """Three well separated clouds in 20 dimensions, one dimension pure noise."""
    rng = np.random.default_rng(seed)
    values, labels = [], []
    for i, name in enumerate(CLASSES):
        rows = rng.normal(0, spread, (per_class, 20))
        rows[:, i] += 3.0
        rows[:, 19] *= 30.0
        values.append(rows)
        labels += [name] * per_class
    return np.concatenate(values), labels


def _steady_and_pulsing() -> tuple[torch.Tensor, torch.Tensor]:
    time = torch.arange(256) / 100.0
    steady = torch.full((256, 64), -3.0)
    pulsing = steady + 2.0 * torch.sign(torch.sin(2 * torch.pi * 3.0 * time))[:, None]
    return steady, pulsing


def test_features_have_one_row_a_clip() -> None:
    values = features(torch.randn(5, 256, 64))
    assert values.shape == (5, 212)
    assert np.isfinite(values).all()


def test_features_do_not_see_the_level() -> None:
    mel = torch.randn(2, 256, 64)
    assert np.allclose(features(mel), features(mel - 4.0), atol=1e-5)


def test_features_see_the_pulse() -> None:
    steady, pulsing = features(torch.stack(_steady_and_pulsing()))
    band_of_3_hz = 192 + 2  # first quarter of the mel axis
    assert pulsing[band_of_3_hz] > 0.5
    assert steady[192:].max() < 0.01


def test_features_of_silence_are_finite() -> None:
    assert np.isfinite(features(torch.full((1, 256, 64), float(np.log(1e-5))))).all()


@pytest.mark.parametrize("shape", [(256, 64), (1, 256, 80)])
def test_features_refuse_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be \[batch, frames, 64\]"):
        features(torch.zeros(shape))


def test_predict_finds_the_class_of_new_rows() -> None:
    model = NearestCentroid.fit(*_cloud(100, 0.3, seed=0))
    values, labels = _cloud(30, 0.3, seed=1)
    assert model.predict(values) == labels


def test_whitening_ignores_variation_that_all_classes_share() -> None:
    right = {}
    (train, labels), (test, test_labels) = _cloud(300, 0.3, seed=0), _cloud(100, 0.3, seed=1)
    rng = np.random.default_rng(2)
    train += rng.normal(0, 4.0, (300 * 3, 1)) * np.linspace(-1, 1, 20)
    test += rng.normal(0, 4.0, (100 * 3, 1)) * np.linspace(-1, 1, 20)
    for shrinkage in (0.1, 1.0):
        model = NearestCentroid.fit(train, labels, shrinkage)
        right[shrinkage] = np.trace(model.confusion(test, test_labels)) / 300
    assert right[0.1] > 0.97 > right[1.0] + 0.1


def test_confusion_counts_every_row_once() -> None:
    model = NearestCentroid.fit(*_cloud(100, 0.3, seed=0))
    values, labels = _cloud(10, 0.3, seed=1)
    swapped = ["b" if label == "a" else label for label in labels]
    table = model.confusion(values, swapped)
    assert table.tolist() == [[0, 0, 0], [10, 10, 0], [0, 0, 10]]


def test_spread_falls_with_mode_collapse() -> None:
    values, labels = _cloud(100, 0.3, seed=0)
    model = NearestCentroid.fit(values, labels)
    centre = values[:100].mean(0)
    collapsed = centre + 0.1 * (values[:100] - centre)
    ratio = model.spread(collapsed, labels[:100])["a"] / model.spread(values, labels)["a"]
    assert ratio == pytest.approx(0.1, rel=1e-6)


def test_spread_of_few_clips_estimates_that_of_many() -> None:
    values, labels = _cloud(400, 0.3, seed=0)
    model = NearestCentroid.fit(values, labels)
    few = [model.spread(values[i : i + 8], labels[i : i + 8])["a"] for i in range(0, 400, 8)]
    assert np.mean(few) == pytest.approx(model.spread(values, labels)["a"], rel=0.03)


def test_dict_round_trip_is_exact(tmp_path) -> None:
    values, labels = _cloud(50, 0.3, seed=0)
    model = NearestCentroid.fit(values, labels)
    np.savez(tmp_path / "model.npz", **model.to_dict())
    again = NearestCentroid.from_dict(np.load(tmp_path / "model.npz"))
    assert again.classes == model.classes
    assert np.array_equal(again.distances(values), model.distances(values))


def test_from_dict_names_what_is_missing() -> None:
    arrays = NearestCentroid.fit(*_cloud(50, 0.3, seed=0)).to_dict()
    del arrays["whitening"]
    with pytest.raises(ValueError, match="lacks whitening"):
        NearestCentroid.from_dict(arrays)


def test_from_dict_refuses_shapes_that_disagree() -> None:
    arrays = NearestCentroid.fit(*_cloud(50, 0.3, seed=0)).to_dict()
    arrays["mean"] = arrays["mean"][:-1]
    with pytest.raises(ValueError, match="disagree"):
        NearestCentroid.from_dict(arrays)
