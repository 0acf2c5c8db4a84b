"""The tables of docs/quality.md and README.md from the rows of benchmarks/eval_quality.py."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from cpu_tables import markdown

from ptq4adm.bench import read_rows

Row = dict[str, str]
NOT_MEASURED = "Not measured yet: `benchmarks/eval_quality.py` writes the rows."
_FLOAT = "float"
# short name to the group of eval_variants.py
GROUPS = {
    "baseline": "baseline",
    "options": "one option",
    "budget": "size budget",
    "sets": "calibration set",
    "prompts": "calibration prompts",
}
_SHORT = ("float", "W8A8", "W4A8", "W4A8, uniform", "W4A8, reconstruction", "budget 0.30")


def short_table(results: Path) -> str:
    """The variants that a first reader asks for."""
    return comparison(results, list(GROUPS.values()), _SHORT)


def comparison(results: Path, groups: Sequence[str], names: Sequence[str] | None = None) -> str:
    """A line a variant: figures averaged over seeds, with the least and the greatest.

    Args:
        results: folder of the rows.
        groups: of variants, in this order.
        names: of variants; None for all of the groups.

    Raises:
        SystemExit: if rows are of different numbers of clips, which the distances depend on, or the
            float model has none.
    """
    path = results / "quality-eval.csv"
    if not path.is_file():
        return NOT_MEASURED
    newest = {(row["variant"], row["seed"], row["embedding"]): row for row in read_rows(path)}
    rows = [row for row in newest.values() if row["group"] in groups]
    rows = [row for row in rows if names is None or row["variant"] in names]
    if not rows:
        return NOT_MEASURED
    counts = sorted({row["clips"] for row in rows})
    if len(counts) > 1:
        raise SystemExit(
            f"{path.name}: rows of {' and of '.join(counts)} clips do not compare; run "
            "eval_quality.py again for all of these variants"
        )
    sizes = [float(row["unet_mb"]) for row in newest.values() if row["variant"] == _FLOAT]
    if not sizes:
        raise SystemExit(f"{path.name}: no rows of the float model; run eval_quality.py for it")
    embedding = rows[0]["embedding"]
    header = ["variant", "UNet of float16", f"FD, {embedding}", "more than float", "FD to float"]
    header += ["right class", "latent SQNR, dB", "mel distance, dB", "minutes to make"]
    lines = []
    order = dict.fromkeys(
        row["variant"] for group in groups for row in rows if row["group"] == group
    )
    for name in order:
        mine = [r for r in rows if r["variant"] == name and r["embedding"] == embedding]
        lines.append([name, f"{float(mine[0]['unet_mb']) / sizes[0]:.3f}", *_figures(mine)])
    last = rows[-1]
    seeds = len({row["seed"] for row in rows})
    commits = sorted({row["made_by"] for row in rows})
    note = (
        f"{last['clips']} clips a variant and seed, {seeds} seeds: their mean (least to greatest). "
        "FD against the real clips of the same captions; FD to the float model's clips, SQNR "
        "(median over clips, least of all clips) and mel distance of the same noise. "
        f"`benchmarks/eval_quality.py`; {last['device']}, commit {', '.join(commits)}, "
        f"{last['date']} UTC."
    )
    return markdown(header, lines, note)


def _figures(rows: Sequence[Row]) -> list[str]:
    cells = [_spread(rows, "fd", ".2f")]
    is_float = not rows[0].get("fd_increase")
    cells.append("" if is_float else _spread(rows, "fd_increase", "+.1%"))
    cells.append("" if is_float else _spread(rows, "fd_to_float", ".2f"))
    cells.append(f"{_mean(rows, 'right_class'):.1%}")
    if is_float:
        return [*cells, "", "", ""]
    least = min(float(row["sqnr_min_db"]) for row in rows)
    cells.append(f"{_mean(rows, 'sqnr_median_db'):.1f} ({least:.1f})")
    cells.append(f"{_mean(rows, 'mel_median_db'):.2f}")
    return [*cells, f"{_mean(rows, 'seconds') / 60:.1f}"]


def _spread(rows: Sequence[Row], column: str, form: str) -> str:
    values = [float(row[column]) for row in rows]
    mean = f"{statistics.mean(values):{form}}"
    return f"{mean} ({min(values):{form}} to {max(values):{form}})"


def _mean(rows: Sequence[Row], column: str) -> float:
    return statistics.mean(float(row[column]) for row in rows)
