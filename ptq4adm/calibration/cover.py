"""The activation-aware choice: pairs that cover every layer's range bins, and match the bulk.

For a set S of N pairs, over columns d (layer and guidance half) and their bins b, with n_db of all
M pairs in a bin and c_db(S) of the chosen ones:

    C(S) = sum_{c_db > 0} (1 / n_db)  /  sum_db (1 / n_db)               what is covered, rare first
    D(S) = mean_d ( 1 - 1/2 sum_b | c_db / N - n_db / M | )              how alike the bulk
    F(S) = (1 - w) C(S) + w D(S)                                                            (1)

Each term is a sum of concave functions of the counts, so F is submodular: what a pair adds only
falls as others are chosen, and lazy evaluation gives exactly the plain greedy set. Gains are whole
numbers (units of 2^-44), so the order of the pairs does not matter; ties go to the smaller hash.

This is our reading of "activation-aware calibration set generation", and not the algorithm of the
PTQ4ADM paper, which is not public.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

from ptq4adm.calibration.bins import PairTable
from ptq4adm.errors import ConfigError

_UNIT = float(1 << 44)


class Gains:
    """What a pair adds to F, given what is chosen.

    Args:
        table: all pairs.
        size: N.
        density: w.
    """

    def __init__(self, table: PairTable, size: int, density: float) -> None:
        self.index, self.counts = table.slots()
        self.size, self.pairs = size, table.pairs
        rarity = torch.where(self.counts > 0, 1.0 / self.counts.double().clamp_min(1), 0.0)
        total = float(rarity.sum())
        self.cover = (rarity * (_UNIT * (1 - density) / max(total, 1e-300))).round().long()
        width = (len(self.counts) - 1) // max(1, table.bins.shape[1])
        columns = int((self.counts[:-1].view(-1, width).sum(dim=1) > 0).sum()) if width else 0
        self.match = _UNIT * density / (2.0 * size * self.pairs * max(1, columns))
        self.chosen = torch.zeros_like(self.counts)
        self.slot_gain = self._slot_gains(torch.arange(len(self.counts)))

    def of_all(self) -> Tensor:
        """Gain of every pair, int64 [pairs]."""
        return self.slot_gain[self.index].sum(dim=1)

    def of(self, pair: int) -> int:
        """Gain of one pair."""
        return int(self.slot_gain[self.index[pair]].sum())

    def add(self, pair: int) -> None:
        """Choose a pair."""
        slots = self.index[pair].unique()
        self.chosen[slots] += 1
        self.slot_gain[slots] = self._slot_gains(slots)

    def _slot_gains(self, slots: Tensor) -> Tensor:
        """What one more pair in each of some slots adds to F, int64."""
        c, n = self.chosen[slots], self.counts[slots]
        # |c / N - n / M| in units of 1 / (N M), so that the difference is exact
        before = (c * self.pairs - n * self.size).abs()
        after = ((c + 1) * self.pairs - n * self.size).abs()
        gain = ((before - after).double() * self.match).round().long()
        gain += torch.where(c == 0, self.cover[slots], 0)
        # the last slot is of columns that do not count
        return torch.where(n > 0, gain, 0)


def choose_covering(
    table: PairTable, size: int, ties: Sequence[bytes], *, density: float = 0.5
) -> list[int]:
    """Greedy maximum of (1), lazily.

    Args:
        table: all pairs.
        size: N, 1 .. table.pairs.
        ties: one a pair; of equal gains the smaller is taken.
        density: w in [0, 1].

    Returns:
        Pairs in the order they were chosen.

    Raises:
        ConfigError: if `density` is not in [0, 1].
    """
    if not 0.0 <= density <= 1.0:
        raise ConfigError(f"density: got {density!r}, needs 0 (only cover) to 1 (only match)")
    gains = Gains(table, size, density)
    # (minus gain, tie, pair, size of the set the gain was computed for)
    heap = [(-gain, ties[pair], pair, 0) for pair, gain in enumerate(gains.of_all().tolist())]
    heapq.heapify(heap)
    chosen: list[int] = []
    while len(chosen) < size:
        _, tie, pair, when = heapq.heappop(heap)
        if when == len(chosen):
            gains.add(pair)
            chosen.append(pair)
        else:
            heapq.heappush(heap, (-gains.of(pair), tie, pair, len(chosen)))
    return chosen
