"""Write the measured tables of README.md and docs/ from the rows in benchmarks/results/.

python benchmarks/tables.py            # rewrite the documents
python benchmarks/tables.py --check    # exit 1 if one differs from the rows
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

import calibration_tables
import cpu_tables
import eval_tables
import option_tables
import prompt_tables
import rounding_tables
from cpu_tables import markdown

from ptq4adm.bench import read_rows

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def _where(row: dict[str, str]) -> str:
    return (
        f"{row['device']}, {row['threads']} threads, torch {row['torch']}, commit {row['commit']}, "
        f"{row['date']} UTC"
    )


def size_table() -> str:
    """Size and step time of real-size UNets with random weights, newest row of each model."""
    newest = {row["model"]: row for row in read_rows(RESULTS / "size.csv")}
    header = [
        "UNet (random weights)",
        "float32 MB",
        "float16 MB",
        "W4A8 MB, disk / resident",
        "smaller than float16",
        "smaller than float32",
        "one step, float32 / W4A8",
    ]
    lines = []
    for row in newest.values():
        fp32, fp16, disk, resident = (
            float(row[key]) for key in ("fp32_mb", "fp16_mb", "disk_mb", "resident_mb")
        )
        lines.append(
            [
                row["model"],
                f"{fp32:.1f}",
                f"{fp16:.1f}",
                f"{disk:.1f} / {resident:.1f}",
                f"{100 * (1 - disk / fp16):.1f} % / {100 * (1 - resident / fp16):.1f} %",
                f"{100 * (1 - disk / fp32):.1f} % / {100 * (1 - resident / fp32):.1f} %",
                _step(row),
            ]
        )
    places: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in newest.values():
        key = tuple(row[name] for name in ("device", "threads", "torch", "commit"))
        places.setdefault(key, []).append(row)
    where = "; ".join(
        f"{', '.join(row['model'] for row in rows)}: {_where(rows[-1])}" for rows in places.values()
    )
    note = f"`benchmarks/bench_size.py`; {where}. One MB is 10^6 bytes."
    return markdown(header, lines, note)


def _step(row: dict[str, str]) -> str:
    """Times of one step, of a row that has them."""
    if not row.get("float_step_s"):
        return "not timed"
    return f"{float(row['float_step_s']):.2f} s / {float(row['w4a8_step_s']):.2f} s"


def quantize_table() -> str:
    """What the default job takes, newest row of each model."""
    rows = list({row["model"]: row for row in read_rows(RESULTS / "quantize.csv")}.values())
    header = [
        "model",
        "UNet of float16",
        "layers",
        "wall time, s",
        "CPU time, s",
        "peak memory, GB",
    ]
    lines = [
        [
            row["model"],
            f"{float(row['unet_mb']) / float(row['unet_mb_float16']):.3f}",
            row["layers"],
            f"{float(row['seconds']):.0f}",
            f"{float(row['cpu_seconds']):.0f}",
            f"{float(row['peak_mb']) / 1e3:.1f}",
        ]
        for row in rows
    ]
    return markdown(header, lines, f"`benchmarks/bench_quantize.py`; {_where(rows[-1])}.")


TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "size": size_table,
        "quality": lambda: eval_tables.short_table(RESULTS),
        "cpu-kernels": lambda: cpu_tables.kernel_table(RESULTS),
        "cpu-unet": lambda: cpu_tables.unet_table(RESULTS),
    },
    "docs/benchmarks-cpu.md": {
        "cpu-shapes": lambda: cpu_tables.shape_table(RESULTS),
        "cpu-peaks": lambda: cpu_tables.peak_table(RESULTS),
    },
    "docs/calibration.md": {
        "calibration": lambda: calibration_tables.strategy_table(RESULTS),
    },
    "docs/mixed-precision.md": {
        "options-mixed": lambda: option_tables.mixed_table(RESULTS),
        "options-ranges": lambda: option_tables.ranges_table(RESULTS),
        "options-buckets": lambda: option_tables.buckets_table(RESULTS),
        "options-balance": lambda: option_tables.balance_table(RESULTS),
        "options-correction": lambda: option_tables.correction_table(RESULTS),
    },
    "docs/quality.md": {
        f"eval-{name}": lambda group=group: eval_tables.comparison(RESULTS, [group])
        for name, group in eval_tables.GROUPS.items()
    }
    | {
        "eval-embeddings": lambda: eval_tables.embeddings_table(RESULTS),
        "quantize": quantize_table,
    },
    "docs/reconstruction.md": {
        "reconstruction": lambda: rounding_tables.reconstruction_table(RESULTS),
    },
    "docs/rounding.md": {
        "rounding": lambda: rounding_tables.rounding_table(RESULTS),
    },
    "docs/prompts.md": {
        "prompts-reading": lambda: prompt_tables.reading_table(RESULTS),
        "prompts-grid": lambda: prompt_tables.grid_table(RESULTS),
        "prompts-space": lambda: prompt_tables.space_table(RESULTS),
        "prompts-quality": lambda: prompt_tables.quality_table(RESULTS),
    },
}


def render(name: str, text: str) -> str:
    """Replace what stands between each table's markers by the table made from the rows.

    Args:
        name: the document, a key of `TABLES`.
        text: what it holds now.
    """
    for table, make in TABLES[name].items():
        start, end = f"<!-- table: {table} -->\n", "<!-- end -->"
        pattern = re.compile(re.escape(start) + ".*?" + end, re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise SystemExit(f"{name}: table {table!r} needs exactly one place, {start!r}")
        block = start + make() + "\n" + end
        text = pattern.sub(lambda _, block=block: block, text)
    return text


def main() -> int:
    """Rewrite or check the documents; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    is_check = parser.parse_args().check
    differing = 0
    for name in TABLES:
        document = ROOT / name
        text = document.read_text()
        fresh = render(name, text)
        differing += fresh != text
        if not is_check:
            document.write_text(fresh)
    return int(is_check and differing > 0)


if __name__ == "__main__":
    sys.exit(main())
