"""What an evaluation found, and the JSON file that holds it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ptq4adm.calibration.files import write_json
from ptq4adm.errors import EvaluationError, MissingComponentError

FORMAT = "ptq4adm-evaluation"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Metric:
    """One figure with its interval.

    Attributes:
        name: such as "frechet_distance".
        value: the figure.
        low: lower end of its confidence interval.
        high: upper end.
        level: of the interval, in (0, 1).
        unit: of all three; empty for pure numbers.
        detail: how it was made, in a few words.
    """

    name: str
    value: float
    low: float
    high: float
    level: float
    unit: str
    detail: str


@dataclass(frozen=True)
class Evaluation:
    """Two sets of clips compared.

    Attributes:
        embedding: name of the embedding.
        weights: sha256 of its weights, or "none".
        dimension: of its features.
        clips: in each set.
        reference: what the reference set is called.
        test: what the other set is called.
        metrics: the figures.
        warnings: sentences that a reader must know before trusting them.
    """

    embedding: str
    weights: str
    dimension: int
    clips: int
    reference: str
    test: str
    metrics: tuple[Metric, ...]
    warnings: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Metric:
        """A figure by its name; KeyError if it was not measured."""
        for metric in self.metrics:
            if metric.name == name:
                return metric
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """As it is written, format and version included."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "embedding": {
                "name": self.embedding,
                "weights": self.weights,
                "dimension": self.dimension,
            },
            "clips": self.clips,
            "reference": self.reference,
            "test": self.test,
            "metrics": [asdict(metric) for metric in self.metrics],
            "warnings": list(self.warnings),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], source: str = "evaluation") -> Evaluation:
        """Read what `to_dict` gave.

        Args:
            content: of the file.
            source: the file, for messages.

        Raises:
            EvaluationError: if it is something else or of another format version, or a field is
                missing or of the wrong type.
        """
        if not isinstance(content, Mapping) or content.get("format") != FORMAT:
            raise EvaluationError(
                f"{source}: not a {FORMAT} file; ptq4adm evaluate --json FILE writes one"
            )
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            raise EvaluationError(
                f"{source}: format version {version!r}, this package knows {FORMAT_VERSION}; "
                "upgrade ptq4adm, or evaluate again"
            )
        try:
            embedding = content["embedding"]
            return cls(
                embedding=_typed(embedding, "name", str),
                weights=_typed(embedding, "weights", str),
                dimension=_typed(embedding, "dimension", int),
                clips=_typed(content, "clips", int),
                reference=_typed(content, "reference", str),
                test=_typed(content, "test", str),
                metrics=tuple(_metric(m) for m in _typed(content, "metrics", list)),
                warnings=tuple(str(w) for w in _typed(content, "warnings", list)),
            )
        except (KeyError, TypeError) as error:
            raise EvaluationError(f"{source}: damaged ({error}); evaluate again") from error

    def save(self, path: str | Path) -> None:
        """Write the JSON file, whole or not at all.

        Raises:
            OutputError: if it cannot be written.
        """
        write_json(Path(path), self.to_dict(), "the evaluation")

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Read the JSON file.

        Raises:
            MissingComponentError: if there is no such file.
            EvaluationError: as `from_dict`.
        """
        path = Path(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise MissingComponentError(
                f"{path}: cannot be read ({error}); name another"
            ) from error
        except ValueError as error:
            raise EvaluationError(f"{path}: no JSON ({error}); evaluate again") from error
        return cls.from_dict(content, str(path))


def _metric(content: Any) -> Metric:
    name = _typed(content, "name", str)
    value, low, high, level = (
        float(_typed(content, key, (int, float))) for key in ("value", "low", "high", "level")
    )
    if not all(map(math.isfinite, (value, low, high, level))):
        raise TypeError(f"{name} is not finite")
    unit, detail = _typed(content, "unit", str), _typed(content, "detail", str)
    return Metric(name, value, low, high, level, unit, detail)


def _typed(content: Any, key: str, kind: Any) -> Any:
    """A field, or a TypeError that says which one is wrong."""
    if not isinstance(content, Mapping):
        raise TypeError(f"expected an object with {key!r}, got {type(content).__name__}")
    value = content[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{key} is {value!r}")
    return value
