"""Signatures as bins: every (prompt, step) pair falls into one range bin of every site.

Range r of a site (the absmax of its input, unless told otherwise) of pair i, with lo and hi the
least and greatest range above 0 that any pair of the same stratum showed:

    bin(r) = floor( n log(r / lo) / log(hi / lo) ),    in 0 .. n - 1                        (1)

A range of 0 falls into bin 0. A *column* is a site and guidance half. Owns the table that all
strategies choose from, and what a choice covers of it. Of the signatures bins alone stay in memory,
one int16 a pair and column; a choice needs an int64 of each beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ptq4adm.calibration.signatures import STATISTICS, SignatureMeta, Signatures
from ptq4adm.errors import CalibrationError, ConfigError

BINS = 16
_NAMED = 5


@dataclass(frozen=True)
class PairTable:
    """All (prompt, step) pairs; pair i is prompt i // S, step i % S.

    Attributes:
        keys: one a prompt; what random choices and ties are made by, so that the order of the
            prompts does not matter.
        timesteps: of every step, float64 [S].
        num_train_timesteps: range of the timesteps.
        bins: int16 [P * S, D] over D columns, numbered through the strata; -1 where a layer did not
            run.
        strata: int64 [S]; steps of one stratum share a timestep bucket.
        features: of the model's middle at every step, float32 [S, F]; [S, 0] if there are none.
        warnings: of layers that never ran, or whose range never changed.
    """

    keys: tuple[str, ...]
    timesteps: Tensor
    num_train_timesteps: int
    bins: Tensor
    strata: Tensor
    features: Tensor
    warnings: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.bins.shape[0] != len(self.keys) * self.steps or not len(self.bins):
            raise CalibrationError(
                f"bins: got {self.bins.shape[0]} pairs for {len(self.keys)} prompts of "
                f"{self.steps} steps"
            )

    @property
    def steps(self) -> int:
        """S."""
        return len(self.timesteps)

    @property
    def pairs(self) -> int:
        """P * S."""
        return len(self.keys) * self.steps

    def slots(self) -> tuple[Tensor, Tensor]:
        """Bins of all columns in one row.

        A column with one occupied bin says nothing about a choice: its slots count for none.

        Returns:
            index: int64 [pairs, D]; the last slot is of what does not count.
            counts: int64 [slots], pairs in each; 0 in the last.
        """
        width = int(self.bins.max()) + 1 if self.bins.numel() else 0
        columns = self.bins.shape[1]
        index = self.bins.to(torch.int64)
        place = index + torch.arange(columns) * width
        counts = torch.zeros(columns * width + 1, dtype=torch.int64)
        counts.scatter_add_(0, place[index >= 0], torch.ones(int((index >= 0).sum())).long())
        occupied = (counts[:-1].view(columns, width) > 0).sum(dim=1)
        used = (index >= 0) & (occupied > 1)[None, :]
        place = torch.where(used, place, columns * width)
        counts[:-1].view(columns, width)[occupied <= 1] = 0
        return place, counts


@dataclass(frozen=True)
class Cover:
    """What a choice of pairs covers.

    Attributes:
        curve: share of the occupied bins covered after 1, 2, ... pairs.
        distance: mean over columns of half the L1 distance between the histograms of the chosen
            and of all pairs: 0 is alike, 1 has nothing in common.
    """

    curve: tuple[float, ...]
    distance: float


def measure_cover(table: PairTable, pairs: Sequence[int]) -> Cover:
    """What pairs, in this order, cover of a table."""
    index, counts = table.slots()
    total = int((counts > 0).sum())
    if not total:
        return Cover((1.0,) * len(pairs), 0.0)
    chosen = index[torch.tensor(list(pairs), dtype=torch.int64)]  # [N, D]
    seen, found, curve = torch.zeros_like(counts), 0, []
    for row in chosen:
        row = row[row < len(counts) - 1]
        found += int((seen[row] == 0).sum())
        seen[row] += 1
        curve.append(found / total)
    width = (len(counts) - 1) // table.bins.shape[1]
    columns = counts[:-1].view(-1, width).double()
    of_all = columns / columns.sum(dim=1, keepdim=True).clamp_min(1)
    of_chosen = seen[:-1].view(-1, width).double()
    of_chosen = of_chosen / of_chosen.sum(dim=1, keepdim=True).clamp_min(1)
    used = columns.sum(dim=1) > 0
    distance = (of_all - of_chosen).abs().sum(dim=1)[used].mean() / 2
    return Cover(tuple(curve), float(distance))


def bin_signatures(
    signatures: Signatures,
    strata: Tensor,
    *,
    statistic: str = "absmax",
    bins: int = BINS,
    by_stratum: bool = True,
) -> PairTable:
    """Read signatures twice, for the ranges and for the bins; two shards at most are in memory.

    Args:
        signatures: all prompts recorded.
        strata: int64 [S], the timestep bucket of every step.
        statistic: which one is a site's range: "absmax", "p999" or "rms".
        bins: n of (1).
        by_stratum: whether every stratum has its own lo, hi and bins, as it has its own scales.

    Raises:
        ConfigError: if the statistic is unknown or bins is below 2.
        CalibrationError: if signatures are missing, or no layer ran.
    """
    meta = signatures.meta
    if statistic not in ("absmax", "p999", "rms"):
        raise ConfigError(f"statistic: got {statistic!r}, needs 'absmax', 'p999' or 'rms'")
    if bins < 2 or bins * (int(strata.max()) + 1) > torch.iinfo(torch.int16).max:
        raise ConfigError(f"bins: got {bins}, needs 2 to {32767 // (int(strata.max()) + 1)}")
    if signatures.done != len(meta.prompt_keys):
        raise CalibrationError(
            f"{signatures.folder}: {signatures.done} of {len(meta.prompt_keys)} prompts are "
            "recorded; record the rest"
        )
    which = STATISTICS.index(statistic)
    groups = strata if by_stratum else torch.zeros_like(strata)
    columns = len(meta.sites) * meta.halves
    low, high = _extremes(signatures, groups, which, columns)
    table = torch.empty(len(meta.prompt_keys), meta.steps, columns, dtype=torch.int16)
    for start, values in signatures.blocks():
        ranges = values[..., which].flatten(2)  # [B, S, D]
        found = log_bins(ranges, low[groups], high[groups], bins)
        found = torch.where(found < 0, found, found + groups[None, :, None] * bins)
        table[start : start + len(values)] = found.to(torch.int16)
    return PairTable(
        keys=meta.prompt_keys,
        timesteps=signatures.timesteps,
        num_train_timesteps=meta.num_train_timesteps,
        bins=table.flatten(0, 1),
        strata=strata,
        features=signatures.features,
        warnings=_warnings(meta, low, high),
    )


def log_bins(ranges: Tensor, low: Tensor, high: Tensor, bins: int) -> Tensor:
    """Equation (1).

    Args:
        ranges: float [..., D], at least 0, or NaN where a layer did not run.
        low: least range above 0, float64 [..., D]; +inf where there is none.
        high: greatest, float64 [..., D]; -inf where there is none.
        bins: n.

    Returns:
        int64 [..., D], 0 .. n - 1; -1 where a layer did not run.
    """
    ranges = ranges.double()
    span = torch.log(high) - torch.log(low)
    # NaN where nothing above 0 was seen (inf - inf): bin 0, as where all ranges are one
    place = torch.where(span > 0, (torch.log(ranges) - torch.log(low)) / span * bins, 0.0)
    place = place.nan_to_num(0.0, bins - 1, 0.0).floor().clamp(0, bins - 1).to(torch.int64)
    return torch.where(torch.isnan(ranges), -1, place)


def _extremes(
    signatures: Signatures, groups: Tensor, which: int, columns: int
) -> tuple[Tensor, Tensor]:
    """Least range above 0, and greatest, of every group of steps and column: float64 [G, D]."""
    count = int(groups.max()) + 1
    low = torch.full((count, columns), torch.inf, dtype=torch.float64)
    high = torch.full((count, columns), -torch.inf, dtype=torch.float64)
    for _, values in signatures.blocks():
        ranges = values[..., which].flatten(2).double()
        least = torch.where(ranges > 0, ranges, torch.inf).amin(dim=0)
        most = ranges.nan_to_num(-torch.inf).amax(dim=0)
        for step, group in enumerate(groups.tolist()):
            low[group] = torch.minimum(low[group], least[step])
            high[group] = torch.maximum(high[group], most[step])
    if bool((high == -torch.inf).all()):
        raise CalibrationError("signatures: no layer ever ran; record with another sampler")
    return low, high


def _warnings(meta: SignatureMeta, low: Tensor, high: Tensor) -> tuple[str, ...]:
    """What to say of layers that a choice can say nothing about."""
    lowest = low.amin(dim=0).view(-1, meta.halves)
    highest = high.amax(dim=0).view(-1, meta.halves)
    never = (highest == -torch.inf).all(dim=1)
    # the least range above 0 is +inf where all are 0
    constant = ~never & ((lowest >= highest) | (highest == -torch.inf)).all(dim=1)
    found = []
    for mask, text in (
        (never, "never ran: activations of these layers are measured at run time"),
        (constant, "had one range throughout, and say nothing of what to choose"),
    ):
        names = [name for name, hit in zip(meta.sites, mask.tolist(), strict=True) if hit]
        if names:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            found.append(f"{', '.join(names[:_NAMED])}{more} {text}")
    return tuple(found)
