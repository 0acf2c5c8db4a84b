"""The tables of docs/rounding.md and docs/reconstruction.md, from rows of their two scripts."""

from __future__ import annotations

from pathlib import Path

from cpu_tables import markdown

from ptq4adm.bench import read_rows

Row = dict[str, str]


def rounding_table(results: Path) -> str:
    """Newest row of every variant of bench_rounding.py, in the order of their first measurement."""
    newest = {row["variant"]: row for row in read_rows(results / "rounding.csv")}
    header = ["rounding", "pairs", "UNet of FP16", "SQNR median, dB", "least, dB", "s", "peak MiB"]
    lines = [
        [
            name,
            row["pairs"],
            f"{float(row['size_ratio']):.3f}",
            f"{float(row['sqnr_median_db']):.1f}",
            f"{float(row['sqnr_min_db']):.1f}",
            f"{float(row['seconds']):.0f}",
            row["peak_mib"],
        ]
        for name, row in newest.items()
    ]
    return markdown(header, lines, _note(list(newest.values()), "bench_rounding.py"))


def reconstruction_table(results: Path) -> str:
    """The newest row of every variant and seed of bench_reconstruction.py, seeds side by side."""
    variants: dict[str, dict[str, Row]] = {}
    for row in read_rows(results / "reconstruction.csv"):
        variants.setdefault(row["variant"], {})[row["seed"]] = row
    header = ["4-bit integers", "pairs", "steps", "rate", "UNet of FP16"]
    header += ["SQNR median, dB", "least, dB", "s", "peak MiB"]
    lines = [
        _seeds_line(name, [seeds[seed] for seed in sorted(seeds)])
        for name, seeds in variants.items()
    ]
    rows = [row for seeds in variants.values() for row in seeds.values()]
    note = _note(rows, "bench_reconstruction.py")
    return markdown(header, lines, f"Several numbers are seeds of the training. {note}")


def _seeds_line(name: str, rows: list[Row]) -> list[str]:
    first = rows[0]

    def listed(key: str, digits: int) -> str:
        return ", ".join(f"{float(row[key]):.{digits}f}" for row in rows)

    return [
        name,
        first["pairs"],
        first.get("steps") or "",
        first.get("rate") or "",
        f"{float(first['size_ratio']):.3f}",
        listed("sqnr_median_db", 1),
        listed("sqnr_min_db", 1),
        listed("seconds", 0),
        f"{max(int(row['peak_mib']) for row in rows)}",
    ]


def _note(rows: list[Row], script: str) -> str:
    """What was measured, where and when."""
    last, commits = max(rows, key=lambda row: row["date"]), sorted({row["commit"] for row in rows})
    return (
        f"Latent SQNR of {last['clips']} held-out clips; s: all of `quantize` on "
        f"{last['threads']} thread, with other work on the other core. `benchmarks/{script}`; "
        f"{last['device']}, commit {', '.join(commits)}, {last['date']} UTC."
    )
