"""Which tiles are worth measuring for a product, which of them wins, and where that is written.

Measuring needs operators, tensors and clocks, which lie above this package: ``ptq4adm.bench`` and
the command ``ptq4adm tune`` bring them. What is legal is said by ``tuning.illegal_reason`` alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from ptq4adm.errors import ConfigError
from ptq4adm.kernels import tuning
from ptq4adm.kernels.tuning import BLOCK_K, GATHER, TMA, Problem, TileConfig

MOST_CANDIDATES = 20
_STAGES, _WARPS, _FORMS = (3, 4, 5), (4, 8), (GATHER, TMA)
_REFINED = 3  # tiles whose warps, stages and form are varied
T = TypeVar("T")  # a tile, of whatever backend
# a tile must be this much faster than the planned one to replace it: less is noise
LEAST_GAIN = 0.02


def candidates(problem: Problem, limit: int = MOST_CANDIDATES) -> tuple[TileConfig, ...]:
    """Return the legal tiles worth measuring, the planned one first.

    Half of them are the tiles that the plan's estimate likes best, with usual warps and stages; the
    rest vary warps, stages, k of a step and form of the best few, which the estimate cannot rank.

    Args:
        problem: the product.
        limit: most tiles that are returned, at least 1.

    Raises:
        ConfigError: if ``limit`` is below 1.
    """
    if limit < 1:
        raise ConfigError(f"limit = {limit}: expected at least 1 tile")
    chosen: dict[TileConfig, None] = {tuning.plan_config(problem): None}
    ranked = _ranked(problem)
    for config in ranked:
        if len(chosen) > limit // 2:
            break
        chosen.setdefault(config)
    rounds = [_variations(config) for config in (*chosen, *ranked)[:_REFINED]]
    while rounds and len(chosen) < limit:
        for variations in tuple(rounds):
            found = next(variations, None)
            if found is None:
                rounds.remove(variations)
            elif len(chosen) < limit and tuning.illegal_reason(found, problem) is None:
                chosen.setdefault(found)
    return tuple(chosen)[:limit]


def _ranked(problem: Problem) -> list[TileConfig]:
    """Legal tiles of the plan, least estimated time first."""
    legal = (
        config
        for config in tuning._candidates(problem)
        if tuning.illegal_reason(config, problem) is None
    )
    return sorted(legal, key=lambda config: tuning._estimated_clocks(config, problem))


def _variations(config: TileConfig) -> Iterator[TileConfig]:
    """Neighbours of a tile that differ in one field, then in two."""
    for warps in _WARPS:
        yield replace(config, num_warps=warps)
    for form in _FORMS:
        yield replace(config, form=form)
    for stages in _STAGES:
        yield replace(config, num_stages=stages)
    other = 3 * BLOCK_K - config.block_k
    # half the k of a step leaves room for twice the stages
    yield replace(config, block_k=other)
    for stages in _STAGES:
        yield replace(config, block_k=other, num_stages=stages)
        yield replace(config, num_warps=12 - config.num_warps, num_stages=stages)


def fastest(microseconds: Mapping[T, float], planned: T) -> T:
    """Return the fastest tile, or the planned one if that gains less than ``LEAST_GAIN``.

    Args:
        microseconds: of each measured tile, at least one.
        planned: the tile that is used without measurements.
    """
    best = min(microseconds, key=lambda tile: microseconds[tile])
    if planned in microseconds and microseconds[planned] * (1 - LEAST_GAIN) <= microseconds[best]:
        return planned
    return best


def config_path(problem: Problem, folder: Path | None) -> Path:
    """Return the file that holds a problem's measured tiles.

    Args:
        problem: the product.
        folder: of the files; None for the package's own.

    Raises:
        ConfigError: if tiles of the interpreter would be written into the package.
    """
    path = tuning.config_file(problem)
    if folder is not None:
        return folder / path.name
    if problem.capability == 0:
        raise ConfigError(
            f"device {problem.device!r}: the interpreter's times say nothing of a GPU; give "
            "--output DIR to rehearse"
        )
    return path


def is_measured(problem: Problem, folder: Path | None) -> bool:
    """Return whether a legal tile for this very M is in the file already."""
    found = tuning.load_configs(config_path(problem, folder)).get(problem.M)
    return found is not None and tuning.illegal_reason(found, problem) is None


def write(problem: Problem, config: TileConfig, folder: Path | None) -> Path:
    """Add the tile of one M to its file, and return the file.

    Raises:
        ConfigError: if the tile cannot run the problem, or see ``config_path``.
    """
    reason = tuning.illegal_reason(config, problem)
    if reason is not None:
        raise ConfigError(f"{reason}; it is not written")
    path = config_path(problem, folder)
    tuning.save_configs(path, {**tuning.load_configs(path), problem.M: config})
    return path
