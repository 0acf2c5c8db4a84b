"""The table of docs/calibration.md from the rows of benchmarks/bench_calibration.py."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from cpu_tables import markdown

from ptq4adm.bench import read_rows

_CONFIGS = (("w4a8", "absmax"), ("w8a8", "absmax"), ("w8a8", "squared_error"))
Row = dict[str, str]


def strategy_table(results: Path) -> str:
    """Mean over seeds of every strategy's mean SQNR, with the least and the greatest seed's."""
    newest: dict[tuple[str, ...], Row] = {}
    for row in read_rows(results / "calibration.csv"):
        key = (row["strategy"], row["seed"], row["scheme"], row["observer"])
        newest[key] = row
    rows = list(newest.values())
    header = ["choice", "pairs", "bins covered", "from the bulk", "ranges cut by 10 % or more"]
    header += [f"{scheme.upper()}, {observer}" for scheme, observer in _CONFIGS]
    lines = []
    for name in dict.fromkeys(row["strategy"] for row in rows):
        mine = [row for row in rows if row["strategy"] == name]
        line = [name, mine[0]["pairs"]]
        line += [f"{_mean(mine, key):{form}}" for key, form in _SHOWN]
        lines.append(line + [_sqnr(mine, config) for config in _CONFIGS])
    last = rows[-1]
    seeds, commits = (sorted({row[key] for row in rows}) for key in ("seed", "commit"))
    note = (
        f"Latent SQNR in dB: mean of {last['clips']} held-out clips, mean of {len(seeds)} seeds "
        f"(least to greatest); pairs of {last['pool_prompts']} prompts. "
        f"`benchmarks/bench_calibration.py`; {last['device']}, commit {', '.join(commits)}, "
        f"{last['date']} UTC."
    )
    return markdown(header, lines, note)


_SHOWN = (("coverage", ".1%"), ("distance", ".3f"), ("clipped_share", ".1%"))


def _mean(rows: Sequence[Row], key: str) -> float:
    return statistics.mean(float(row[key]) for row in rows)


def _sqnr(rows: Sequence[Row], config: tuple[str, str]) -> str:
    found = [
        float(row["sqnr_mean_db"]) for row in rows if (row["scheme"], row["observer"]) == config
    ]
    if not found:
        return ""
    return f"{statistics.mean(found):.2f} ({min(found):.2f} to {max(found):.2f})"
