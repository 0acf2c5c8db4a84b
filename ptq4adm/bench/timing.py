"""Timing of several variants of one computation, side by side.

Variants run in rounds, so that a change of the machine's speed meets all of them, and each round
begins with another one. A call that is not timed comes first in every turn: it brings the variant's
weights back into the caches and lets the threads of the variant before come to rest.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Call = Callable[[], object]

TURN_SECONDS = 2e-3  # short calls are repeated within a turn
MOST_CALLS = 10  # in a turn
LEAST_ROUNDS = 3
LOW, HIGH = 0.2, 0.8  # quantiles reported beside the median


@dataclass(frozen=True)
class Timing:
    """Distribution of the seconds of one call.

    Attributes:
        median_s: the middle.
        p20_s: a fifth of the calls were faster.
        p80_s: a fifth were slower.
        samples: number of timed calls.
    """

    median_s: float
    p20_s: float
    p80_s: float
    samples: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """Summary of measured calls, at least one."""
        ordered = sorted(seconds)
        last = len(ordered) - 1
        return cls(
            statistics.median(ordered),
            ordered[round(LOW * last)],
            ordered[round(HIGH * last)],
            len(ordered),
        )


def time_interleaved(
    variants: Mapping[str, Call],
    *,
    seconds: float,
    least_rounds: int = LEAST_ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time every variant in rotating order until the time is used up.

    Args:
        variants: name to a call without arguments.
        seconds: budget of the whole; at least `least_rounds` rounds run, whatever they take.
        least_rounds: at least 1.
        clock: for tests.

    Returns:
        Name to the distribution of its calls.
    """
    names = list(variants)
    samples: dict[str, list[float]] = {name: [] for name in names}
    start = clock()
    estimates = {name: _timed(variants[name], clock) for name in names}
    was_collecting = gc.isenabled()
    gc.disable()
    try:
        done = 0
        while done < least_rounds or clock() - start < seconds:
            for turn in range(len(names)):
                name = names[(done + turn) % len(names)]
                variants[name]()
                calls = round(TURN_SECONDS / max(estimates[name], 1e-9))
                for _ in range(max(1, min(MOST_CALLS, calls))):
                    samples[name].append(_timed(variants[name], clock))
            done += 1
    finally:
        if was_collecting:
            gc.enable()
    return {name: Timing.of(found) for name, found in samples.items()}


def _timed(call: Call, clock: Callable[[], float]) -> float:
    start = clock()
    call()
    return clock() - start
