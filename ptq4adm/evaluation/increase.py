"""What quantization adds to a model's distance from real clips."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq4adm.errors import ShapeError
from ptq4adm.evaluation.distances import frechet_distance
from ptq4adm.evaluation.intervals import Interval, interval, standard_error


@dataclass(frozen=True)
class Increase:
    """A relative increase with its interval.

    Attributes:
        value: the share that is added; 0.02 is 2 %. Negative if the test set is nearer.
        interval: of it.
        baseline: Frechet distance of the baseline.
        test: Frechet distance of the test set.
        warnings: of the distances.
    """

    value: float
    interval: Interval
    baseline: float
    test: float
    warnings: tuple[str, ...] = ()


def frechet_increase(
    reference: Tensor,
    baseline: Tensor,
    test: Tensor,
    *,
    level: float = 0.95,
    subsets: int = 100,
    seed: int = 0,
) -> Increase:
    """How much farther from the reference a quantized model is than the float one.

        r = d^2(reference, test) / d^2(reference, baseline) - 1                          (1)

    Halves take the same rows of baseline and test, so what the prompts and seeds of both share does
    not widen the interval. The bias of N clips is in both distances and draws r towards 0, the more
    the fewer clips there are.

    Args:
        reference: features of real clips, floating [N, D].
        baseline: of the float model's clips, [N, D].
        test: of the quantized model's clips, [N, D]; row i has the prompt and seed of row i of the
            baseline.
        level: of the interval, in (0, 1).
        subsets: halves to draw.
        seed: of the draws.

    Raises:
        ShapeError: if the shapes differ, there are fewer than 8 clips, or the baseline is the
            reference.
        NonFiniteError: if an embedding holds NaN or infinity.
    """
    if baseline.shape != test.shape:
        raise ShapeError(
            f"embeddings: got {tuple(baseline.shape)} of the baseline and {tuple(test.shape)} of "
            "the test set; rows must be pairs of the same prompt and seed"
        )
    first, second = frechet_distance(reference, baseline), frechet_distance(reference, test)
    if torch.equal(reference, baseline) or first.value <= 0.0:
        raise ShapeError(
            f"the baseline's distance is {first.value:g}: it is the reference itself; give real "
            "clips, or clips of other seeds"
        )
    dimension = baseline.shape[1]

    def ratio(x: Tensor, both: Tensor) -> float:
        base, other = both[:, :dimension], both[:, dimension:]
        return frechet_distance(x, other).value / frechet_distance(x, base).value - 1.0

    error = standard_error(
        ratio,
        reference,
        torch.cat([baseline, test], 1),
        paired=False,
        subsets=subsets,
        seed=seed,
    )
    value = second.value / first.value - 1.0
    return Increase(
        value, interval(value, error, level=level), first.value, second.value, first.warnings
    )
