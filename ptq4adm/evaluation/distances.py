"""Distances between two sets of embedded clips, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq4adm.errors import NonFiniteError, ShapeError

_FEWEST_TO_HALVE = 4
_FIT_SIZES, _FIT_DRAWS = 6, 16


@dataclass(frozen=True)
class Distance:
    """One distance, with what a reader must know before trusting it.

    Attributes:
        value: the distance; its unit is the embedding's (squared, for a Frechet distance).
        clips: clips on each side.
        warnings: sentences, empty if there is nothing to say.
    """

    value: float
    clips: int
    warnings: tuple[str, ...] = ()


def frechet_distance(reference: Tensor, test: Tensor) -> Distance:
    """Frechet distance of the Gaussians fitted to two sets of embeddings.

        d^2 = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1^(1/2) S2 S1^(1/2))^(1/2)            (1)

    With the centred embeddings A and B, S1 = A^T A / (N - 1) and S2 = B^T B / (N - 1), the last
    trace is the sum of the singular values of A B^T, over N - 1. So no covariance is formed and no
    root of one is taken, and rounding costs no more where they are singular.

    Args:
        reference: floating [N, D].
        test: floating [N, D].

    Returns:
        the distance, with a warning if N <= D leaves the covariances singular.

    Raises:
        ShapeError: if the counts or dimensions differ, or there are fewer than two clips.
        NonFiniteError: if an embedding holds NaN or infinity.
    """
    x, y = _checked(reference, test)
    count, dimension = x.shape
    warnings: tuple[str, ...] = ()
    if count <= dimension:
        warnings = (
            f"{count} clips for {dimension} dimensions: the covariances are singular and the "
            f"distance is biased upwards; more than {dimension} clips are needed",
        )
    return Distance(_frechet(x, y), count, warnings)


def frechet_distance_infinity(
    reference: Tensor, test: Tensor, *, paired: bool = False, seed: int = 0
) -> Distance:
    """Frechet distance extrapolated to infinitely many clips.

    The distance of n clips is too large by about c / n. It is computed for subsets of 6 sizes from
    N / 2 to N, equally spaced in 1 / n and averaged over 16 draws each, and the line

        d^2(n) = d^2(infinity) + c / n                                                   (1)

    is fitted by least squares. It may come out slightly negative where both sets are alike.

    Args:
        reference: floating [N, D].
        test: floating [N, D].
        paired: row i of both is the same prompt and seed; subsets then take the same rows.
        seed: of the subsets.

    Returns:
        the distance, with a warning if there are fewer than 3 D clips, as the bias of subsets that
        small is not c / n.

    Raises:
        ShapeError: if the counts or dimensions differ, or there are fewer than four clips.
        NonFiniteError: if an embedding holds NaN or infinity.

    Source: Chong and Forsyth, "Effectively Unbiased FID and Inception Score", 2020.
    """
    x, y = _checked(reference, test)
    count, dimension = x.shape
    if count < _FEWEST_TO_HALVE:
        raise ShapeError(f"embeddings: got {count} clips; extrapolating needs at least 4")
    generator = torch.Generator().manual_seed(seed)
    points = []
    gaps = _FIT_SIZES - 1
    for k in range(_FIT_SIZES):
        size = round(count * gaps / (2 * gaps - k))  # 1 / size falls from 2 / N to 1 / N
        draws = 1 if size == count else _FIT_DRAWS
        rows = (draw_rows(count, size, paired, generator) for _ in range(draws))
        values = [_frechet(x[i], y[j]) for i, j in rows]
        points.append((1.0 / size, sum(values) / draws))
    value = _intercept(points)
    warnings: tuple[str, ...] = ()
    if count < 3 * dimension:
        warnings = (
            f"{count} clips for {dimension} dimensions: the extrapolated distance is still biased "
            f"upwards; at least {3 * dimension} clips are needed",
        )
    return Distance(value, count, warnings)


def draw_rows(
    count: int, size: int, paired: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Rows of both sets for a subset without repetition, int64 [size] each.

    Args:
        count: rows there are.
        size: rows to draw.
        paired: the same rows of both.
        generator: of the draw.
    """
    rows = torch.randperm(count, generator=generator)[:size]
    return rows, rows if paired else torch.randperm(count, generator=generator)[:size]


def kernel_distance(reference: Tensor, test: Tensor, *, paired: bool = False) -> Distance:
    """Unbiased squared maximum mean discrepancy under the cubic polynomial kernel.

        k(a, b) = (a . b / D + 1)^3                                                      (1)
        d = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

    Args:
        reference: floating [N, D].
        test: floating [N, D].
        paired: row i of both is the same prompt and seed. The last mean then is over i != j, too:
            a pair is alike for another reason than its sets, which would make the estimate too low.

    Returns:
        the distance, which may be negative: it is an unbiased estimate.

    Raises:
        ShapeError: if the counts or dimensions differ, or there are fewer than two clips.
        NonFiniteError: if an embedding holds NaN or infinity.
    """
    x, y = _checked(reference, test)
    count, dimension = x.shape

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / dimension + 1.0) ** 3

    def apart(table: Tensor) -> float:
        return float(table.sum() - table.trace()) / (count * (count - 1))

    across = kernel(x, y)
    between = apart(across) if paired else float(across.mean())
    return Distance(apart(kernel(x, x)) + apart(kernel(y, y)) - 2.0 * between, count)


def _checked(reference: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets in float64 on the CPU, after the checks every distance shares."""
    if reference.dim() != 2 or test.dim() != 2 or reference.shape[1] != test.shape[1]:
        raise ShapeError(
            f"embeddings: got {tuple(reference.shape)} and {tuple(test.shape)}; two [N, D] of one "
            "embedding are needed"
        )
    if len(reference) != len(test) or len(test) < 2:
        raise ShapeError(
            f"embeddings: got {len(reference)} reference and {len(test)} test clips; equal counts "
            "of at least 2 are needed, since the bias of a distance depends on the count"
        )
    if not (reference.isfinite().all() and test.isfinite().all()):
        raise NonFiniteError("embeddings: got NaN or infinity; drop or regenerate those clips")
    return reference.double().cpu(), test.double().cpu()


def _intercept(points: list[tuple[float, float]]) -> float:
    """Value at 0 of the line through (x, y) with the least squares."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points)
    slope /= sum((x - mean_x) ** 2 for x, _ in points)
    return mean_y - slope * mean_x


def _frechet(x: Tensor, y: Tensor) -> float:
    """Squared Frechet distance of two float64 [N, D]."""
    shift = (x.mean(0) - y.mean(0)).square().sum()
    a, b = x - x.mean(0), y - y.mean(0)
    spread = a.square().sum() + b.square().sum()
    if len(x) > x.shape[1]:
        # the same singular values, of [D, D] instead of [N, N]
        a, b = torch.linalg.qr(a, "r").R, torch.linalg.qr(b, "r").R
    cross = torch.linalg.svdvals(a @ b.T).sum()
    return float(shift + (spread - 2.0 * cross) / (len(x) - 1))
