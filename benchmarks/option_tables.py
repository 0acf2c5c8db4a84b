"""The tables of docs/mixed-precision.md from the rows of benchmarks/bench_options.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from cpu_tables import markdown

from ptq4adm.bench import read_rows

Row = dict[str, str]
# what tells variants of a group apart
_KEYS = ("variant", "scheme", "observer", "layers", "run")


def ranges_table(results: Path) -> str:
    """Searches of activation and weight scales."""
    columns = {"scales": _text("variant"), "layers": _scheme}
    return _table(results, "ranges", columns)


def buckets_table(results: Path) -> str:
    """Numbers of timestep buckets."""
    columns = {
        "timestep buckets": lambda row: row["variant"].split()[0],
        "layers": _scheme,
        "activation scales": _text("observer"),
    }
    return _table(results, "buckets", columns)


def mixed_table(results: Path) -> str:
    """Predicted and measured errors, and what they mean for latents."""
    columns = {
        "schemes": _text("variant"),
        "UNet over float16": lambda row: f"{float(row['size_ratio']):.3f}",
        "output error, predicted": _text("predicted_error"),
        "output error, measured": _text("measured_error"),
    }
    return _table(results, "mixed", columns)


def correction_table(results: Path) -> str:
    """With and without a correction, also on runs that it was not fitted on."""
    columns = {
        "layers": lambda row: f"{row['scheme'].upper()}, {row['layers']}",
        "run": _text("run"),
        "predictions": _text("variant"),
    }
    return _table(results, "correction", columns)


def balance_table(results: Path) -> str:
    """Channels balanced between layers."""
    columns = {"balanced": _text("variant"), "layers": _scheme}
    return _table(results, "balance", columns)


def _text(key: str) -> Callable[[Row], str]:
    return lambda row: row.get(key, "")


def _scheme(row: Row) -> str:
    return row["scheme"].upper()


def _table(results: Path, group: str, columns: dict[str, Callable[[Row], str]]) -> str:
    rows = _newest(results, group)
    header = [*columns, "latent SQNR in dB, median", "mean", "least"]
    lines = []
    for row in rows:
        quality = [f"{float(row[f'sqnr_{key}_db']):.2f}" for key in ("median", "mean", "min")]
        lines.append([*(read(row) for read in columns.values()), *quality])
    return markdown(header, lines, _note(rows, group))


def _newest(results: Path, group: str) -> list[Row]:
    """The last row of every variant, in the order of the first."""
    newest: dict[tuple[str, ...], Row] = {}
    for row in read_rows(results / "options.csv"):
        if row["group"] == group:
            newest[tuple(row.get(key, "") for key in _KEYS)] = row
    if not newest:
        raise SystemExit(f"options.csv has no rows of {group!r}: run bench_options.py {group}")
    return list(newest.values())


def _note(rows: Sequence[Row], group: str) -> str:
    last = rows[-1]
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    return (
        f"{last['clips']} held-out prompts, each with the float clip's seed; "
        f"`benchmarks/bench_options.py {group}`; {last['device']}, commit {commits}, "
        f"{last['date']} UTC."
    )
