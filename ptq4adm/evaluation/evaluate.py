"""Two sets of clips compared: distances of the sets, figures of pairs, and what to mistrust."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ptq4adm.errors import ShapeError
from ptq4adm.evaluation.classes import inception_score, kl_sigmoid, kl_softmax
from ptq4adm.evaluation.clips import ClipSet
from ptq4adm.evaluation.distances import (
    frechet_distance,
    frechet_distance_infinity,
    kernel_distance,
)
from ptq4adm.evaluation.embed import check_clips, embed_clips
from ptq4adm.evaluation.embeddings import AudioEmbedding, Embedded
from ptq4adm.evaluation.intervals import FEWEST_CLIPS, Statistic, interval, standard_error
from ptq4adm.evaluation.mel import SAMPLE_RATE
from ptq4adm.evaluation.paired import embedding_cosine, log_mel_distance_db
from ptq4adm.evaluation.resample import resample
from ptq4adm.evaluation.result import Evaluation, Metric
from ptq4adm.evaluation.silence import THRESHOLD_DBFS, silence_warning, silent_share

_CLIPS_PER_SPLIT = 20


@dataclass(frozen=True)
class EvaluationSettings:
    """How figures are made.

    Attributes:
        level: of the confidence intervals, in (0, 1).
        seed: of everything that is drawn.
        subsets: halves of the clips that an interval is made of.
        splits: of the inception score, as long as each holds 20 clips.
        silence_dbfs: clips below it are silent.
    """

    level: float = 0.95
    seed: int = 0
    subsets: int = 100
    splits: int = 10
    silence_dbfs: float = THRESHOLD_DBFS


def evaluate(
    reference_clips: ClipSet,
    test_clips: ClipSet,
    *,
    embedding: AudioEmbedding,
    paired: bool = False,
    settings: EvaluationSettings | None = None,
    cache: str | Path | None = None,
) -> Evaluation:
    """Compare two sets of clips.

    Distances between the sets: Frechet, the same extrapolated to infinitely many clips, and kernel
    distance; with classes, the inception score of the test set. Of pairs: embedding cosine, log-mel
    distance, and with classes the divergences.

    Args:
        reference_clips: what the others are measured against.
        test_clips: as many.
        embedding: the space of the distances.
        paired: clip i of both is the same prompt and seed. It adds the figures of pairs, and
            narrows the intervals of the others.
        settings: None for the defaults.
        cache: folder that keeps embedded clips; None for none.

    Returns:
        figures with intervals, and warnings.

    Raises:
        ShapeError: if the counts differ, there are fewer than 8 clips, or pairs do not match.
        NonFiniteError: if a clip or an embedding holds NaN or infinity.
    """
    settings = settings or EvaluationSettings()
    for side in (reference_clips, test_clips):
        check_clips(side.waveforms)
    _check_counts(reference_clips, test_clips, paired)
    sides = [
        embed_clips(side.waveforms, side.sample_rate, embedding, cache=cache)
        for side in (reference_clips, test_clips)
    ]
    metrics, warnings = _set_metrics(sides[0], sides[1], paired, settings)
    metrics += _class_metrics(sides[0], sides[1], paired, settings)
    if paired:
        cosine = embedding_cosine(sides[0].features, sides[1].features)
        metrics.append(_mean("embedding_cosine", cosine, "", settings))
        metrics += _mel_metric(reference_clips, test_clips, settings, warnings)
    warnings += _clip_warnings(reference_clips, test_clips, embedding, settings)
    return Evaluation(
        embedding=embedding.name,
        weights=embedding.weights,
        dimension=embedding.dimension,
        clips=len(reference_clips.waveforms),
        reference=reference_clips.name,
        test=test_clips.name,
        metrics=tuple(metrics),
        warnings=tuple(warnings),
    )


def _check_counts(reference: ClipSet, test: ClipSet, paired: bool) -> None:
    counts = len(reference.waveforms), len(test.waveforms)
    if counts[0] != counts[1] or counts[0] < FEWEST_CLIPS:
        raise ShapeError(
            f"got {counts[0]} clips of {reference.name} and {counts[1]} of {test.name}; equal "
            f"counts of at least {FEWEST_CLIPS} are needed, since the bias of a distance depends "
            "on the count: leave some out, or make more"
        )
    if paired and reference.keys and test.keys and reference.keys != test.keys:
        first = next(p for p in zip(reference.keys, test.keys, strict=True) if p[0] != p[1])
        raise ShapeError(
            f"paired clips have different names, {first[0]!r} in {reference.name} and {first[1]!r} "
            f"in {test.name}; name both of a pair alike, or compare without pairs"
        )


def _set_metrics(
    reference: Embedded, test: Embedded, paired: bool, settings: EvaluationSettings
) -> tuple[list[Metric], list[str]]:
    """Figures of two sets of features, and their warnings."""
    x, y = reference.features.double(), test.features.double()

    def error(distance: Statistic) -> float:
        return standard_error(
            distance, x, y, paired=paired, subsets=settings.subsets, seed=settings.seed
        )

    plain, kernel = frechet_distance(x, y), kernel_distance(x, y, paired=paired)
    infinite = frechet_distance_infinity(x, y, paired=paired, seed=settings.seed)
    spread = error(lambda a, b: frechet_distance(a, b).value)
    halves = f"interval of {settings.subsets} halves"
    rows = [
        ("frechet_distance", plain.value, spread, 0.0, f"at {len(x)} clips; {halves}"),
        # the extrapolation's spread is that of the distance at all clips, which a test checks
        ("frechet_distance_infinity", infinite.value, spread, -math.inf, "extrapolated; " + halves),
        (
            "kernel_distance",
            kernel.value,
            error(lambda a, b: kernel_distance(a, b, paired=paired).value),
            -math.inf,
            "unbiased, cubic kernel; " + halves,
        ),
    ]
    metrics = [
        _metric(name, value, spread, "", detail, settings, floor)
        for name, value, spread, floor, detail in rows
    ]
    return metrics, [*plain.warnings, *infinite.warnings]


def _class_metrics(
    reference: Embedded, test: Embedded, paired: bool, settings: EvaluationSettings
) -> list[Metric]:
    """Figures of the classes, none if there are none."""
    x, y = reference.logits, test.logits
    if x is None or y is None:
        return []
    metrics = []
    if paired:
        metrics.append(_mean("kl_softmax", kl_softmax(x, y), "nats", settings))
        metrics.append(_mean("kl_sigmoid", kl_sigmoid(x, y), "nats", settings))
    for name, logits in (("inception_score", y), ("inception_score_reference", x)):
        splits = max(1, min(settings.splits, len(logits) // _CLIPS_PER_SPLIT))

        # half of the clips in half of the splits: as many clips a split
        def score(a: Tensor, _: Tensor, splits: int = max(1, splits // 2)) -> float:
            return inception_score(a, splits=splits, seed=settings.seed)

        value = inception_score(logits, splits=splits, seed=settings.seed)
        spread = standard_error(
            score, logits, logits, paired=True, subsets=settings.subsets, seed=settings.seed
        )
        metrics.append(_metric(name, value, spread, "", f"splits: {splits}", settings, 1.0))
    return metrics


def _mel_metric(
    reference: ClipSet, test: ClipSet, settings: EvaluationSettings, warnings: list[str]
) -> list[Metric]:
    """Log-mel distance of pairs, or a warning where lengths differ."""
    values = []
    for x, y in zip(reference.waveforms, test.waveforms, strict=True):
        a, b = (
            resample(clip.detach().float().cpu()[None], rate, SAMPLE_RATE)
            for clip, rate in ((x, reference.sample_rate), (y, test.sample_rate))
        )
        if a.shape != b.shape:
            warnings.append(
                f"paired clips have {a.shape[1]} and {b.shape[1]} samples at {SAMPLE_RATE} Hz: no "
                "log-mel distance"
            )
            return []
        values.append(log_mel_distance_db(a, b))
    return [_mean("log_mel_distance", torch.cat(values), "dB", settings)]


def _clip_warnings(
    reference: ClipSet, test: ClipSet, embedding: AudioEmbedding, settings: EvaluationSettings
) -> list[str]:
    found = []
    for label, side in (("reference", reference), ("test", test)):
        share = silent_share(side.waveforms, settings.silence_dbfs)
        sentence = silence_warning(label, share, settings.silence_dbfs)
        if sentence:
            found.append(sentence)
        if side.sample_rate != embedding.sample_rate:
            found.append(
                f"the {label} clips were resampled from {side.sample_rate} to "
                f"{embedding.sample_rate} Hz for {embedding.name}: that alone moves distances, so "
                "compare with nothing that was resampled in another way"
            )
    return found


def _mean(name: str, values: Tensor, unit: str, settings: EvaluationSettings) -> Metric:
    """A figure that is the mean over pairs."""
    error = float(values.std()) / math.sqrt(len(values))
    return _metric(name, float(values.mean()), error, unit, "mean over pairs", settings)


def _metric(
    name: str,
    value: float,
    error: float,
    unit: str,
    detail: str,
    settings: EvaluationSettings,
    floor: float = -math.inf,
) -> Metric:
    found = interval(value, error, level=settings.level, floor=floor)
    return Metric(name, value, found.low, found.high, found.level, unit, detail)
