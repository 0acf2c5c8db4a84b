"""Greedy choice of candidates by what they add to both coverages.

    F(S) = w G(S) + (1 - w) D(S)                                                       (1)

G is the share of the cells and pairs the seeds left uncovered that S covers, D the share of the
reference's distance to the seeds (to a power) that S takes away. Both are monotone and submodular,
so the greedy set is within 1 - 1/e of the best, and a gain computed earlier bounds the gain of now:
lazy greedy looks again only at candidates whose bound leads.

Gains are whole numbers: a tie is a tie, the lower index wins it, and the lazy choice is the plain
one, whatever the order of sums.

Source: lazy evaluation of submodular gains is Minoux's (1978).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq4adm.prompts.coverage import Coverage, Grid, distances, union, whole_costs

_WEIGHT_STEPS = 1000  # weights are whole thousandths


@dataclass(frozen=True)
class Candidates:
    """What can be chosen.

    Attributes:
        grid: the domain's grid.
        bits: what each covers of it.
        vectors: unit vectors float64 [N, D]; None for the grid alone.
    """

    grid: Grid
    bits: Sequence[int]
    vectors: Tensor | None = None

    def measure(self, chosen: Sequence[int]) -> Coverage:
        """Coverage of some of them; all of them are the reference."""
        cells, pairs = self.grid.shares(union(self.bits[i] for i in chosen))
        if self.vectors is None:
            return Coverage(len(chosen), cells, pairs)
        away = distances(self.vectors, self.vectors[list(chosen)]).min(dim=1).values
        return Coverage(len(chosen), cells, pairs, float(away.max()), float(away.mean()))


class Greedy:
    """The set that grows.

    Args:
        candidates: what can be chosen.
        chosen: indices of the seeds; at least one.
        grid_weight: w of equation (1).
        power: of distances in D.
    """

    def __init__(
        self, candidates: Candidates, chosen: Sequence[int], *, grid_weight: float, power: int
    ) -> None:
        self.candidates = candidates
        self.chosen = list(chosen)
        self._power = power
        self._covered = union(candidates.bits[i] for i in chosen)
        missing = len(candidates.grid.missing(self._covered))
        self._weight = _WEIGHT_STEPS
        self._distances = torch.zeros(0, 0, dtype=torch.float64)  # [candidate, reference]
        self._costs = self._cost = torch.zeros(0, 0, dtype=torch.int64)
        self._away = torch.zeros(0, dtype=torch.float64)
        if candidates.vectors is not None:
            self._weight = round(_WEIGHT_STEPS * grid_weight)
            self._distances = distances(candidates.vectors, candidates.vectors)
            self._costs = whole_costs(self._distances, power)
            self._away = self._distances[self.chosen].min(dim=0).values
            self._cost = whole_costs(self._away, power)
        # a coverage that has nothing to gain gets 1: its gains are zero anyway
        self._missing, self._whole_cost = missing or 1, int(self._cost.sum()) or 1
        self._unit = _WEIGHT_STEPS * self._missing * self._whole_cost

    def coverage(self) -> Coverage:
        """Of the set as it is."""
        cells, pairs = self.candidates.grid.shares(self._covered)
        if self.candidates.vectors is None:
            return Coverage(len(self.chosen), cells, pairs)
        radius, mean = float(self._away.max()), float(self._away.mean())
        return Coverage(len(self.chosen), cells, pairs, radius, mean)

    def gain(self, index: int) -> int:
        """What a candidate adds to F, in whole parts of `as_share`'s unit."""
        grid = (self.candidates.bits[index] & ~self._covered).bit_count()
        found = self._weight * grid * self._whole_cost
        if self.candidates.vectors is not None and self._weight < _WEIGHT_STEPS:
            taken = int((self._cost - self._costs[index]).clamp_(min=0).sum())
            found += (_WEIGHT_STEPS - self._weight) * taken * self._missing
        return found

    def as_share(self, gain: int) -> float:
        """A gain as a share, 0 to 1."""
        return gain / self._unit

    def add(self, index: int) -> None:
        """Take a candidate into the set."""
        self.chosen.append(index)
        self._covered |= self.candidates.bits[index]
        if self.candidates.vectors is not None:
            self._away = torch.minimum(self._away, self._distances[index])
            self._cost = whole_costs(self._away, self._power)

    def best_first(self) -> Iterator[tuple[int, int]]:
        """The best candidate and its gain, again and again; the caller adds it, or passes it over.

        A candidate that was given is not given again.
        """
        taken = set(self.chosen)
        bounds = [(-self.gain(i), i) for i in range(len(self.candidates.bits)) if i not in taken]
        heapq.heapify(bounds)
        size = {index: len(self.chosen) for _, index in bounds}
        while bounds:
            negative, index = bounds[0]
            if size[index] == len(self.chosen):
                heapq.heappop(bounds)
                yield index, -negative
                continue
            size[index] = len(self.chosen)
            heapq.heapreplace(bounds, (-self.gain(index), index))
