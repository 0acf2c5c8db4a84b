"""Histograms of activation magnitudes, and the scales that follow from them.

One pass of calibration fills a `HistogramObserver` for every layer; absmax, percentile and
least-error scales are all derived from it afterwards, so changing the observer needs no second
pass.

Bins cover [0, 2**exponent) evenly. When a larger value arrives the exponent grows and neighbouring
bins are added, which is exact: the result does not depend on the order of the batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq4adm.errors import CalibrationError, ConfigError, NonFiniteError
from ptq4adm.quant.affine import ERROR_POWERS

# the top bin edge is less than twice the largest value, so an int8 step spans at least four bins
BINS = 1024
QMAX = 127
SMALLEST_ABSMAX = 1e-8
# 2**-100: a range for inputs that are zero throughout; widths stay normal float32 numbers
_MIN_EXPONENT = -100
_MAX_EXPONENT = 127
# torch.histc counts in float32, exact up to 2**24
_COUNT_CHUNK = 1 << 24
_CLIP_CANDIDATES = 100


@dataclass(frozen=True)
class HistogramRecord:
    """What was seen of one input, for each of T timestep buckets.

    Attributes:
        counts: int64 [T, BINS] of magnitudes.
        exponent: int64 [T]; the bins of bucket t cover [0, 2**exponent[t]).
        minimum: float32 [T], the smallest signed value; +inf where nothing was seen.
        maximum: float32 [T], the largest; -inf where nothing was seen.
    """

    counts: Tensor
    exponent: Tensor
    minimum: Tensor
    maximum: Tensor

    @property
    def seen(self) -> Tensor:
        """Buckets with records, bool [T]."""
        return self.counts.sum(dim=1) > 0

    def absmax(self) -> Tensor:
        """Largest magnitude, float32 [T]; 0 where nothing was seen."""
        largest = torch.maximum(self.minimum.abs(), self.maximum.abs())
        return torch.where(self.seen, largest, 0.0)


class HistogramObserver:
    """Streams inputs into histograms, one for each timestep bucket.

    Args:
        buckets: number of buckets T.
    """

    def __init__(self, buckets: int) -> None:
        self.counts = torch.zeros(buckets, BINS, dtype=torch.int64)
        self.exponent = torch.full((buckets,), _MIN_EXPONENT, dtype=torch.int64)
        self.minimum = torch.full((buckets,), torch.inf)
        self.maximum = torch.full((buckets,), -torch.inf)

    @classmethod
    def from_record(cls, record: HistogramRecord) -> HistogramObserver:
        """An observer that goes on where `record` ended."""
        observer = cls(record.counts.shape[0])
        observer.counts = record.counts.clone()
        observer.exponent = record.exponent.clone()
        observer.minimum = record.minimum.clone()
        observer.maximum = record.maximum.clone()
        return observer

    def observe(self, x: Tensor, bucket: int) -> None:
        """Add one input to a bucket.

        Args:
            x: float, any shape.
            bucket: 0 .. T - 1.

        Raises:
            NonFiniteError: if `x` holds NaN or infinite values, or magnitudes of 2**127 and more.
        """
        if x.numel() == 0:
            return
        x = x.detach()
        low, high = (float(v) for v in torch.aminmax(x))
        absmax = max(abs(low), abs(high))
        # NaN fails the comparison too
        if not (math.isfinite(low) and math.isfinite(high) and absmax < 2.0**_MAX_EXPONENT):
            raise NonFiniteError(
                f"activation of shape {list(x.shape)} holds NaN or infinite values"
            )
        # frexp: absmax = m * 2**e with m < 1, so every magnitude is below 2**e
        self._grow(bucket, max(math.frexp(absmax)[1], _MIN_EXPONENT))
        top = 2.0 ** int(self.exponent[bucket])
        for part in x.reshape(-1).split(_COUNT_CHUNK):
            counts = torch.histc(part.to(torch.float32).abs(), bins=BINS, min=0.0, max=top)
            self.counts[bucket] += counts.to(device="cpu", dtype=torch.int64)
        self.minimum[bucket] = min(low, float(self.minimum[bucket]))
        self.maximum[bucket] = max(high, float(self.maximum[bucket]))

    def add(self, record: HistogramRecord) -> None:
        """Add what another observer of as many buckets saw; exact, and in any order the same."""
        other = HistogramObserver.from_record(record)
        for bucket in range(len(self.exponent)):
            top = max(int(self.exponent[bucket]), int(other.exponent[bucket]))
            self._grow(bucket, top)
            other._grow(bucket, top)
        self.counts += other.counts
        self.minimum = torch.minimum(self.minimum, other.minimum)
        self.maximum = torch.maximum(self.maximum, other.maximum)

    def record(self) -> HistogramRecord:
        """A copy of what was seen so far."""
        return HistogramRecord(
            self.counts.clone(), self.exponent.clone(), self.minimum.clone(), self.maximum.clone()
        )

    def _grow(self, bucket: int, exponent: int) -> None:
        """Widen a bucket's range to 2**exponent, adding neighbouring bins."""
        shift = exponent - int(self.exponent[bucket])
        if shift <= 0:
            return
        counts = self.counts[bucket]
        grown = torch.zeros_like(counts)
        # beyond 2**10 everything seen so far falls into the first bin
        merged = counts.view(-1, 1 << min(shift, BINS.bit_length() - 1)).sum(dim=1)
        grown[: merged.numel()] = merged
        self.counts[bucket] = grown
        self.exponent[bucket] = exponent


def scale_table(record: HistogramRecord, observer: str, percentile: float = 99.999) -> Tensor:
    """Activation scale of every bucket.

    Args:
        record: histograms of T buckets, at least one of them seen.
        observer: "absmax" clips nothing that was seen; "percentile" keeps that share of magnitudes;
            "squared_error" takes the clip with the least expected rounding plus clipping error, and
            "p2.4" the one with the least |error|^2.4, which clips less (Q-Diffusion's).
        percentile: in percent, for "percentile".

    Returns:
        float32 [T] above 0. A bucket without records takes the scale of the nearest bucket that has
        some: it is refused on the host before it is used, and this value is what a device that
        cannot ask reads.

    Raises:
        ConfigError: for an unknown observer.
        CalibrationError: if no bucket was seen.
    """
    seen = record.seen
    if not bool(seen.any()):
        raise CalibrationError("no activation was recorded in any timestep bucket; calibrate again")
    if observer == "absmax":
        clips = record.absmax().to(torch.float64)
    elif observer == "percentile":
        clips = _percentile_clips(record, percentile)
    elif observer in ERROR_POWERS:
        clips = _least_error_clips(record, ERROR_POWERS[observer])
    else:
        raise ConfigError(
            f"activation observer: got {observer!r}, needs 'absmax', 'percentile', "
            f"{' or '.join(repr(name) for name in ERROR_POWERS)}"
        )
    scales = (clips.clamp_min(SMALLEST_ABSMAX) / QMAX).to(torch.float32)
    known = torch.nonzero(seen).flatten()  # [seen buckets]
    nearest = (torch.arange(len(seen))[:, None] - known[None, :]).abs().argmin(dim=1)
    return scales[known[nearest]]


def _percentile_clips(record: HistogramRecord, percentile: float) -> Tensor:
    """Magnitude below which `percentile` of the values lie, float64 [T]; linear within a bin."""
    counts = record.counts.to(torch.float64)
    reached = counts.cumsum(dim=1)
    wanted = counts.sum(dim=1, keepdim=True) * (percentile / 100.0)
    index = torch.searchsorted(reached, wanted).clamp_max(BINS - 1)  # [T, 1]
    inside = counts.gather(1, index).clamp_min(1.0)
    below = reached.gather(1, index) - counts.gather(1, index)
    position = index + ((wanted - below) / inside).clamp(0.0, 1.0)
    widths = torch.exp2(record.exponent.to(torch.float64)) / BINS
    return torch.minimum(position[:, 0] * widths, record.absmax().to(torch.float64))


def _least_error_clips(record: HistogramRecord, power: float) -> Tensor:
    """Clip with the least expected |error|^power, float64 [T]: of 100 up to the largest value."""
    ratios = torch.linspace(1.0 / _CLIP_CANDIDATES, 1.0, _CLIP_CANDIDATES, dtype=torch.float64)
    clips = record.absmax().to(torch.float64).clamp_min(SMALLEST_ABSMAX)
    for bucket in range(record.counts.shape[0]):
        if not bool(record.counts[bucket].any()):
            continue
        candidates = clips[bucket] * ratios  # [C]
        top = 2.0 ** int(record.exponent[bucket])
        edges = torch.linspace(0.0, top, BINS + 1, dtype=torch.float64)
        error = _expected_errors(record.counts[bucket], edges, candidates, power)
        clips[bucket] = candidates[error.argmin()]
    return clips


def _expected_errors(counts: Tensor, edges: Tensor, clips: Tensor, power: float) -> Tensor:
    """Sum of |error|^p for each clip, if values are spread evenly within their bins.

    With step d = clip / 127 and P an antiderivative of |e(x)|^p, a bin [a, b) of n values adds n *
    (P(b) - P(a)) / (b - a). Below the clip e is the rounding sawtooth, one period of which adds
    2 (d / 2)^(p + 1) / (p + 1); above it e is x - clip.

    Args:
        counts: int64 [BINS].
        edges: float64 [BINS + 1].
        clips: float64 [C], above 0.
        power: p, above 0.

    Returns:
        float64 [C].
    """
    step = (clips / QMAX)[:, None]  # [C, 1]
    inside = torch.minimum(edges[None, :], clips[:, None])  # [C, BINS + 1]
    periods = (inside / step).round()
    rest = inside - periods * step
    over = (edges[None, :] - clips[:, None]).clamp_min(0.0)
    raised = power + 1
    partial = rest.sign() * rest.abs() ** raised + over**raised
    antiderivative = (periods * (2 * (step / 2) ** raised) + partial) / raised
    density = counts / (edges[1:] - edges[:-1])
    return antiderivative.diff(dim=1) @ density
