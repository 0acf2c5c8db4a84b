"""Sections of numbers: metrics, sizes, sensitivity, ranges, coverage, settings."""

from __future__ import annotations

import torch

from ptq4adm.quant.observers import QMAX, HistogramRecord, scale_table
from ptq4adm.report import charts
from ptq4adm.report.data import Report
from ptq4adm.report.html import key, missing, table, text, wide

_BARS = 40
_PANELS = 8
_PERCENTILE = 99.9


def metrics(report: Report) -> str:
    """Figures of sets of clips, with their intervals."""
    if not report.evaluations:
        return missing(
            "No distances between sets of clips were measured.",
            "ptq4adm evaluate REFERENCE TEST --json FILE, then ptq4adm report --evaluation FILE",
        )
    parts = []
    for found in report.evaluations:
        rows = [
            [
                metric.name.replace("_", " "),
                f"{metric.value:.4g} {metric.unit}".strip(),
                f"{metric.low:.4g} to {metric.high:.4g}",
                f"{metric.level:.0%}",
                metric.detail,
            ]
            for metric in found.metrics
        ]
        parts.append(
            f"<h3>{text(found.test)} against {text(found.reference)}</h3>"
            f'<p class="quiet">{found.clips} clips each; embedding {text(found.embedding)}, '
            f"{found.dimension} features, weights {text(found.weights[:16])}.</p>"
            + table(["figure", "value", "interval", "level", "how"], rows, (1, 2, 3))
            + "".join(f'<p class="warning">Warning: {text(w)}</p>' for w in found.warnings)
        )
    return "".join(parts)


def sizes(report: Report) -> str:
    """Bytes of every form, and how many layers have which scheme."""
    base = report.sizes[0].bytes
    rows = [
        [
            row.name,
            f"{row.bytes / 1e6:.2f}",
            f"{row.bytes / base:.3f}",
            f"{1 - row.bytes / base:.1%}",
            ", ".join(f"{count} {name}" for name, count in sorted(row.layers.items())) or "all",
        ]
        for row in report.sizes
    ]
    header = ["UNet in", "MB", "of float16", "saved", "layers"]
    return table(header, rows, (1, 2, 3)) + '<p class="note">One MB is 10<sup>6</sup> bytes.</p>'


def sensitivity(report: Report) -> str:
    """What each layer alone does to the output, coloured by what was chosen for it."""
    found = report.sensitivity
    if found is None:
        return missing(
            "The error that each layer alone makes was not measured.",
            "ptq4adm sensitivity MODEL -o FILE --budget 0.30, then ptq4adm report --sensitivity "
            "FILE",
        )
    ranked = sorted(found.layers, key=lambda layer: -layer.error_at("w4a8"))
    chosen = found.chosen or {}
    bars = [
        charts.Bar(
            label=layer.name,
            value=layer.error_at("w4a8"),
            kind=chosen.get(layer.name, "w4a8"),
            note=chosen.get(layer.name, "w4a8"),
        )
        for layer in ranked[:_BARS]
    ]
    rest = sum(layer.error_at("w4a8") for layer in ranked[_BARS:])
    more = len(ranked) - len(bars)
    said = f" The other {more} layers add {rest:.1e} together." if more > 0 else ""
    shown = [("w4a8", "W4A8"), ("w8a8", "W8A8"), ("float", "float16")]
    by_whom = "the scheme that the integer program chose" if chosen else "all at W4A8"
    return (
        f"<p>Relative squared error of the UNet's output with one layer at W4A8 and all others in "
        f"float, mean over {found.pairs} recorded steps. Colour: {by_whom}.{text(said)}</p>"
        + key(shown)
        + wide(
            charts.bars(
                "Output error of each layer at W4A8",
                f"The {len(bars)} most sensitive of {len(ranked)} layers, largest first.",
                bars,
            ),
            "Output error of each layer",
        )
    )


def pareto(report: Report) -> str:
    """The least error that fits into a size."""
    found = report.sensitivity
    points = [] if found is None else [(p.size_ratio, p.error) for p in found.pareto if p.error > 0]
    if found is None or not points:
        return missing(
            "No curve of size against error was made.",
            "ptq4adm sensitivity MODEL -o FILE --budget 0.30",
        )
    mark = None
    if found.chosen is not None:
        error = sum(layer.error_at(found.chosen[layer.name]) for layer in found.layers)
        ratio = found.size_of(found.chosen) / found.float16_bytes
        if error > 0:
            mark = (ratio, error, f"chosen: {ratio:.3f} of float16")
    return (
        "<p>The sum of the layers' errors that an integer program leaves within a size. It is a "
        "prediction: errors of layers are taken to add up.</p>"
        + wide(
            charts.curve(
                "Size against predicted error",
                points,
                ("share of float16", "predicted error"),
                mark,
            ),
            "Size against predicted error",
        )
    )


def ranges(report: Report) -> str:
    """How the ranges of the layers that drift most move over the steps."""
    buckets = report.calibration.meta.buckets
    panels = [
        (name, record)
        for name, segments in report.calibration.records.items()
        for record in segments[:1]
        if bool(record.seen.any())
    ]
    panels.sort(key=lambda panel: -_drift(panel[1]))
    drawn = []
    for name, record in panels[:_PANELS]:
        # sampling goes from the last timestep to the first
        seen = torch.nonzero(record.seen).flatten().flip(0)
        near = scale_table(record, "percentile", _PERCENTILE) * QMAX
        low, high = record.minimum[seen], record.maximum[seen]
        reach = near[seen]
        drawn.append(
            charts.ribbons(
                charts.Ribbon(
                    name,
                    low.tolist(),
                    high.tolist(),
                    torch.maximum(low, -reach).tolist(),
                    torch.minimum(high, reach).tolist(),
                ),
                ("noise", "clip"),
            )
        )
    return (
        f"<p>Inputs of the {len(drawn)} layers whose range changes most over a run, from the first "
        f"step to the last, in {buckets} timestep buckets. A layer has one scale a bucket.</p>"
        + key([("outer", "smallest to largest"), ("inner", f"{_PERCENTILE} % of magnitudes")])
        + f'<div class="panels">{"".join(drawn)}</div>'
    )


def coverage(report: Report) -> str:
    """What the calibration prompts cover of their domain."""
    found = report.coverage
    if found is None:
        return missing(
            "The calibration is of prompts that were not given here, so their coverage is unknown.",
            "ptq4adm report --calibration-prompts FILE",
        )
    rows = [
        ["cells (one aspect)", f"{found.cells:.1%}"],
        ["pairs (two aspects together)", f"{found.pairs:.1%}"],
    ]
    return (
        f"<p>{found.prompts} prompts, of the domain {text(report.domain)}. "
        "<code>ptq4adm prompts</code> finds what they lack.</p>"
        + table(["of the grid of aspects", "covered"], rows, (1,))
    )


def settings(report: Report) -> str:
    """Labels and values."""
    return table(["what", "value"], [list(row) for row in report.settings], ())


def _drift(record: HistogramRecord) -> float:
    """Largest over smallest range of the buckets that were seen."""
    reach = record.absmax()[record.seen]
    return float(reach.max() / reach.min().clamp_min(1e-8))
