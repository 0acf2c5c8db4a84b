"""The table of docs/rounding.md from the rows of benchmarks/bench_rounding.py."""

from __future__ import annotations

from pathlib import Path

from cpu_tables import markdown

from ptq4adm.bench import read_rows


def variant_table(results: Path) -> str:
    """Newest row of every variant, in the order in which they were first measured."""
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
    rows = list(newest.values())
    last, commits = rows[-1], sorted({row["commit"] for row in rows})
    note = (
        f"Latent SQNR of {last['clips']} held-out clips; s: all of `quantize` on "
        f"{last['threads']} thread of a machine busy with other work, so an upper bound. "
        f"`benchmarks/bench_rounding.py`; {last['device']}, commit {', '.join(commits)}, "
        f"{last['date']} UTC."
    )
    return markdown(header, lines, note)
