"""How many copies a replay holds, and the order of turns. Graphs themselves need a GPU."""

from __future__ import annotations

import pytest
import torch

from ptq4adm.bench.gpu_timing import (
    GpuCall,
    GpuTiming,
    GraphTimer,
    HostTimer,
    _turns,
    copies_for,
    make_timer,
)


@pytest.mark.parametrize(
    ("seconds", "copies"), [(5e-6, 40), (300e-6, 1), (60e-6, 4), (1e-7, 64), (0.0, 64)]
)
def test_a_replay_lasts_long_enough(seconds: float, copies: int) -> None:
    assert copies_for(seconds) == copies


def test_every_round_begins_with_another_variant() -> None:
    rounds = iter([True, True, False])
    turns = list(_turns(["a", "b", "c"], lambda _: next(rounds), 1))
    assert turns == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]


def test_at_least_the_least_rounds() -> None:
    assert list(_turns(["a", "b"], lambda _: False, 2)) == ["a", "b", "b", "a"]


def test_the_rehearsal_runs_each_once_on_the_host() -> None:
    ran = []
    calls = {name: GpuCall(lambda copy, name=name: ran.append((name, copy))) for name in "ab"}
    timings = HostTimer().time(calls, seconds=0.0)
    assert ran == [("a", 0), ("b", 0)]
    assert all(timing.samples == timing.copies == 1 for timing in timings.values())
    assert all(timing.us > 0 for timing in timings.values())


def test_summary_is_in_microseconds() -> None:
    timing = GpuTiming.of([1e-6, 2e-6, 3e-6, 4e-6, 100e-6], 7)
    assert timing.us == pytest.approx(3.0)
    assert timing.p20_us == pytest.approx(2.0)
    assert timing.p80_us == pytest.approx(4.0)
    assert (timing.samples, timing.copies) == (5, 7)


def test_the_cpu_is_timed_by_the_host() -> None:
    assert isinstance(make_timer(torch.device("cpu")), HostTimer)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_hold_copies_and_time_what_they_hold() -> None:
    device = torch.device("cuda", 0)
    x = torch.randn(2048, 2048, device=device, dtype=torch.float16)
    small = torch.randn(64, 64, device=device, dtype=torch.float16)
    calls = {
        "large": GpuCall(lambda _: x @ x, (x,)),
        "small": GpuCall(lambda _: small @ small, (small,)),
    }
    timings = GraphTimer(device).time(calls, seconds=0.05)
    assert timings["large"].us > timings["small"].us > 0
    assert timings["small"].copies > timings["large"].copies >= 1
