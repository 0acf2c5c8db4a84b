"""The table of docs/reconstruction.md from the rows of benchmarks/bench_reconstruction.py."""

from __future__ import annotations

from pathlib import Path

from cpu_tables import markdown

from ptq4adm.bench import read_rows

Row = dict[str, str]


def variant_table(results: Path) -> str:
    """The newest row of every variant and seed, seeds side by side."""
    variants: dict[str, dict[str, Row]] = {}
    for row in read_rows(results / "reconstruction.csv"):
        variants.setdefault(row["variant"], {})[row["seed"]] = row
    header = ["4-bit integers", "pairs", "steps", "rate", "UNet of FP16"]
    header += ["SQNR median, dB", "least, dB", "s", "peak MiB"]
    lines = [
        _line(name, [seeds[seed] for seed in sorted(seeds)]) for name, seeds in variants.items()
    ]
    rows = [row for seeds in variants.values() for row in seeds.values()]
    last, commits = rows[-1], sorted({row["commit"] for row in rows})
    note = (
        f"Latent SQNR of {last['clips']} held-out clips; several numbers are seeds of the "
        f"training. s: all of `quantize` on {last['threads']} thread of a machine busy with other "
        f"work, so an upper bound. `benchmarks/bench_reconstruction.py`; {last['device']}, commit "
        f"{', '.join(commits)}, {last['date']} UTC."
    )
    return markdown(header, lines, note)


def _line(name: str, rows: list[Row]) -> list[str]:
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
