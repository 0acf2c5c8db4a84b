"""What a kernel benchmark says: ratios by group of layers, and tables for people."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ptq4adm.bench.ours import MATMUL, OURS, QUANTIZE

Row = Mapping[str, Any]

_MANY_ROWS = 512
GROUPS: dict[str, Callable[[Row], bool]] = {
    "conv 3x3": lambda row: row["kind"].startswith("conv3x3"),
    "conv 1x1": lambda row: row["kind"] == "conv1x1",
    "linear, M >= 512": lambda row: row["kind"] == "linear" and int(row["M"]) >= _MANY_ROWS,
    "linear, M < 512": lambda row: row["kind"] == "linear" and int(row["M"]) < _MANY_ROWS,
}


def peer_names(rows: Sequence[Row]) -> list[str]:
    """Variants of other libraries, in the order of the rows."""
    names = dict.fromkeys(row["variant"] for row in rows)
    return [name for name in names if name not in (OURS, MATMUL, QUANTIZE)]


def by_shape(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """Shape to variant to row; a shape that two models share stands once."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row["shape"], {})[row["variant"]] = row
    return found


def group_ratios(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """How much faster this package is, by group of layers and peer.

    Returns:
        One entry a group and peer: ``group``, ``peer``, ``shapes`` (number of distinct shapes),
        ``geometric_mean``, ``least`` and ``greatest`` of (the peer's median time) / (ours), and
        ``peer_isa``, the instruction sets that the peer executed. Above 1, ours is faster.
    """
    found = []
    for group, belongs in GROUPS.items():
        shapes = by_shape([row for row in rows if belongs(row)])
        for peer in peer_names(rows):
            pairs = [(v[OURS], v[peer]) for v in shapes.values() if OURS in v and peer in v]
            if not pairs:
                continue
            ratios = [_ms(theirs) / _ms(ours) for ours, theirs in pairs]
            isas = sorted({str(theirs["variant_isa"]) for _, theirs in pairs})
            found.append(
                {
                    "group": group,
                    "peer": peer,
                    "shapes": len(ratios),
                    "geometric_mean": math.exp(math.fsum(map(math.log, ratios)) / len(ratios)),
                    "least": min(ratios),
                    "greatest": max(ratios),
                    "peer_isa": " ".join(isas),
                }
            )
    return found


def step_milliseconds(rows: Sequence[Row], model: str, variant: str) -> float | None:
    """Time of all measured layers of one step: the sum of count times median.

    Returns:
        Milliseconds, or None if the variant lacks one of the model's shapes.
    """
    total = 0.0
    for shape in by_shape([row for row in rows if row["model"] == model]).values():
        if variant not in shape:
            return None
        total += int(shape[variant]["count"]) * _ms(shape[variant])
    return total


def format_result(result: Mapping[str, Any]) -> str:
    """The text that `ptq4adm bench` prints."""
    rows, run = result["rows"], result["run"]
    peers = peer_names(rows)
    lines = [
        f"{run['device']}, {run['threads']} threads, isa {run['isa']}, W{run['bits']}A8; "
        "quantization of the activations is inside every int8 time",
        "",
        "times faster than each (peer's median / ours); above 1, ptq4adm is faster",
        "",
    ]
    header = ["shape", "ms", "quantize", "GOPS", *peers]
    table = [header]
    for name, variants in by_shape(rows).items():
        ours = variants[OURS]
        operations = 2.0 * int(ours["M"]) * int(ours["N"]) * int(ours["K"])
        line = [name, f"{_ms(ours):.3f}", f"{_ms(variants[QUANTIZE]):.3f}"]
        line.append(f"{operations / _ms(ours) / 1e6:.0f}")
        line += [f"{_ms(variants[p]) / _ms(ours):.2f}" if p in variants else "" for p in peers]
        table.append(line)
    lines += _columns(table)
    lines += ["", "by group: geometric mean (least)", ""]
    ratios = {(r["group"], r["peer"]): r for r in group_ratios(rows)}
    summary = [["group", *peers]]
    for group in GROUPS:
        if any((group, peer) in ratios for peer in peers):
            summary.append([group, *(_ratio_cell(ratios.get((group, peer))) for peer in peers)])
    lines += _columns(summary)
    lines += ["", "instruction sets executed (sampled):"]
    for name in (OURS, *peers):
        isas = sorted({str(row["variant_isa"]) for row in rows if row["variant"] == name})
        lines.append(f"  {name}: {' '.join(isas)}")
    lines += ["", "ceilings: " + _ceilings(result["peaks"])]
    lines += [f"not measured: {name}: {why}" for name, why in result["missing"].items()]
    return "\n".join(lines)


def _ceilings(peaks: Sequence[Row]) -> str:
    kinds = dict.fromkeys(row["peak"] for row in peaks)
    parts = []
    for kind in kinds:
        rates = [f"{float(r['giga_a_second']):.0f}" for r in peaks if r["peak"] == kind]
        parts.append(f"{kind} {' / '.join(rates)} {'GB/s' if kind == 'copy' else 'GOPS'}")
    return ", ".join(parts)


def _ratio_cell(entry: Row | None) -> str:
    return "" if entry is None else f"{entry['geometric_mean']:.2f} ({entry['least']:.2f})"


def _columns(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]


def _ms(row: Row) -> float:
    return float(row["median_ms"])
