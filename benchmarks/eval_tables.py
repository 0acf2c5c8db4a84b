"""The tables of docs/quality.md and README.md from the rows of benchmarks/eval_quality.py."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from cpu_tables import markdown
from eval_variants import VARIANTS

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
_SHORT = (
    *("float", "W8A8", "W4A8", "W4A8, uniform"),
    *("W4A8, GPTQ", "W4A8, reconstruction", "budget 0.30", "budget 0.30, GPTQ"),
)


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
    for name in _in_order(
        row["variant"] for group in groups for row in rows if row["group"] == group
    ):
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


def _in_order(names: Iterable[str]) -> list[str]:
    """Each once, as eval_variants.py lists them; others after those."""
    found = dict.fromkeys(names)
    return [*(n for n in VARIANTS if n in found), *(n for n in found if n not in VARIANTS)]


def embeddings_table(results: Path) -> str:
    """Increase of the distance over float's in every embedding, variants that have all of them."""
    path = results / "quality-eval.csv"
    found: dict[str, dict[str, dict[str, Row]]] = {}
    for row in read_rows(path) if path.is_file() else []:
        found.setdefault(row["variant"], {}).setdefault(row["embedding"], {})[row["seed"]] = row
    names = list(dict.fromkeys(name for by_name in found.values() for name in by_name))
    whole = {variant: by_name for variant, by_name in found.items() if len(by_name) == len(names)}
    if len(names) < 2 or _FLOAT not in whole:
        return NOT_MEASURED
    header = ["variant"]
    for name in names:
        header += [f"{name}: FD", "more than float", "FD to float"]
    lines = []
    for variant in _in_order(whole):
        cells = [_figures(list(whole[variant][name].values()))[:3] for name in names]
        lines.append([variant, *(cell for figures in cells for cell in figures)])
    rows = [
        row for by_name in whole.values() for seeds in by_name.values() for row in seeds.values()
    ]
    last = max(rows, key=lambda row: row["date"])
    note = (
        f"{last['clips']} clips a variant and seed, {len({row['seed'] for row in rows})} seeds: "
        "their mean (least to greatest). `benchmarks/eval_quality.py --embeddings`; "
        f"{last['device']}, {last['date']} UTC."
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
