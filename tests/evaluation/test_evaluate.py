"""Two sets compared: figures, warnings, the file, the cache."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ptq4adm.errors import (
    EvaluationError,
    MissingComponentError,
    NonFiniteError,
    ShapeError,
)
from ptq4adm.evaluation.classes import inception_score, kl_sigmoid, kl_softmax
from ptq4adm.evaluation.clips import ClipSet
from ptq4adm.evaluation.distances import (
    frechet_distance,
    frechet_distance_infinity,
    kernel_distance,
)
from ptq4adm.evaluation.embed import embed_clips
from ptq4adm.evaluation.embeddings import Embedded, LogMelStatistics
from ptq4adm.evaluation.evaluate import EvaluationSettings, evaluate
from ptq4adm.evaluation.paired import embedding_cosine, log_mel_distance_db
from ptq4adm.evaluation.result import Evaluation, Metric


class Bands:
    """Levels of 6 bands as features, two of them as logits; counts its calls."""

    name, weights, sample_rate, dimension = "bands", "none", 16000, 6
    classes: tuple[str, ...] | None = ("low", "high")

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def embed(self, waveforms: Tensor) -> Embedded:
        self.shapes.append(tuple(waveforms.shape))
        spectrum = torch.fft.rfft(waveforms).abs().square()
        bands = torch.stack([b.mean(1) for b in spectrum.tensor_split(6, dim=1)], 1)
        features = torch.log(bands + 1e-3)
        return Embedded(features, 3.0 * (features[:, [0, 5]] - features.mean(1, keepdim=True)))


def _clips(count: int = 48, seed: int = 0, gain: float = 1.0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 2400, generator=g) * torch.rand(count, 1, generator=g)
    return list(gain * torch.cumsum(x, 1) / 20)


def _pairs() -> tuple[ClipSet, ClipSet]:
    reference = _clips()
    test = [x + 0.05 * n for x, n in zip(reference, _clips(seed=1), strict=True)]
    return ClipSet(reference, 16000, "float"), ClipSet(test, 16000, "w4a8")


def test_figures_are_those_of_their_functions() -> None:
    reference, test = _pairs()
    result = evaluate(reference, test, embedding=Bands(), paired=True)
    x, y = (Bands().embed(torch.stack(list(side.waveforms))) for side in (reference, test))
    a, b = x.features.double(), y.features.double()
    waves = [torch.stack(list(side.waveforms)) for side in (reference, test)]
    expected = {
        "frechet_distance": frechet_distance(a, b).value,
        "frechet_distance_infinity": frechet_distance_infinity(a, b, paired=True).value,
        "kernel_distance": kernel_distance(a, b, paired=True).value,
        "kl_softmax": float(kl_softmax(x.logits, y.logits).mean()),
        "kl_sigmoid": float(kl_sigmoid(x.logits, y.logits).mean()),
        "inception_score": inception_score(y.logits, splits=2),
        "inception_score_reference": inception_score(x.logits, splits=2),
        "embedding_cosine": float(embedding_cosine(a, b).mean()),
        "log_mel_distance": float(log_mel_distance_db(*waves).mean()),
    }
    assert {m.name: m.value for m in result.metrics} == pytest.approx(expected, rel=1e-6)
    assert [m.unit for m in result.metrics if m.unit] == ["nats", "nats", "dB"]
    for metric in result.metrics:
        assert metric.low <= metric.value <= metric.high, metric
        assert metric.low < metric.high, metric
        assert metric.level == 0.95
    half = 1.959964 * float(kl_softmax(x.logits, y.logits).std()) / 48**0.5
    assert result["kl_softmax"].high - expected["kl_softmax"] == pytest.approx(half, rel=1e-5)
    assert (result.embedding, result.weights, result.dimension) == ("bands", "none", 6)
    assert (result.clips, result.reference, result.test) == (48, "float", "w4a8")
    assert result.warnings == ()
    with pytest.raises(KeyError):
        result["latent_sqnr"]


def test_without_pairs_and_without_classes_there_are_less_figures() -> None:
    reference, test = _pairs()
    names = [m.name for m in evaluate(reference, test, embedding=Bands()).metrics]
    sets = ["frechet_distance", "frechet_distance_infinity", "kernel_distance"]
    assert names == [*sets, "inception_score", "inception_score_reference"]
    result = evaluate(reference, test, embedding=LogMelStatistics())
    assert [m.name for m in result.metrics] == sets
    assert any("48 clips for 128 dimensions" in warning for warning in result.warnings)


def test_pairs_narrow_the_interval_and_seeds_and_levels_count() -> None:
    reference, test = _pairs()

    def width(paired: bool, settings: EvaluationSettings) -> float:
        found = evaluate(reference, test, embedding=Bands(), paired=paired, settings=settings)
        return found["kernel_distance"].high - found["kernel_distance"].low

    plain = EvaluationSettings(subsets=40)
    assert width(True, plain) < 0.5 * width(False, plain)
    assert width(True, plain) == width(True, plain)
    assert width(True, plain) != width(True, replace(plain, seed=1))
    wide = width(True, replace(plain, level=0.99))
    assert wide / width(True, plain) == pytest.approx(2.575829 / 1.959964, rel=1e-4)


def test_silence_and_resampling_are_warned_of() -> None:
    reference, test = _pairs()
    quiet = ClipSet([1e-5 * x for x in test.waveforms], 16000, "quiet")
    result = evaluate(reference, quiet, embedding=Bands())
    assert result.warnings[0].startswith("100% of the test clips are silent")
    faster = replace(test, sample_rate=8000)
    embedding = Bands()
    result = evaluate(reference, faster, embedding=embedding, paired=True)
    assert {shape[1] for shape in embedding.shapes} == {2400, 4800}
    assert any("resampled from 8000 to 16000 Hz for bands" in w for w in result.warnings)
    assert any("2400 and 4800 samples" in w for w in result.warnings)
    with pytest.raises(KeyError):
        result["log_mel_distance"]


def test_sets_that_do_not_compare_are_refused() -> None:
    reference, test = _pairs()
    short = replace(test, waveforms=test.waveforms[:-1])
    with pytest.raises(ShapeError, match="48 clips of float and 47 of w4a8"):
        evaluate(reference, short, embedding=Bands())
    few = [replace(side, waveforms=side.waveforms[:7]) for side in (reference, test)]
    with pytest.raises(ShapeError, match="at least 8"):
        evaluate(*few, embedding=Bands())
    names = tuple(f"{i:02d}.wav" for i in range(48))
    with pytest.raises(ShapeError, match=r"'47\.wav' in float and 'x\.wav' in w4a8"):
        evaluate(
            replace(reference, keys=names),
            replace(test, keys=(*names[:-1], "x.wav")),
            embedding=Bands(),
            paired=True,
        )
    poisoned = replace(test, waveforms=[*test.waveforms[:-1], torch.full((5,), torch.nan)])
    with pytest.raises(NonFiniteError, match="clip 47"):
        evaluate(reference, poisoned, embedding=Bands())
    with pytest.raises(ShapeError, match="clip 0"):
        evaluate(replace(reference, waveforms=[torch.zeros(2, 5)] * 8), test, embedding=Bands())


# --- embedding ----------------------------------------------------------------------------------


def test_clips_of_many_lengths_keep_their_order() -> None:
    clips = [torch.randn(n) for n in (900, 700, 900, 800, 700) * 5]
    found = embed_clips(clips, 16000, Bands())
    for i, clip in enumerate(clips):
        np.testing.assert_allclose(
            found.features[i], Bands().embed(clip[None]).features[0], rtol=1e-5
        )
    probabilities = 1 / (1 + np.exp(-found.logits.double().numpy()))
    np.testing.assert_allclose(found.probabilities, probabilities, rtol=1e-5)


def test_the_cache_is_used_and_knows_what_it_depends_on(tmp_path: Path) -> None:
    clips, embedding = _clips(8), Bands()
    first = embed_clips(clips, 16000, embedding, cache=tmp_path)
    calls = len(embedding.shapes)
    again = embed_clips(clips, 16000, embedding, cache=tmp_path)
    assert len(embedding.shapes) == calls
    assert torch.equal(first.features, again.features)
    assert torch.equal(first.logits, again.logits)
    other = Bands()
    other.weights = "abc"
    changed = [clips[0] + 1e-6, *clips[1:]]
    joined = [torch.cat(clips[:2]), *clips[2:]]
    for arguments in (
        (clips, 16000, other), (clips, 8000, embedding), (changed, 16000, embedding),
        (joined, 16000, embedding), (clips[::-1], 16000, embedding),
    ):  # fmt: skip
        files = len(list(tmp_path.iterdir()))
        embed_clips(*arguments, cache=tmp_path)
        assert len(list(tmp_path.iterdir())) == files + 1


def test_a_damaged_cache_is_refused(tmp_path: Path) -> None:
    clips = _clips(8)
    embed_clips(clips, 16000, Bands(), cache=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(EvaluationError, match="delete it, and it is computed again"):
        embed_clips(clips, 16000, Bands(), cache=tmp_path)


def test_an_embedding_that_breaks_its_promises_is_refused() -> None:
    broken = Bands()
    broken.dimension = 7
    with pytest.raises(ShapeError, match="'bands': gave"):
        embed_clips(_clips(8), 16000, broken)
    broken = Bands()
    broken.classes = None
    with pytest.raises(ShapeError, match="'bands': gave"):
        embed_clips(_clips(8), 16000, broken)
    broken = Bands()
    broken.embed = lambda x: Embedded(torch.full((len(x), 6), torch.inf), torch.zeros(len(x), 2))
    with pytest.raises(NonFiniteError, match="broken weights"):
        embed_clips(_clips(8), 16000, broken)


# --- the file -----------------------------------------------------------------------------------

RESULT = Evaluation(
    "bands", "none", 6, 48, "float", "w4a8",
    (Metric("kl_softmax", 0.5, 0.25, 0.75, 0.95, "nats", "mean over pairs"),), ("a warning",),
)  # fmt: skip


def test_the_file_is_the_format_and_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    RESULT.save(path)
    assert json.loads(path.read_text()) == {
        "format": "ptq4adm-evaluation",
        "format_version": 1,
        "embedding": {"name": "bands", "weights": "none", "dimension": 6},
        "clips": 48,
        "reference": "float",
        "test": "w4a8",
        "metrics": [
            {
                "name": "kl_softmax", "value": 0.5, "low": 0.25, "high": 0.75, "level": 0.95,
                "unit": "nats", "detail": "mean over pairs",
            }
        ],
        "warnings": ["a warning"],
    }  # fmt: skip
    assert Evaluation.load(path) == RESULT


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    with pytest.raises(MissingComponentError, match=r"evaluation\.json"):
        Evaluation.load(path)
    path.write_text("{")
    with pytest.raises(EvaluationError, match="no JSON"):
        Evaluation.load(path)
    good = RESULT.to_dict()
    with pytest.raises(EvaluationError, match="not a ptq4adm-evaluation"):
        Evaluation.from_dict(good | {"format": "ptq4adm-sensitivity"})
    with pytest.raises(EvaluationError, match="format version 2"):
        Evaluation.from_dict(good | {"format_version": 2})
    for broken in (
        {k: v for k, v in good.items() if k != "clips"},
        good | {"clips": "48"},
        good | {"clips": True},
        good | {"embedding": "bands"},
        good | {"metrics": [{"name": "kl_softmax"}]},
        good | {"metrics": [good["metrics"][0] | {"value": float("nan")}]},
        good | {"metrics": [good["metrics"][0] | {"value": None}]},
    ):
        with pytest.raises(EvaluationError, match="damaged"):
            Evaluation.from_dict(broken)
