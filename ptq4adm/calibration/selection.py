"""A choice of (prompt, step) pairs: how it was made, what it covers, and its file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptq4adm.calibration.bins import BINS, PairTable, bin_signatures, measure_cover
from ptq4adm.calibration.files import write_json
from ptq4adm.calibration.signatures import SignatureMeta, Signatures
from ptq4adm.calibration.strategies import CalibrationStrategy, find_strategy, pair_hash
from ptq4adm.errors import CalibrationError, ConfigError
from ptq4adm.quant.buckets import TimestepBuckets

FORMAT = "ptq4adm-selection"
FORMAT_VERSION = 1
DEFAULT_SIZE = 256
DEFAULT_STRATEGY = "activation-aware"


@dataclass(frozen=True)
class Selection:
    """Pairs that a model is calibrated on.

    Attributes:
        strategy: that chose them.
        seed: of the choice.
        pairs: (prompt, step), both from 0, in the order they were chosen.
        curve: share of the occupied range bins covered after 1, 2, ... pairs.
        distance: how far the chosen pairs' histograms are from all pairs', 0 to 1.
        warnings: what a person should know of the choice.
        meta: what was run.
    """

    strategy: str
    seed: int
    pairs: tuple[tuple[int, int], ...]
    curve: tuple[float, ...]
    distance: float
    warnings: tuple[str, ...]
    meta: SignatureMeta

    @property
    def coverage(self) -> float:
        """Share of the occupied range bins that the chosen pairs cover."""
        return self.curve[-1]

    def steps_of(self, prompt: int) -> frozenset[int]:
        """The chosen steps of one prompt."""
        return frozenset(step for p, step in self.pairs if p == prompt)

    def prompts(self) -> list[int]:
        """The prompts of which a step was chosen, rising."""
        return sorted({prompt for prompt, _ in self.pairs})

    def digest(self) -> str:
        """SHA-256 of what was chosen and of what it was chosen from, 16 hex digits."""
        content = json.dumps([sorted(self.pairs), self.meta.to_dict()], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe content."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "strategy": self.strategy,
            "seed": self.seed,
            "pairs": [list(pair) for pair in self.pairs],
            "curve": list(self.curve),
            "distance": self.distance,
            "warnings": list(self.warnings),
            "meta": self.meta.to_dict(),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Selection:
        """From `to_dict`.

        Raises:
            ValueError: if it is of another format.
            KeyError: if an entry is missing.
        """
        if (content["format"], content["format_version"]) != (FORMAT, FORMAT_VERSION):
            raise ValueError(f"{content['format']} {content['format_version']} is not {FORMAT} 1")
        return cls(
            strategy=str(content["strategy"]),
            seed=int(content["seed"]),
            pairs=tuple((int(prompt), int(step)) for prompt, step in content["pairs"]),
            curve=tuple(float(value) for value in content["curve"]),
            distance=float(content["distance"]),
            warnings=tuple(content["warnings"]),
            meta=SignatureMeta.from_dict(content["meta"]),
        )

    def save(self, path: str | Path) -> None:
        """Write a JSON file, whole or not at all.

        Raises:
            OutputError: if it cannot be written.
        """
        write_json(Path(path), self.to_dict(), "the selection")

    @classmethod
    def load(cls, path: str | Path) -> Selection:
        """Read a file written by `save`.

        Raises:
            CalibrationError: if it is missing or not a selection.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CalibrationError(
                f"{path}: missing or not a selection ({error!r}); choose the pairs again"
            ) from error


@dataclass(frozen=True)
class SelectionSettings:
    """How pairs are chosen.

    Args:
        strategy: a name of `ptq4adm.calibration.strategies.STRATEGIES`, or a function like them.
        size: pairs; None for 256, or all if there are fewer.
        seed: of random choices and ties.
        statistic: which signature is a layer's range: "absmax", "p999" or "rms".
        bins: range bins of a layer.
        by_bucket: whether every timestep bucket has its own bins.

    Raises:
        ConfigError: if the strategy is unknown, or the size below 1.
    """

    strategy: str | CalibrationStrategy = DEFAULT_STRATEGY
    size: int | None = None
    seed: int = 0
    statistic: str = "absmax"
    bins: int = BINS
    by_bucket: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.strategy, str):
            find_strategy(self.strategy)
        size = self.size
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ConfigError(f"size: got {size!r}, needs a whole number of at least 1")

    @property
    def choose(self) -> CalibrationStrategy:
        """The function."""
        return find_strategy(self.strategy) if isinstance(self.strategy, str) else self.strategy

    @property
    def name(self) -> str:
        """Of the strategy."""
        if isinstance(self.strategy, str):
            return self.strategy
        return str(getattr(self.strategy, "__name__", type(self.strategy).__name__))


def select_pairs(signatures: Signatures, buckets: int, settings: SelectionSettings) -> Selection:
    """Choose the pairs that a model is calibrated on.

    A bucket of timesteps without a pair would have no scales, so every bucket that the sampler
    reaches gets at least one, whatever the strategy: if need be in place of the pair that was
    chosen last in the fullest bucket, with a warning.

    Args:
        signatures: all prompts recorded.
        buckets: timestep buckets with their own scales.
        settings: strategy, size, bins.

    Raises:
        ConfigError: if there are fewer pairs than asked for, or than buckets.
        CalibrationError: if signatures are missing, or the strategy did not keep to its contract.
    """
    meta = signatures.meta
    spans = TimestepBuckets(meta.num_train_timesteps, (False,) * buckets)
    strata = torch.tensor([spans.bucket_of(float(t)) for t in signatures.timesteps])
    table = bin_signatures(
        signatures,
        strata,
        statistic=settings.statistic,
        bins=settings.bins,
        by_stratum=settings.by_bucket,
    )
    size = min(DEFAULT_SIZE, table.pairs) if settings.size is None else settings.size
    reached = len(set(strata.tolist()))
    if not reached <= size <= table.pairs:
        raise ConfigError(
            f"size: got {size} pairs, needs {reached} (one for each timestep bucket that the "
            f"sampler reaches) to {table.pairs} ({len(table.keys)} prompts of {table.steps} steps)"
        )
    pairs = settings.choose(table, size, settings.seed)
    if len(pairs) != size or len(set(pairs)) != size or not _are_pairs(pairs, table):
        raise CalibrationError(
            f"strategy {settings.name!r} chose {len(set(pairs))} different pairs, needs {size} of "
            f"0 .. {table.pairs - 1}"
        )
    pairs, moved = fill_strata(table, strata, pairs, settings.seed)
    warnings = list(table.warnings)
    if moved:
        warnings.append(
            f"{moved} of {size} pairs were exchanged: {settings.name} chose none in {moved} of "
            f"{reached} timestep buckets, and a bucket without a pair has no scales"
        )
    cover = measure_cover(table, pairs)
    return Selection(
        strategy=settings.name,
        seed=settings.seed,
        pairs=tuple(divmod(pair, table.steps) for pair in pairs),
        curve=cover.curve,
        distance=cover.distance,
        warnings=tuple(warnings),
        meta=meta,
    )


def fill_strata(
    table: PairTable, strata: Tensor, pairs: Sequence[int], seed: int
) -> tuple[list[int], int]:
    """Exchange pairs so that every stratum has one.

    Args:
        table: all pairs.
        strata: int64 [S], the stratum of every step.
        pairs: chosen, at least as many as strata.
        seed: of which pair a stratum without one gets.

    Returns:
        The pairs, and how many were exchanged.
    """
    of_step, kept = strata.tolist(), list(pairs)
    empty = sorted(set(of_step) - {of_step[pair % table.steps] for pair in kept})
    for stratum in empty:
        counts: dict[int, int] = {}
        for pair in kept:
            key = of_step[pair % table.steps]
            counts[key] = counts.get(key, 0) + 1
        fullest = max(counts, key=lambda key: (counts[key], -key))
        last = max(i for i, p in enumerate(kept) if of_step[p % table.steps] == fullest)
        fits = (p for p in range(table.pairs) if of_step[p % table.steps] == stratum)
        kept[last] = min(fits, key=lambda pair: pair_hash(table, pair, seed))
    return kept, len(empty)


def _are_pairs(pairs: Sequence[int], table: PairTable) -> bool:
    return all(0 <= pair < table.pairs for pair in pairs)
