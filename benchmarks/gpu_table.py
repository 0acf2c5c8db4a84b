"""One short table of what a GPU run measured, from its rows; used by `run_gpu.py`.

Standard library only. Of each shape or model the newest row of each variant counts; several models
share shapes, which count once. Products are those of int8 activations, as inside fused blocks.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable
from pathlib import Path

KERNELS, STEPS = "gpu-kernels.csv", "gpu-unet.csv"
FLOAT_KERNEL, OWN_KERNEL = "torch-fp16", "w4a8"
FLOAT_STEP, OWN_STEP = "fp16-graph", "w4a8-static-graph"
BACKENDS = ("triton", "cuda")
MANY_ROWS = 2048
_GROUPS: dict[str, Callable[[dict[str, str]], bool]] = {
    f"convolutions, M >= {MANY_ROWS}": lambda r: _is_conv(r) and int(r["M"]) >= MANY_ROWS,
    f"convolutions, M < {MANY_ROWS}": lambda r: _is_conv(r) and int(r["M"]) < MANY_ROWS,
    f"linear, M >= {MANY_ROWS}": lambda r: _is_linear(r) and int(r["M"]) >= MANY_ROWS,
    f"linear, M < {MANY_ROWS}": lambda r: _is_linear(r) and int(r["M"]) < MANY_ROWS,
}


def short_table(folder: Path) -> list[str]:
    """Lines of the table; none if nothing was measured.

    Args:
        folder: of the rows.
    """
    kernels = _newest(folder / KERNELS, ("kind", "shape"))
    steps = _newest(folder / STEPS, ("model",))
    table = [["", "fp16", *BACKENDS]]
    table += [_group_line(name, list(filter(is_in, kernels))) for name, is_in in _GROUPS.items()]
    for model in dict.fromkeys(row["model"] for row in steps):
        table.append(_step_line(model, [row for row in steps if row["model"] == model]))
    table = [line for line in table if any(line[1:])]
    if len(table) == 1:
        return []
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    device = (steps or kernels)[-1]["device"]
    return [
        f"W4A8 on {device}, times faster than float16 (products: geometric mean; steps: in graphs)",
        *(
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in table
        ),
    ]


def _newest(path: Path, names: tuple[str, ...]) -> list[dict[str, str]]:
    """The last row of each variant of what the columns name, on the device that came last."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows = [row for row in rows if row["device"] == rows[-1]["device"]]
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        found[(*(row[name] for name in names), row["variant"], row["backend"])] = row
    return list(found.values())


def _is_conv(row: dict[str, str]) -> bool:
    return row["kind"].startswith("conv")


def _is_linear(row: dict[str, str]) -> bool:
    return row["kind"].startswith("linear")


def _group_line(name: str, rows: list[dict[str, str]]) -> list[str]:
    cells = []
    for backend in BACKENDS:
        own = [r for r in rows if (r["variant"], r["backend"]) == (OWN_KERNEL, backend)]
        ratios = [float(row["ratio_fp16"]) for row in own if row["ratio_fp16"]]
        cells.append(f"{_geometric_mean(ratios):.2f}" if ratios else _without_time(own))
    shapes = {row["shape"] for row in rows if row["variant"] == FLOAT_KERNEL}
    return [f"{name} ({len(shapes)} shapes)", "1.00" if shapes else "", *cells]


def _step_line(model: str, rows: list[dict[str, str]]) -> list[str]:
    by_name = {(row["variant"], row["backend"]): row for row in rows}
    base = by_name.get((FLOAT_STEP, ""), {})
    cells = [f"{base['ms']} ms" if base.get("ms") else ""]
    for backend in BACKENDS:
        row = by_name.get((OWN_STEP, backend))
        if row is None or not row["ms"]:
            cells.append(_without_time([] if row is None else [row]))
        else:
            ratio = row["ratio_fp16_graph"]
            cells.append(f"{row['ms']} ms" + (f" ({float(ratio):.2f})" if ratio else ""))
    return [f"a step of {model}", *cells]


def _without_time(rows: list[dict[str, str]]) -> str:
    """Why a cell is empty, in a word."""
    for word in ("failed", "skipped"):
        if any(row.get(word) for row in rows):
            return word
    return ""


def _geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(math.fsum(logs) / len(logs))
