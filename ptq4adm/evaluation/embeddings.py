"""What clips are compared in: trained networks, and statistics that need no weights.

A distance between sets of clips means nothing without the space it was measured in, so every
embedding has a name and a hash of its weights, and both stand in every result.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ptq4adm.errors import ConfigError, MissingComponentError
from ptq4adm.evaluation.mel import SAMPLE_RATE, log_mel

NAMES = ("musicnn-MTT", "musicnn-MSD", "logmel-stats", "cnn14-16k", "vggish", "clap", "cdpam")


@dataclass(frozen=True)
class Embedded:
    """A batch of clips in an embedding's space.

    Attributes:
        features: float32 [B, D].
        logits: float32 [B, C] of independent classes, or None if the embedding has none.
    """

    features: Tensor
    logits: Tensor | None = None

    @property
    def probabilities(self) -> Tensor | None:
        """Of each class on its own, float32 [B, C] in (0, 1); None without classes."""
        return None if self.logits is None else self.logits.sigmoid()


class AudioEmbedding(Protocol):
    """Turns clips into vectors."""

    @property
    def name(self) -> str:
        """Shown beside every figure."""

    @property
    def weights(self) -> str:
        """sha256 of the weights in hexadecimal digits, or "none"."""

    @property
    def sample_rate(self) -> int:
        """Of the waveforms it reads, Hz."""

    @property
    def dimension(self) -> int:
        """Features D of a clip."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the C classes; None if it has none."""

    def embed(self, waveforms: Tensor) -> Embedded:
        """Embed float32 [B, S] at `sample_rate`, of one length."""


class LogMelStatistics:
    """Mean and standard deviation over time of every bin of the project's log-mel spectrogram.

    No weights, so it works everywhere, and it hears timbre and level alone: neither rhythm nor what
    a sound is. For smoke tests, and where nothing else is at hand.
    """

    name = "logmel-stats"
    weights = "none"
    sample_rate = SAMPLE_RATE
    dimension = 128
    classes: tuple[str, ...] | None = None

    def embed(self, waveforms: Tensor) -> Embedded:
        """Embed float32 [B, S] at 16 kHz; S is at least 1024 samples."""
        mel = log_mel(waveforms)
        return Embedded(torch.cat([mel.mean(1), mel.std(1)], 1))


def load_embedding(name: str, weights: str | Path | None = None) -> AudioEmbedding:
    """Load an embedding. Nothing is ever downloaded.

    Args:
        name: "musicnn-MTT" or "musicnn-MSD" (music taggers of 50 tags, 200 features),
            "logmel-stats" (no weights), "cnn14-16k" (PANNs; 527 classes, 2048 features: what papers
            on text to audio report), "vggish", "clap", or "cdpam" (a perceptual metric; slow).
        weights: where they lie. For musicnn and cdpam the wheel, or the folder of the package
            (default: the installed one); the published .pth file or .safetensors for "cnn14-16k"
            and "vggish"; a folder that transformers reads for "clap".

    Raises:
        ConfigError: if the name is unknown, or weights are given to what has none.
        MissingComponentError: if weights are needed and none were given, or there is no such file.
        DependencyError: if musicnn or cdpam is not installed.
        CheckpointError: if the weights are another model's, or damaged.
    """
    if name not in NAMES:
        raise ConfigError(f"embedding {name!r}: unknown; choose one of {', '.join(NAMES)}")
    if name == LogMelStatistics.name:
        if weights is not None:
            raise ConfigError(f"embedding {name!r} has no weights, got {weights}; leave them out")
        return LogMelStatistics()
    # imported here, as these are networks that most commands never need
    if name == "cdpam":
        from ptq4adm.evaluation.cdpam import CdpamEmbedding

        return CdpamEmbedding(weights)
    if name.startswith("musicnn-"):
        from ptq4adm.evaluation.musicnn import Musicnn

        return Musicnn(name.removeprefix("musicnn-"), weights)
    if weights is None:
        raise MissingComponentError(
            f"embedding {name!r}: its weights are not free to ship; get them from their authors "
            "(docs/evaluation.md says where) and name the file or folder (--weights PATH)"
        )
    if name == "cnn14-16k":
        from ptq4adm.evaluation.cnn14 import Cnn14Embedding

        return Cnn14Embedding(weights)
    if name == "vggish":
        from ptq4adm.evaluation.vggish import VggishEmbedding

        return VggishEmbedding(weights)
    from ptq4adm.evaluation.clap import ClapEmbedding

    return ClapEmbedding(weights)
