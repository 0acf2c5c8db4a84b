"""Figures of class outputs: what a tagger hears in both sets of clips. In float64.

Logits are those of independent classes. The softmax over them is what papers on text to audio take
for the divergence and the score, also of taggers whose classes do not exclude each other.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ptq4adm.errors import NonFiniteError, RangeError, ShapeError


def kl_softmax(reference: Tensor, test: Tensor) -> Tensor:
    """Divergence of paired clips under the softmax.

        KL[b] = sum_c p[b, c] ln(p[b, c] / q[b, c]),   p, q = softmax of reference, test      (1)

    Args:
        reference: logits, floating [B, C].
        test: the same shape; row b is the same prompt.

    Returns:
        float64 [B], in nats; 0 where both are equal.

    Raises:
        ShapeError: if the shapes differ.
        NonFiniteError: if a logit is not finite.
    """
    x, y = _checked(reference, test)
    p, q = functional.log_softmax(x, 1), functional.log_softmax(y, 1)
    return (p.exp() * (p - q)).sum(1)


def kl_sigmoid(reference: Tensor, test: Tensor) -> Tensor:
    """Divergence of paired clips with every class on its own.

        KL[b] = sum_c p ln(p / q) + (1 - p) ln((1 - p) / (1 - q)),   p, q = sigmoid          (1)

    The common toolkit leaves the second term out, which makes its figure another one.

    Args:
        reference: logits, floating [B, C].
        test: the same shape; row b is the same prompt.

    Returns:
        float64 [B], in nats; 0 where both are equal.

    Raises:
        ShapeError: if the shapes differ.
        NonFiniteError: if a logit is not finite.
    """
    x, y = _checked(reference, test)
    yes = x.sigmoid() * (functional.logsigmoid(x) - functional.logsigmoid(y))
    no = (-x).sigmoid() * (functional.logsigmoid(-x) - functional.logsigmoid(-y))
    return (yes + no).sum(1)


def inception_score(logits: Tensor, *, splits: int = 10, seed: int = 0) -> float:
    """Inception score of one set, averaged over splits.

        IS = exp( mean_b sum_c p[b, c] ln(p[b, c] / mean_b p[b, c]) ),   p = softmax          (1)

    Args:
        logits: floating [N, C].
        splits: parts of (almost) equal size, in a random order of the clips; the score of each
            is computed, and their mean taken.
        seed: of the order.

    Returns:
        1 to C; it depends on the clips of a split, so compare equal counts only.

    Raises:
        ShapeError: if logits is not two-dimensional.
        RangeError: if a split would hold fewer than two clips.
        NonFiniteError: if a logit is not finite.
    """
    x, _ = _checked(logits, logits)
    if not 1 <= splits <= len(x) // 2:
        raise RangeError(
            f"splits = {splits} of {len(x)} clips: expected 1 to {len(x) // 2}, so that each holds "
            "two clips"
        )
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    scores = []
    for part in functional.log_softmax(x[order], 1).tensor_split(splits):
        mean = part.logsumexp(0) - torch.log(torch.tensor(float(len(part)), dtype=torch.float64))
        scores.append(float((part.exp() * (part - mean)).sum(1).mean().exp()))
    return sum(scores) / splits


def _checked(reference: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    if reference.shape != test.shape or reference.dim() != 2 or not len(reference):
        raise ShapeError(
            f"logits: expected two [B, C] of one shape, got {tuple(reference.shape)} and "
            f"{tuple(test.shape)}"
        )
    if not (reference.isfinite().all() and test.isfinite().all()):
        raise NonFiniteError("logits: got NaN or infinity; drop or regenerate those clips")
    return reference.double().cpu(), test.double().cpu()
