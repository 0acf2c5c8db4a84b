"""Precedence of config, rules, possibility and overrides, and the byte counts."""

from __future__ import annotations

import json

import pytest
from torch import nn

from ptq4adm.config import QuantConfig
from ptq4adm.errors import PatternError, UnsupportedLayerError
from ptq4adm.quant.plan import Choice, QuantPlan, choose_schemes, plan_row

LAYERS = {
    "conv_in": nn.Conv2d(8, 64, 3),
    "block.0.to_q": nn.Linear(64, 64),
    "block.1.to_q": nn.Linear(64, 64),
    "depthwise": nn.Conv2d(64, 64, 3, groups=64),
}
RULES = [("conv_in", "float", "first"), ("block.*", "w8a8", "early"), ("*.1.*", "w8", "late")]
UNSUPPORTED = {"depthwise": "grouped convolution (64 groups)"}


def _choose(**fields: object) -> dict[str, Choice]:
    return choose_schemes(LAYERS, QuantConfig(**fields), RULES, UNSUPPORTED)  # type: ignore[arg-type]


def test_later_rules_win_and_what_cannot_be_stays_float() -> None:
    assert _choose() == {
        "conv_in": Choice("float", "first"),
        "block.0.to_q": Choice("w8a8", "early"),
        "block.1.to_q": Choice("w8", "late"),
        "depthwise": Choice("float", "grouped convolution (64 groups)"),
    }


def test_overrides_win_over_rules_and_the_last_override_over_the_others() -> None:
    choices = _choose(overrides={"block.*": "w4a8", "*.1.to_q": "float"})
    assert choices["block.0.to_q"] == Choice("w4a8", "override 'block.*'")
    assert choices["block.1.to_q"] == Choice("float", "override '*.1.to_q'")
    assert _choose(overrides={"conv_in": "w8a8"})["conv_in"].scheme == "w8a8"


def test_weight_only_as_the_default_leaves_convolutions_float() -> None:
    choices = choose_schemes({"c": nn.Conv2d(8, 8, 1)}, QuantConfig(scheme="w8"), [], {})
    assert choices["c"].scheme == "float"
    assert "linear" in choices["c"].reason


@pytest.mark.parametrize(
    ("pattern", "closest"),
    [("blok.*.to_q", "block.0.to_q"), ("to_q", "block.0.to_q"), ("CONV_IN", "conv_in")],
)
def test_a_pattern_without_a_match_names_the_closest_layers(pattern: str, closest: str) -> None:
    with pytest.raises(PatternError, match=f"matches none of the 4 layers.*'{closest}'"):
        _choose(overrides={pattern: "float"})


def test_an_override_to_what_a_layer_cannot_be_is_refused() -> None:
    with pytest.raises(UnsupportedLayerError, match="'depthwise' cannot be w4a8: grouped"):
        _choose(overrides={"depthwise": "w4a8"})
    with pytest.raises(UnsupportedLayerError, match="'conv_in' cannot be w8"):
        _choose(overrides={"conv_in": "w8"})


def test_the_table_has_every_layer_the_reasons_and_the_totals() -> None:
    choices = _choose(overrides={"block.0.to_q": "w4a8"})
    rows = tuple(
        plan_row(name, layer, choices[name], segments=None, buckets=10, group_size=None)  # type: ignore[arg-type]
        for name, layer in LAYERS.items()
    )
    plan = QuantPlan(rows, other_before=100, other_after=200, config=QuantConfig())
    text = str(plan)
    for expected in (*LAYERS, "first", "late", "override 'block.0.to_q'", "64x8x3x3", "static"):
        assert expected in text
    assert plan.summary() in text
    assert plan.bytes_after == 200 + sum(row.bytes_after for row in rows)
    assert json.loads(json.dumps(plan.to_dict()))["bytes_before"] == plan.bytes_before


def test_an_assignment_wins_over_rules_and_overrides_win_over_it() -> None:
    first, second, *_ = LAYERS
    config = QuantConfig(overrides={second: "float"})
    choices = choose_schemes(LAYERS, config, RULES, {}, {first: "w8a8", second: "w8a8"})
    assert choices[first].scheme == "w8a8"
    assert choices[first].reason == "integer program"
    assert choices[second].scheme == "float"
    assert choices[second].reason.startswith("override")


def test_an_assigned_layer_must_exist_and_be_possible() -> None:
    with pytest.raises(PatternError, match="'nowhere'"):
        choose_schemes(LAYERS, QuantConfig(), RULES, {}, {"nowhere": "w8a8"})
    first = next(iter(LAYERS))
    with pytest.raises(UnsupportedLayerError, match="cannot be w8a8: grouped"):
        choose_schemes(LAYERS, QuantConfig(), RULES, {first: "grouped"}, {first: "w8a8"})
