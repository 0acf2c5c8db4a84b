"""Distances between two sets of embedded clips, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq4adm.errors import NonFiniteError, ShapeError


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

        d^2 = |m1 - m2|^2 + tr S1 + tr S2 - 2 sum_i sqrt(l_i)                            (1)
        l   = eigenvalues of S1^(1/2) S2 S1^(1/2)

    The product in (1) is symmetric, so its eigenvalues are real also where a covariance is
    singular. Covariances divide by N - 1.

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


def kernel_distance(reference: Tensor, test: Tensor) -> Distance:
    """Unbiased squared maximum mean discrepancy under the cubic polynomial kernel.

        k(a, b) = (a . b / D + 1)^3                                                      (1)
        d = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

    Args:
        reference: floating [N, D].
        test: floating [N, D].

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

    within = 0.0
    for side in (x, y):
        table = kernel(side, side)
        within += float(table.sum() - table.trace()) / (count * (count - 1))
    return Distance(within - 2.0 * float(kernel(x, y).mean()), count)


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


def _frechet(x: Tensor, y: Tensor) -> float:
    """Squared Frechet distance of two float64 [N, D]."""
    first, second = torch.cov(x.T).reshape(x.shape[1], -1), torch.cov(y.T).reshape(y.shape[1], -1)
    values, vectors = torch.linalg.eigh(first)
    # rounding makes zero eigenvalues slightly negative
    root = (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0.0).sqrt().sum()
    shift = (x.mean(0) - y.mean(0)).square().sum()
    return float(shift + first.trace() + second.trace() - 2.0 * cross)
