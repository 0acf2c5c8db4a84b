"""Random weights for names and shapes of a checkpoint, scaled so that a deep model stays tame."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def random_weights(
    shapes: Mapping[str, tuple[int, ...]], seed: int, prefix: str = ""
) -> dict[str, Tensor]:
    """One tensor a name: norms about 1, matrices of unit gain, small biases; float32.

    Args:
        shapes: name to shape.
        seed: of all of them.
        prefix: goes before every name.
    """
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            values *= 1 / math.sqrt(math.prod(shape[1:]))
        elif name.endswith(".weight"):
            values = 1 + 0.1 * values
        else:
            values *= 0.1
        found[prefix + name] = values
    return found
