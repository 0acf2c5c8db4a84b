from __future__ import annotations

import pytest

from ptq4adm.bench.timing import MOST_CALLS, Timing, time_interleaved


class Machine:
    """A clock and variants that take known times."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def variant(self, name: str, seconds: float):
        def run() -> None:
            self.calls.append(name)
            self.now += seconds

        return run

    def clock(self) -> float:
        return self.now


def test_rounds_rotate_and_every_turn_begins_with_a_call_that_is_not_timed() -> None:
    machine = Machine()
    variants = {name: machine.variant(name, 1.0) for name in "abc"}
    found = time_interleaved(variants, seconds=0.0, least_rounds=3, clock=machine.clock)
    # one estimate each, then rounds of two calls (not timed, timed) a turn
    assert "".join(machine.calls) == "abc" + "aabbcc" + "bbccaa" + "ccaabb"
    assert {name: timing.samples for name, timing in found.items()} == {"a": 3, "b": 3, "c": 3}


def test_medians_are_of_each_variant() -> None:
    machine = Machine()
    variants = {"slow": machine.variant("slow", 3.0), "fast": machine.variant("fast", 0.5)}
    found = time_interleaved(variants, seconds=20.0, clock=machine.clock)
    assert found["slow"].median_s == pytest.approx(3.0)
    assert found["fast"].median_s == pytest.approx(0.5)


def test_short_calls_are_repeated_within_a_turn() -> None:
    machine = Machine()
    found = time_interleaved(
        {"short": machine.variant("short", 1e-6)}, seconds=0.0, clock=machine.clock, least_rounds=1
    )
    assert found["short"].samples == MOST_CALLS


def test_the_budget_ends_the_rounds() -> None:
    machine = Machine()
    time_interleaved(
        {"a": machine.variant("a", 1.0)}, seconds=9.0, clock=machine.clock, least_rounds=1
    )
    assert machine.now == 9.0  # the estimate, then rounds of two seconds


def test_quantiles() -> None:
    timing = Timing.of([float(i) for i in range(11)])
    assert (timing.median_s, timing.p20_s, timing.p80_s, timing.samples) == (5.0, 2.0, 8.0, 11)
    assert Timing.of([2.0]) == Timing(2.0, 2.0, 2.0, 1)
