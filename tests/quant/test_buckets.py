"""Timesteps to buckets, and how a timestep is read from a call."""

from __future__ import annotations

import pytest
import torch

from ptq4adm.errors import ConfigError, MixedTimestepError, ShapeError, UncalibratedStepError
from ptq4adm.quant.buckets import TimestepBuckets, find_timestep, single_timestep


@pytest.mark.parametrize(("total", "count"), [(1000, 10), (1000, 7), (10, 10), (5, 1)])
def test_buckets_are_contiguous_and_all_used(total: int, count: int) -> None:
    buckets = TimestepBuckets(total, (True,) * count)
    found = [buckets.bucket_of(t) for t in range(total)]
    assert found == sorted(found)
    assert set(found) == set(range(count))
    sizes = [found.count(i) for i in range(count)]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("timestep", [-1, 1000, float("nan"), float("inf")])
def test_a_timestep_outside_the_training_range_is_refused(timestep: float) -> None:
    with pytest.raises(UncalibratedStepError, match=r"outside 0 \.\. 999"):
        TimestepBuckets(1000, (True,)).check(timestep)


def test_a_bucket_without_records_is_refused_with_what_was_recorded() -> None:
    buckets = TimestepBuckets(1000, (True, False, True, True))
    assert buckets.check(249) == 0
    with pytest.raises(
        UncalibratedStepError, match=r"250\.\.499.*recorded: 0\.\.249, 500\.\.749, 750\.\.999"
    ):
        buckets.check(300)


def test_more_buckets_than_timesteps_are_refused() -> None:
    with pytest.raises(ConfigError, match="got 11 over 10"):
        TimestepBuckets(10, (True,) * 11)
    with pytest.raises(ConfigError, match="got 0"):
        TimestepBuckets(10, ())


def test_the_timestep_is_found_by_position_and_by_keyword() -> None:
    x = torch.zeros(1)
    assert find_timestep((x, 7), {}) == 7
    assert find_timestep((x,), {"timestep": 8}) == 8
    assert find_timestep((), {"sample": x, "timesteps": 9}) == 9
    with pytest.raises(ShapeError, match="without a timestep"):
        find_timestep((x,), {})


@pytest.mark.parametrize(
    "timestep", [5, 5.0, torch.tensor(5), torch.tensor([5]), torch.tensor([5, 5, 5])]
)
def test_every_form_of_one_timestep_is_read(timestep: object) -> None:
    assert single_timestep(timestep) == 5.0


def test_mixed_timesteps_are_refused() -> None:
    with pytest.raises(MixedTimestepError, match=r"\[5, 6\]"):
        single_timestep(torch.tensor([5, 6]))


@pytest.mark.parametrize("timestep", ["5", None, True, torch.empty(0)])
def test_what_is_no_timestep_is_refused(timestep: object) -> None:
    with pytest.raises(ShapeError, match="timestep"):
        single_timestep(timestep)
