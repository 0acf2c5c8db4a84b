"""Histograms and the scales derived from them, against the values themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ptq4adm.errors import CalibrationError, ConfigError, NonFiniteError
from ptq4adm.quant.observers import (
    BINS,
    HistogramObserver,
    HistogramRecord,
    _expected_errors,
    scale_table,
)

# one bin of the widest kind, in units of the largest magnitude: 2 / BINS
BIN = 2.0 / BINS


def _observe(*inputs: Tensor, buckets: int = 1) -> HistogramObserver:
    observer = HistogramObserver(buckets)
    for x in inputs:
        observer.observe(x, 0)
    return observer


def _equal(a: HistogramRecord, b: HistogramRecord) -> bool:
    return all(
        torch.equal(getattr(a, n), getattr(b, n))
        for n in ("counts", "exponent", "minimum", "maximum")
    )


def test_every_value_is_counted_in_its_bin() -> None:
    x = torch.tensor([0.0, 0.5, -0.5, 0.999, 0.25])
    record = _observe(x).record()
    assert int(record.exponent[0]) == 0
    expected = torch.zeros(BINS, dtype=torch.int64)
    for value in x.abs():
        expected[int(value * BINS)] += 1
    assert torch.equal(record.counts[0], expected)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_order_of_inputs_changes_nothing(order: tuple[int, ...]) -> None:
    inputs = [torch.randn(1000) * 1e-3, torch.randn(1000) * 10, torch.randn(1000) * 1e6]
    assert _equal(_observe(*inputs).record(), _observe(*(inputs[i] for i in order)).record())


def test_growing_the_range_loses_no_count() -> None:
    observer = HistogramObserver(1)
    for power in range(-30, 31, 3):
        observer.observe(torch.rand(100) * 2.0**power, 0)
    assert int(observer.counts.sum()) == 21 * 100


def test_signed_extremes_are_kept() -> None:
    record = _observe(torch.tensor([-0.278, 3.0]), torch.tensor([-0.1, 5.0])).record()
    assert record.minimum[0] == pytest.approx(-0.278)
    assert float(record.maximum[0]) == 5.0
    assert float(record.absmax()[0]) == 5.0


def test_float16_and_empty_inputs_are_taken() -> None:
    x = torch.randn(64)
    assert _equal(_observe(x.half(), torch.empty(0)).record(), _observe(x.half().float()).record())


def test_an_observer_goes_on_from_its_record() -> None:
    a, b = torch.randn(500), torch.randn(500) * 7
    resumed = HistogramObserver.from_record(_observe(a).record())
    resumed.observe(b, 0)
    assert _equal(resumed.record(), _observe(a, b).record())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 2.0**127])
def test_values_that_are_not_finite_are_refused_and_not_counted(value: float) -> None:
    observer = HistogramObserver(1)
    with pytest.raises(NonFiniteError, match=r"shape \[2, 2\]"):
        observer.observe(torch.tensor([[1.0, value], [0.0, 2.0]]), 0)
    assert int(observer.counts.sum()) == 0


def test_absmax_scale_is_exact() -> None:
    x = torch.randn(1000)
    assert torch.equal(scale_table(_observe(x).record(), "absmax")[0], x.abs().max() / 127)


@pytest.mark.parametrize("percentile", [50.0, 99.0, 99.9])
def test_percentile_is_within_a_bin_of_the_true_one(percentile: float) -> None:
    x = torch.randn(200_000)
    clip = float(scale_table(_observe(x).record(), "percentile", percentile)[0]) * 127
    true = float(x.abs().quantile(percentile / 100, interpolation="linear"))
    assert abs(clip - true) <= 1.5 * BIN * float(x.abs().max())


def test_the_100th_percentile_is_the_largest_value() -> None:
    x = torch.randn(1000)
    record = _observe(x).record()
    torch.testing.assert_close(
        scale_table(record, "percentile", 100.0), scale_table(record, "absmax")
    )


def _true_error(x: Tensor, scale: float, power: float = 2.0) -> float:
    x = x.double()
    return float(((x / scale).round().clamp(-127, 127) * scale - x).abs().pow(power).sum())


@pytest.mark.parametrize(
    "kind", ["gaussian", "laplace", "outlier", "silu", "uniform", "constant", "sparse"]
)
@pytest.mark.parametrize(("observer", "power"), [("squared_error", 2.0), ("p2.4", 2.4)])
def test_a_searched_clip_is_as_good_as_the_best_clip_for_the_values(
    kind: str, observer: str, power: float
) -> None:
    x = torch.randn(50_000)
    if kind == "laplace":
        x = torch.distributions.Laplace(0.0, 1.0).sample((50_000,))
    elif kind == "outlier":
        x[17] = 300.0
    elif kind == "silu":
        x = torch.nn.functional.silu(x)
    elif kind == "uniform":
        x = torch.rand(50_000)
    elif kind == "constant":
        x = torch.full((1000,), 0.75)
    elif kind == "sparse":
        x = x * (torch.rand(50_000) > 0.9)
    scale = float(scale_table(_observe(x).record(), observer)[0])
    absmax = float(x.abs().max())
    best = min(_true_error(x, absmax * i / 100 / 127, power) for i in range(1, 101))
    assert _true_error(x, scale, power) <= 1.04 * best + 1e-9


@pytest.mark.parametrize("power", [1.0, 2.0, 2.4, 3.0])
@pytest.mark.parametrize("clip", [0.004, 0.37, 1.0, 1.9])
def test_the_expected_error_is_the_integral_over_the_bins(power: float, clip: float) -> None:
    counts = torch.randint(0, 50, (BINS,))
    counts[700:] = 0
    edges = torch.linspace(0, 2, BINS + 1, dtype=torch.float64)
    # midpoints of 400 parts of each bin stand for values spread evenly over it
    parts = 400
    x = edges[:-1, None] + (torch.arange(parts) + 0.5) / parts * (2 / BINS)
    step = clip / 127
    error = ((x / step).round().clamp_max(127) * step - x).abs().pow(power)
    expected = (counts * error.mean(dim=1)).sum()
    found = _expected_errors(counts, edges, torch.tensor([clip], dtype=torch.float64), power)
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=0)


def test_a_higher_power_clips_less() -> None:
    x = torch.randn(50_000)
    record = _observe(x).record()
    squared, higher = scale_table(record, "squared_error"), scale_table(record, "p2.4")
    assert squared[0] < higher[0] < scale_table(record, "absmax")[0]


def test_squared_error_keeps_an_outlier_only_if_it_pays() -> None:
    x = torch.randn(50_000)
    x[0] = 8.0
    record = _observe(x).record()
    searched, absmax = scale_table(record, "squared_error"), scale_table(record, "absmax")
    assert searched[0] < absmax[0]


def test_a_bucket_without_records_takes_its_nearest_neighbours_scale() -> None:
    observer = HistogramObserver(5)
    observer.observe(torch.tensor([1.0]), 1)
    observer.observe(torch.tensor([8.0]), 4)
    record = observer.record()
    assert record.seen.tolist() == [False, True, False, False, True]
    table = scale_table(record, "absmax") * 127
    torch.testing.assert_close(table, torch.tensor([1.0, 1.0, 1.0, 8.0, 8.0]))


def test_an_input_of_zeros_has_a_usable_scale() -> None:
    record = _observe(torch.zeros(100)).record()
    for observer in ("absmax", "percentile", "squared_error", "p2.4"):
        scale = scale_table(record, observer)
        assert torch.isfinite(scale).all()
        assert (scale > 0).all()


def test_nothing_recorded_and_unknown_observers_are_refused() -> None:
    with pytest.raises(CalibrationError, match="no activation was recorded"):
        scale_table(HistogramObserver(3).record(), "absmax")
    with pytest.raises(ConfigError, match="'entropy'"):
        scale_table(_observe(torch.ones(3)).record(), "entropy")
