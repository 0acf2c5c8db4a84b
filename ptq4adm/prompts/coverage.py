"""How much of a domain a set of prompts covers, measured twice.

The grid: the share of its cells and of its pairs that some prompt says. The space: how far the
prompts one could ask for (the reference) lie from the nearest prompt in the set, in an encoder's
space: the farthest is the covering radius, and the mean is given beside it. Distances are those of
unit vectors, 0 to 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq4adm.prompts.tagger import Tagger, Tags
from ptq4adm.prompts.taxonomy import Cell, Pair


@dataclass(frozen=True)
class Coverage:
    """What a set of prompts covers.

    Attributes:
        prompts: how many they are.
        cells: share of the grid's cells, 0 to 1.
        pairs: share of the grid's pairs, 0 to 1.
        radius: largest distance of the reference to the set; None without an encoder.
        mean_distance: mean of the same.
    """

    prompts: int
    cells: float
    pairs: float
    radius: float | None = None
    mean_distance: float | None = None


class Grid:
    """The cells and pairs of a domain as bits of one integer a prompt.

    Args:
        tagger: of the domain.
    """

    def __init__(self, tagger: Tagger) -> None:
        self.tagger = tagger
        taxonomy = tagger.taxonomy
        self.cells: tuple[Cell, ...] = taxonomy.cells
        self.pairs: tuple[Pair, ...] = taxonomy.pairs
        items: list[Cell | Pair] = [*self.cells, *self.pairs]
        self._bits: dict[Cell | Pair, int] = {item: 1 << i for i, item in enumerate(items)}
        self._cell_mask = (1 << len(self.cells)) - 1

    @property
    def size(self) -> int:
        """Cells and pairs together."""
        return len(self.cells) + len(self.pairs)

    def bits(self, tags: Tags) -> int:
        """What tags cover; pairs that are not part of the grid have no bit."""
        found = 0
        said: list[Cell | Pair] = [*tags.cells, *self.tagger.pairs(tags)]
        for item in said:
            found |= self._bits.get(item, 0)
        return found

    def shares(self, bits: int) -> tuple[float, float]:
        """Share of cells and of pairs."""
        cells = (bits & self._cell_mask).bit_count()
        pairs = (bits & ~self._cell_mask).bit_count()
        return cells / len(self.cells), pairs / len(self.pairs)

    def missing(self, bits: int) -> list[Cell | Pair]:
        """Cells and pairs that are not covered."""
        return [item for item, bit in self._bits.items() if not bits & bit]


def distances(first: Tensor, second: Tensor) -> Tensor:
    """Euclidean distances between unit vectors [N, D] and [M, D]: float64 [N, M], 0 to 2."""
    return (2.0 - 2.0 * (first @ second.T)).clamp_(0.0, 4.0).sqrt_()


def nearest(reference: Tensor, chosen: Tensor) -> Tensor:
    """Distance of each reference vector [N, D] to the nearest of the chosen [M, D]: [N]."""
    return distances(reference, chosen).min(dim=1).values


def measure(
    tagger: Tagger,
    prompts: Sequence[str],
    *,
    vectors: Tensor | None = None,
    reference: Tensor | None = None,
) -> Coverage:
    """Coverage of a set of prompts.

    Args:
        tagger: of the domain.
        prompts: the set.
        vectors: of the prompts, unit length [N, D]; None measures the grid alone.
        reference: what should be near, unit vectors [M, D].
    """
    grid = Grid(tagger)
    cells, pairs = grid.shares(union(grid.bits(tagger.tag(prompt)) for prompt in prompts))
    if vectors is None or reference is None:
        return Coverage(len(prompts), cells, pairs)
    away = nearest(reference, vectors)
    return Coverage(len(prompts), cells, pairs, float(away.max()), float(away.mean()))


def union(bits: Iterable[int]) -> int:
    """All bits that any holds."""
    found = 0
    for one in bits:
        found |= one
    return found


def whole_costs(away: Tensor, power: int) -> Tensor:
    """Distances to a power, in whole millionths: int64, so that sums do not depend on their order.

    With a high power the far ones count most, and the mean becomes the radius.
    """
    return (away**power * 1e6).round().to(torch.int64)
