"""What a GPU benchmark says: ratios to float16 by kind and number of rows, and text for people."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ptq4adm.bench.gpu_environment import REHEARSAL, check_results
from ptq4adm.bench.gpu_faults import failed_lines
from ptq4adm.bench.gpu_variant import FLOAT
from ptq4adm.bench.rows import append_rows

Row = Mapping[str, Any]
# called with a run's columns, and rows by file name
Save = Callable[[dict[str, str], Mapping[str, Sequence[Row]]], Any]
KERNELS, PEAKS, UNET, TUNE = (
    "gpu-kernels.csv",
    "gpu-peaks.csv",
    "gpu-unet.csv",
    "gpu-tune.csv",
)
# classes of M: how many rows the levels of the UNets have
_ROW_CLASSES = ((256, "M <= 256"), (1024, "M <= 1024"), (4096, "M <= 4096"))
_LARGEST_CLASS = "M > 4096"


def save_gpu(folder: Path, run: dict[str, str], tables: Mapping[str, Sequence[Row]]) -> list[str]:
    """Add rows, each with its run's columns, to the files of a folder.

    Args:
        folder: of the files.
        run: `gpu_environment`'s.
        tables: file name to rows.

    Returns:
        The files.

    Raises:
        OutputError: if a file cannot be written, or a rehearsal's would mix with measurements.
    """
    check_results(folder, is_rehearsal=run["device"] == REHEARSAL)
    for name, rows in tables.items():
        if rows:
            append_rows(folder / name, [{**run, **row} for row in rows])
    return [str(folder / name) for name, rows in tables.items() if rows]


def row_class(M: int) -> str:
    """Which class of rows a product belongs to."""
    return next((name for most, name in _ROW_CLASSES if most >= M), _LARGEST_CLASS)


def group_ratios(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """How much faster than float16 each variant is, by kind and by class of rows.

    Returns:
        One entry a group, backend and variant: ``kind``, ``rows``, ``backend``, ``variant``,
        ``shapes`` (distinct ones), ``geometric_mean`` and ``least`` of ``ratio_fp16``,
        ``least_shape``.
    """
    groups: dict[tuple[str, str, str, str], dict[str, float]] = {}
    for row in rows:
        if row["ratio_fp16"] == "" or row["variant"].startswith(FLOAT):
            continue
        key = (row["kind"], row_class(int(row["M"])), row.get("backend", ""), row["variant"])
        groups.setdefault(key, {})[row["shape"]] = float(row["ratio_fp16"])
    entries = []
    for (kind, rows_name, backend, variant), ratios in groups.items():
        least = min(ratios, key=lambda shape: ratios[shape])
        entries.append(
            {
                "kind": kind,
                "rows": rows_name,
                "backend": backend,
                "variant": variant,
                "shapes": len(ratios),
                "geometric_mean": geometric_mean(ratios.values()),
                "least": ratios[least],
                "least_shape": least,
            }
        )
    return entries


def variant_label(row: Row) -> str:
    """Name of a row's variant and, where it is this package's, its backend."""
    return f"{row['variant']} {row.get('backend', '')}".rstrip()


def geometric_mean(values: Iterable[float]) -> float:
    """Of positive numbers, at least one."""
    logs = [math.log(value) for value in values]
    return math.exp(math.fsum(logs) / len(logs))


def format_gpu(result: Mapping[str, Any]) -> str:
    """The text that `ptq4adm bench --device cuda` prints."""
    run, rows = result["run"], result["rows"]
    lines = [describe_run(run), "", "ceilings: " + format_peaks(result["peaks"]), ""]
    lines += ["times faster than float16 in PyTorch: geometric mean (least); above 1, faster", ""]
    lines += _group_table(group_ratios(rows))
    lines += ["", "every shape: median us; times faster than float16; % of the nearest ceiling", ""]
    table = [["shape", "variant", "us", "x fp16", "% peak", "error", "tile"]]
    for row in {(row["shape"], variant_label(row)): row for row in rows}.values():
        if row["failed"] or row.get("skipped"):
            continue
        ratio = "" if row["ratio_fp16"] == "" else f"{float(row['ratio_fp16']):.2f}"
        table.append(
            [
                row["shape"],
                variant_label(row),
                f"{row['us']:.1f}",
                ratio,
                "" if row["peak_percent"] == "" else f"{row['peak_percent']:.0f}",
                f"{row['error']:.2g}",
                row["tile"],
            ]
        )
    lines += columns(table, left=2)
    lines += [""] + [f"not measured: {name}: {why}" for name, why in result["missing"].items()]
    lines += [f"no time for: {shape}" for shape in result["left_out"]]
    lines += [f"did not compile: {reason}" for reason in result["uncompiled"]]
    lines += failed_lines(result["failed"])
    return "\n".join(lines)


def describe_run(run: Mapping[str, str]) -> str:
    """One line: GPU, driver, versions, commit."""
    driver = f", driver {run['driver']}" if run.get("driver") else ""
    cuda = f", CUDA {run['cuda']}" if run.get("cuda") else ""
    return (
        f"{run['device']}{driver}{cuda}, torch {run['torch']}, triton {run['triton']}, commit "
        f"{run['commit'] or 'unknown'}, {run['date']} UTC"
    )


def format_peaks(peaks: Sequence[Row]) -> str:
    """Ceilings in one line."""
    return ", ".join(
        f"{row['peak']} {'FAILED' if row['failed'] else format(row['value'], 'g')} {row['unit']}"
        for row in peaks
    )


def _group_table(entries: Sequence[Row]) -> list[str]:
    """A line a group and backend, so that backends stand below each other."""
    variants = list(dict.fromkeys(entry["variant"] for entry in entries))
    groups = dict.fromkeys((e["kind"], e["rows"], e["backend"]) for e in entries)
    cells = {(e["kind"], e["rows"], e["backend"], e["variant"]): e for e in entries}
    table = [["kind", "rows", "backend", *variants]]
    for group in sorted(groups):
        found = [cells.get((*group, variant)) for variant in variants]
        table.append(
            [
                *group,
                *(
                    "" if e is None else f"{e['geometric_mean']:.2f} ({e['least']:.2f})"
                    for e in found
                ),
            ]
        )
    return columns(table, left=3)


def columns(table: Sequence[Sequence[str]], *, left: int) -> list[str]:
    """Lines of a table whose first `left` columns are flush left, the others flush right."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i < left or i == len(row) - 1 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
