"""Charts hold their numbers, as pictures and as words."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from ptq4adm.report import charts

SPACE = {"svg": "http://www.w3.org/2000/svg"}


def parse(svg: str) -> ElementTree.Element:
    """The SVG as a document of its own: it must be well-formed."""
    return ElementTree.fromstring(svg)


def test_bars_are_as_long_as_the_logarithm_of_their_values() -> None:
    rows = [
        charts.Bar("a", 1e-2, "w8a8", "w8a8"),
        charts.Bar("b <i>", 1e-3, "w4a8", "w4a8"),
        charts.Bar("c", 1e-4, "w4a8", "w4a8"),
        charts.Bar("nothing", 0.0, "float", "float"),
    ]
    root = parse(charts.bars("errors", "three layers", rows))
    rects = root.findall(".//rect")
    widths = [float(rect.attrib["width"]) for rect in rects]
    assert [rect.attrib["class"] for rect in rects] == ["w8a8", "w4a8", "w4a8", "float"]
    # 10^-4 to 10^-2 are two decades: whole, half, none
    assert widths[0] == pytest.approx(2 * widths[1], abs=0.2)
    assert widths[2] == widths[3] == 1.0
    titles = [title.text for title in root.findall(".//g/title")]
    assert titles[1] == "b <i>: 1.00e-03, w4a8"
    assert root.find("desc").text == "three layers"  # type: ignore[union-attr]


def test_long_names_are_shortened_from_the_left() -> None:
    name = "up_blocks." + 9 * "attentions." + "to_out"
    (label,) = [
        e.text
        for e in parse(charts.bars("e", "d", [charts.Bar(name, 1.0, "w4a8", "")])).findall(
            ".//text"
        )
        if e.attrib["class"] == "label"
    ]
    assert label is not None
    assert label.startswith("…")
    assert label.endswith("to_out")
    assert len(label) == 46


def test_a_ribbon_goes_there_and_back_inside_its_panel() -> None:
    ribbon = charts.Ribbon("layer", [-1.0, -2.0, -0.5], [3.0, 6.0, 1.0], [-0.5] * 3, [1.0] * 3)
    root = parse(charts.ribbons(ribbon, ("noise", "clip")))
    outer, inner = root.findall(".//polygon")
    points = [tuple(map(float, p.split(","))) for p in outer.attrib["points"].split()]
    assert len(points) == len(inner.attrib["points"].split()) == 6
    xs, ys = zip(*points, strict=True)
    assert list(xs) == [*xs[:3], *reversed(xs[:3])]
    # the largest value is highest, the smallest lowest, and both are ticks
    assert min(ys) == ys[1]
    assert max(ys) == ys[4]
    ticks = [e.text for e in root.findall(".//text") if e.attrib["class"] == "tick"]
    assert ticks == ["-2", "0", "6", "noise", "clip"]
    assert "widest -2 to 6" in (root.find("desc").text or "")  # type: ignore[union-attr]


@pytest.mark.parametrize("value", [0.0, 2.5])
def test_one_step_and_a_constant_range_are_drawn(value: float) -> None:
    svg = charts.ribbons(charts.Ribbon("x", [value], [value], [value], [value]), ("a", "b"))
    parse(svg)
    assert "nan" not in svg


def test_a_curve_falls_to_the_right_with_its_error() -> None:
    points = [(0.28, 1e-2), (0.30, 1e-3), (0.50, 1e-4)]
    root = parse(charts.curve("p", points, ("size", "error"), (0.30, 1e-3, "chosen <here>")))
    dots = [e for e in root.findall(".//circle") if e.attrib["class"] == "dot"]
    places = [(float(e.attrib["cx"]), float(e.attrib["cy"])) for e in dots]
    assert [x for x, _ in places] == sorted(x for x, _ in places)
    steps = [b[1] - a[1] for a, b in pairwise(places)]
    assert steps[0] == pytest.approx(steps[1], abs=0.2)
    (mark,) = [e for e in root.findall(".//circle") if e.attrib["class"] == "mark"]
    assert math.dist(places[1], (float(mark.attrib["cx"]), float(mark.attrib["cy"]))) < 0.1
    assert "chosen <here>" in [e.text for e in root.findall(".//text")]


def test_charts_carry_no_colour_of_their_own() -> None:
    svg = charts.bars("e", "d", [charts.Bar("a", 1.0, "w4a8", "")])
    assert not re.search(r'(fill|stroke)="#', svg)
