"""The integer program against brute force."""

from __future__ import annotations

import itertools
import random
import sys

import pytest

from ptq4adm.errors import ConfigError, DependencyError
from ptq4adm.sensitivity import (
    LayerSensitivity,
    Sensitivity,
    assign_schemes,
    choose,
    pareto_curve,
    predicted_error,
)

SCHEMES = ("w4a8", "w8a8", "float")


def make(count: int, seed: int, fixed: int = 1000) -> Sensitivity:
    """Layers of random sizes and errors over several orders of magnitude."""
    draw = random.Random(seed)
    layers = []
    for i in range(count):
        size = draw.randrange(1000, 400_000)
        error = 10 ** draw.uniform(-6, -1)
        layers.append(
            LayerSensitivity(
                name=f"layer{i}",
                parameters=size,
                bytes={"w4a8": size // 2 + 8, "w8a8": size + 8, "float": 2 * size},
                error={"w4a8": error, "w8a8": error * draw.uniform(0.001, 0.3)},
            )
        )
    half = fixed + sum(layer.bytes["float"] for layer in layers)
    return Sensitivity("f" * 64, 8, half, fixed, tuple(layers))


def brute_force(sensitivity: Sensitivity, limit: int) -> float:
    best = float("inf")
    for schemes in itertools.product(SCHEMES, repeat=len(sensitivity.layers)):
        pairs = list(zip(sensitivity.layers, schemes, strict=True))
        size = sensitivity.fixed_bytes + sum(layer.bytes[s] for layer, s in pairs)
        if size <= limit:
            best = min(best, sum(0.0 if s == "float" else x.error[s] for x, s in pairs))
    return best


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [0.27, 0.3, 0.41, 0.6, 0.97, 1.0])
def test_no_other_choice_within_the_budget_has_less_error(seed: int, budget: float) -> None:
    sensitivity = make(7, seed)
    limit = int(budget * sensitivity.float16_bytes)
    chosen = assign_schemes(sensitivity, budget)
    assert list(chosen) == [layer.name for layer in sensitivity.layers]
    assert sensitivity.size_of(chosen) <= limit
    expected = brute_force(sensitivity, limit)
    assert predicted_error(sensitivity, chosen) == pytest.approx(expected, rel=1e-5, abs=1e-15)


def test_a_budget_in_mb_is_the_same_as_its_share() -> None:
    sensitivity = make(12, 0)
    assert sensitivity.float16_bytes > 4e6
    share = 1.5e6 / sensitivity.float16_bytes
    assert assign_schemes(sensitivity, 1.5) == assign_schemes(sensitivity, share)


def test_the_smallest_size_itself_is_feasible_and_a_byte_less_is_not() -> None:
    sensitivity = make(9, 1)
    smallest = 1000 + sum(layer.bytes["w4a8"] for layer in sensitivity.layers)
    chosen = assign_schemes(sensitivity, smallest / sensitivity.float16_bytes)
    assert set(chosen.values()) == {"w4a8"}
    with pytest.raises(ConfigError, match=r"the smallest that can is 0\.\d{4} of float16") as info:
        assign_schemes(sensitivity, (smallest - 1) / sensitivity.float16_bytes)
    named = float(str(info.value).split("that can is ")[1].split(" ")[0])
    # what the message names can be asked for
    assert set(assign_schemes(sensitivity, named).values()) >= {"w4a8"}


@pytest.mark.parametrize("budget", [0, -0.3, float("nan"), float("inf"), True, "0.3", None])
def test_what_is_no_size_is_refused(budget: object) -> None:
    with pytest.raises(ConfigError, match="budget"):
        assign_schemes(make(3, 0), budget)  # type: ignore[arg-type]


def test_layers_without_error_and_no_layers_at_all_are_solved() -> None:
    zero = LayerSensitivity("a", 10, {"w4a8": 5, "w8a8": 10, "float": 20}, {"w4a8": 0, "w8a8": 0})
    assert assign_schemes(Sensitivity("f", 1, 20, 0, (zero,)), 0.25) == {"a": "w4a8"}
    assert assign_schemes(Sensitivity("f", 1, 20, 5, ()), 0.25) == {}


def test_hundreds_of_layers_take_seconds() -> None:
    sensitivity = make(300, 5)
    chosen = assign_schemes(sensitivity, 0.35)
    assert sensitivity.size_of(chosen) <= 0.35 * sensitivity.float16_bytes
    assert len(set(chosen.values())) == 3


def test_the_curve_falls_and_each_point_is_what_the_program_finds() -> None:
    sensitivity = make(10, 2)
    curve = pareto_curve(sensitivity, points=9)
    assert curve[0].bytes == 1000 + sum(layer.bytes["w4a8"] for layer in sensitivity.layers)
    assert curve[-1].error == 0.0
    assert curve[-1].size_ratio == 1.0
    for a, b in itertools.pairwise(curve):
        assert a.bytes < b.bytes
        assert a.error > b.error
    for point in curve[::3]:
        again = assign_schemes(sensitivity, point.bytes / sensitivity.float16_bytes)
        assert predicted_error(sensitivity, again) == pytest.approx(point.error, rel=1e-4)


def test_choosing_fills_in_what_a_report_shows() -> None:
    sensitivity = make(6, 3)
    found = choose(sensitivity, 0.3)
    assert found.chosen == assign_schemes(sensitivity, 0.3)
    assert found.pareto == pareto_curve(sensitivity)
    assert found.layers == sensitivity.layers


def test_without_scipy_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(DependencyError, match=r"ptq4adm\[budget\]"):
        assign_schemes(make(2, 0), 0.5)
