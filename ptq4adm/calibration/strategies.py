"""Which (prompt, step) pairs a model is calibrated on: five strategies with one signature.

A strategy is a function of a table, a size and a seed to that many different pairs, in the order
they were chosen. Random choices are made by hashes of the prompts' keys, so that neither the order
of the prompts nor the version of a library matters.

Sources: uniform steps are Q-Diffusion's (Li et al., ICCV 2023), skewed normal steps PTQ4DM's (Shang
et al., CVPR 2023; mean and deviation 0.4 of the timesteps), density and diversity EDA-DM's (arXiv
2401.04585). "activation-aware" is this project's own; see `ptq4adm.calibration.cover`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ptq4adm.calibration.bins import PairTable
from ptq4adm.calibration.cover import choose_covering
from ptq4adm.errors import CalibrationError, ConfigError

SKEW_MEAN = SKEW_DEVIATION = 0.4
TDAC_THRESHOLD = 0.3
TDAC_DIVERSITY = 5.0


class CalibrationStrategy(Protocol):
    """Chooses pairs."""

    def __call__(self, table: PairTable, size: int, seed: int) -> list[int]:
        """`size` different pairs of a table, in the order they were chosen.

        Args:
            table: all pairs.
            size: 1 .. table.pairs.
            seed: of random choices and ties.
        """


def choose_random(table: PairTable, size: int, seed: int) -> list[int]:
    """Any pairs, all equally likely."""
    return sorted(range(table.pairs), key=lambda pair: pair_hash(table, pair, seed))[:size]


def choose_uniform_steps(table: PairTable, size: int, seed: int) -> list[int]:
    """As many pairs of every step, or evenly spaced steps if there are fewer pairs; any prompts."""
    S = table.steps
    return choose_by_step(table, [(i + 1) * size // S - i * size // S for i in range(S)], seed)


def choose_skewed_steps(
    table: PairTable,
    size: int,
    seed: int,
    *,
    mean: float = SKEW_MEAN,
    deviation: float = SKEW_DEVIATION,
) -> list[int]:
    """Timesteps drawn from a normal distribution cut at its range; the nearest steps, any prompts.

        t ~ N(mean T, (deviation T)^2),   0 <= t < T                                        (1)

    Where every prompt of the nearest step is taken already, the next nearest one gives a pair.

    Args:
        table: all pairs.
        size: how many.
        seed: of the draws.
        mean: as a share of T; below one half prefers late steps, which have little noise.
        deviation: as a share of T.
    """
    T, draws = table.num_train_timesteps, random.Random(seed)
    timesteps = [float(t) for t in table.timesteps]
    counts = [0] * table.steps
    for _ in range(size):
        open_steps = [i for i, count in enumerate(counts) if count < len(table.keys)]
        t = -1.0
        while not 0 <= t < T:
            t = draws.gauss(mean * T, deviation * T)
        counts[min(open_steps, key=lambda i: (abs(timesteps[i] - t), i))] += 1
    return choose_by_step(table, counts, seed)


def choose_dense_and_diverse(
    table: PairTable,
    size: int,
    seed: int,
    *,
    threshold: float = TDAC_THRESHOLD,
    diversity: float = TDAC_DIVERSITY,
) -> list[int]:
    """Pairs of every step in proportion to `tdac_weights`; any prompts.

    Args:
        table: all pairs, with features.
        size: N; counts are N w_t / sum w, rounded so that they add up to N.
        seed: of the prompts.
        threshold: squared distance below which steps are neighbours.
        diversity: lambda.

    Raises:
        CalibrationError: if the table has no features.
    """
    if not table.features.numel():
        raise CalibrationError(
            "signatures hold no features of the model's middle, which 'density-diversity' needs; "
            "choose another strategy"
        )
    weights = tdac_weights(table.features, threshold, diversity)
    return choose_by_step(table, share_out(weights.tolist(), size, len(table.keys)), seed)


def tdac_weights(features: Tensor, threshold: float, diversity: float) -> Tensor:
    """EDA-DM's weight of every step.

        density_t   = #{ j : mean (F_t - F_j)^2 <= threshold }
        diversity_t = sum_j (1 - cos(F_t, F_j))
        w_t         = minmax(density)_t + lambda minmax(diversity)_t                        (1)

    Args:
        features: F, float [S, F].
        threshold: 0.3 in the paper's code, for its models' features.
        diversity: lambda, 5 there.

    Returns:
        float64 [S], at least 0; all 1 where every step is alike.

    Source: EDA-DM, TDAC.
    """
    F = features.double()
    # one step at a time: all differences at once take S * S * F numbers, gigabytes for 200 steps
    squared = torch.stack([(F - one).square().mean(dim=1) for one in F])
    density = (squared <= threshold).sum(dim=1).double()
    unit = F / F.norm(dim=1, keepdim=True).clamp_min(1e-12)
    distance = (1.0 - unit @ unit.T).sum(dim=1)
    weights = _minmax(density) + diversity * _minmax(distance)
    return weights if bool((weights > 0).any()) else torch.ones_like(weights)


def share_out(weights: Sequence[float], size: int, capacity: int) -> list[int]:
    """Whole numbers in proportion to weights, that add up to `size`: largest remainders.

    None is above `capacity`: what does not fit goes to the others, in proportion again.
    """
    counts = [0] * len(weights)
    while (rest := size - sum(counts)) > 0:
        is_open = [count < capacity for count in counts]
        shares = [w if o else 0.0 for w, o in zip(weights, is_open, strict=True)]
        if sum(shares) <= 0:
            shares = [float(o) for o in is_open]
        exact = [rest * share / sum(shares) for share in shares]
        added = [int(value) for value in exact]
        order = sorted(range(len(exact)), key=lambda i: (added[i] - exact[i], i))
        for i in order[: rest - sum(added)]:
            added[i] += 1
        counts = [min(capacity, c + a) for c, a in zip(counts, added, strict=True)]
    return counts


def choose_by_step(table: PairTable, counts: Sequence[int], seed: int) -> list[int]:
    """`counts[s]` pairs of step s, of any prompts; the order of the pairs is random, too."""
    S, P = table.steps, len(table.keys)
    chosen = []
    for step, count in enumerate(counts):
        pairs = [prompt * S + step for prompt in range(P)]
        chosen += sorted(pairs, key=lambda pair: pair_hash(table, pair, seed))[:count]
    return sorted(chosen, key=lambda pair: pair_hash(table, pair, seed))


def pair_hash(table: PairTable, pair: int, seed: int) -> bytes:
    """A pair's random number: of its prompt's key, its step and the seed."""
    prompt, step = divmod(pair, table.steps)
    return hashlib.sha256(f"{seed} {table.keys[prompt]} {step}".encode()).digest()


def _minmax(values: Tensor) -> Tensor:
    low, high = values.min(), values.max()
    # differences of rounding are none: cosines of equal features
    if float(high - low) <= 1e-9 * max(1.0, float(high.abs())):
        return torch.zeros_like(values)
    return (values - low) / (high - low)


def _covering(table: PairTable, size: int, seed: int, *, density: float = 0.5) -> list[int]:
    ties = [pair_hash(table, pair, seed) for pair in range(table.pairs)]
    return choose_covering(table, size, ties, density=density)


STRATEGIES: dict[str, CalibrationStrategy] = {
    "random": choose_random,
    "uniform-steps": choose_uniform_steps,
    "skewed-steps": choose_skewed_steps,
    "density-diversity": choose_dense_and_diverse,
    "activation-aware": _covering,
}


def find_strategy(name: str) -> CalibrationStrategy:
    """A strategy by name.

    Raises:
        ConfigError: if there is none of the name.
    """
    if name not in STRATEGIES:
        known = ", ".join(repr(n) for n in STRATEGIES)
        raise ConfigError(f"strategy: got {name!r}, needs one of {known}")
    return STRATEGIES[name]


def covering(density: float) -> CalibrationStrategy:
    """The activation-aware strategy with another weight of the bulk.

    Args:
        density: in [0, 1]; 0 only covers, 1 only matches.
    """
    return partial(_covering, density=density)
