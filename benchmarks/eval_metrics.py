"""What `eval_quality.py` measures of a variant's clips, one row an embedding."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ptq4adm.evaluation.classes import inception_score, kl_softmax
from ptq4adm.evaluation.distances import (
    frechet_distance,
    frechet_distance_infinity,
    kernel_distance,
)
from ptq4adm.evaluation.embed import embed_clips
from ptq4adm.evaluation.embeddings import load_embedding
from ptq4adm.evaluation.increase import frechet_increase
from ptq4adm.evaluation.mel import SAMPLE_RATE, log_mel
from ptq4adm.evaluation.paired import (
    embedding_cosine,
    latent_sqnr_db,
    log_mel_distance_db,
)
from ptq4adm.evaluation.silence import silent_share

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))
from classifier import NearestCentroid, features

_SUBSETS = 50


@dataclass(frozen=True)
class Clips:
    """What one variant made of the captions.

    Attributes:
        latents: float32 [N, C, H, W].
        waves: float32 [N, S] at 16 kHz.
    """

    latents: Tensor
    waves: Tensor


class Judge:
    """Measures sets of clips against the same real ones.

    Args:
        real: float32 [N, S] at 16 kHz; clip i is of caption i.
        classes: of the real clips; None for those of no class.
        embeddings: names of `ptq4adm.evaluation.embeddings`, and where their weights lie.
        classifier: the nearest-centroid classifier's file.
        cache: folder for embedded clips.
    """

    def __init__(
        self,
        real: Tensor,
        classes: Sequence[str | None],
        embeddings: Mapping[str, Path | None],
        classifier: Path,
        cache: Path,
    ) -> None:
        self.real, self.classes, self.cache = real, classes, cache
        self.embeddings = [load_embedding(*found) for found in embeddings.items()]
        with np.load(classifier) as arrays:
            self.classifier = NearestCentroid.from_dict(dict(arrays))

    def rows(self, clips: Clips, base: Clips) -> Iterator[dict[str, Any]]:
        """Metrics of a variant's clips; `base` are the float model's of the same noise."""
        paired = self._paired(clips, base)
        for embedding in self.embeddings:
            real, made, reference = (
                embed_clips(waves, SAMPLE_RATE, embedding, cache=self.cache)
                for waves in (self.real, clips.waves, base.waves)
            )
            x, y = real.features, made.features
            row: dict[str, Any] = {
                "embedding": embedding.name,
                "fd": round(frechet_distance(x, y).value, 4),
                "fd_infinity": round(frechet_distance_infinity(x, y, paired=True).value, 4),
                "kd": round(kernel_distance(x, y, paired=True).value, 6),
                "fd_to_float": round(frechet_distance(reference.features, y).value, 4),
                "cosine_to_float": round(float(embedding_cosine(reference.features, y).mean()), 4),
            }
            if not torch.equal(reference.features, y):
                more = frechet_increase(x, reference.features, y, subsets=_SUBSETS)
                row["fd_increase"] = round(more.value, 5)
                row["fd_increase_low"] = round(more.interval.low, 5)
                row["fd_increase_high"] = round(more.interval.high, 5)
            if real.logits is not None and made.logits is not None:
                row["kl"] = round(float(kl_softmax(real.logits, made.logits).mean()), 4)
                row["inception"] = round(inception_score(made.logits), 4)
            yield row | paired

    def _paired(self, clips: Clips, base: Clips) -> dict[str, Any]:
        labelled = [i for i, name in enumerate(self.classes) if name is not None]
        named = self.classifier.predict(features(log_mel(clips.waves[labelled])))
        float_named = self.classifier.predict(features(log_mel(base.waves[labelled])))
        right = [name == self.classes[i] for name, i in zip(named, labelled, strict=True)]
        same = [name == other for name, other in zip(named, float_named, strict=True)]
        row = {
            "right_class": round(float(np.mean(right)), 4),
            "same_class": round(float(np.mean(same)), 4),
            "silent": round(silent_share(list(clips.waves)), 4),
        }
        if torch.equal(clips.latents, base.latents):
            return row
        sqnr = latent_sqnr_db(base.latents, clips.latents)
        mel = log_mel_distance_db(base.waves, clips.waves)
        return row | {
            "sqnr_median_db": round(float(sqnr.median()), 3),
            "sqnr_min_db": round(float(sqnr.min()), 3),
            "mel_median_db": round(float(mel.median()), 3),
        }
