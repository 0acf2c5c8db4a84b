"""How far a figure of N clips may lie from what other N clips would give.

A bootstrap repeats clips, which shrinks covariances and raises every distance: its interval does
not even hold the figure it belongs to. Halves without repetition do not. For a figure t of N clips
and t_s of half of them, drawn anew for each s,

    v = mean_s (t_s - mean t_s)^2 m / (N - m),    m = N // 2                             (1)
    interval = t -+ z sqrt(v)                                                            (2)

v is the delete-d jackknife's estimate of the figure's variance. The bias that t shares with every
figure of N clips stays in it: the interval is one for the expected figure of N clips.

Source: Shao and Wu, "A General Theory for Jackknife Variance Estimation", 1989.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from ptq4adm.errors import RangeError, ShapeError
from ptq4adm.evaluation.distances import draw_rows

FEWEST_CLIPS = 8
_SUBSETS = 100

Statistic = Callable[[Tensor, Tensor], float]


@dataclass(frozen=True)
class Interval:
    """A confidence interval.

    Attributes:
        low: its lower end.
        high: its upper end.
        level: share of such intervals that hold the expected figure, such as 0.95.
    """

    low: float
    high: float
    level: float


def standard_error(
    statistic: Statistic,
    reference: Tensor,
    test: Tensor,
    *,
    paired: bool,
    subsets: int = _SUBSETS,
    seed: int = 0,
) -> float:
    """Standard error of a figure of two sets, by equation (1).

    Args:
        statistic: computes the figure from [n, ...] and [n, ...].
        reference: [N, ...], one row a clip.
        test: [N, ...].
        paired: row i of both is the same prompt and seed: halves take the same rows.
        subsets: halves to draw.
        seed: of the draws.

    Returns:
        in the figure's unit.

    Raises:
        ShapeError: if the counts differ, or there are fewer than 8 clips.
    """
    count = len(reference)
    if count != len(test) or count < FEWEST_CLIPS:
        raise ShapeError(
            f"clips: got {count} reference and {len(test)} test clips; equal counts of at least "
            f"{FEWEST_CLIPS} are needed for an interval"
        )
    generator = torch.Generator().manual_seed(seed)
    half = count // 2
    values = []
    for _ in range(subsets):
        i, j = draw_rows(count, half, paired, generator)
        values.append(statistic(reference[i], test[j]))
    spread = torch.tensor(values, dtype=torch.float64).var(correction=0)
    return math.sqrt(float(spread) * half / (count - half))


def interval(
    value: float, error: float, *, level: float = 0.95, floor: float = -math.inf
) -> Interval:
    """The interval of a figure, by equation (2).

    Args:
        value: the figure.
        error: its standard error.
        level: in (0, 1).
        floor: the least the figure can be; the interval ends there.

    Raises:
        RangeError: if the level is not in (0, 1).
    """
    if not 0.0 < level < 1.0:
        raise RangeError(f"level = {level}: expected a share between 0 and 1, such as 0.95")
    half = NormalDist().inv_cdf(0.5 + level / 2) * error
    return Interval(max(value - half, min(floor, value)), value + half, level)
