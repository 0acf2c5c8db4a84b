"""The result files of the CPU benchmarks: the newest run of each configuration.

``cpu-runs.csv`` says what each run was (machine, versions, threads, instruction sets);
``cpu-kernels.csv``, ``cpu-peaks.csv`` and ``cpu-unet.csv`` hold its numbers and name it in ``run``.
A new run replaces what it measured again; the repository's history keeps the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ptq4adm.bench.rows import read_rows, write_rows

RUNS, KERNELS, PEAKS, UNET = "cpu-runs.csv", "cpu-kernels.csv", "cpu-peaks.csv", "cpu-unet.csv"
_CONFIGURATION = ("device", "isa", "threads", "bits")
# what is measured together, so that every ratio is of one run
_TOGETHER = {KERNELS: ("model", "shape"), PEAKS: ("kind", "threads"), UNET: ("model",)}


def save_result(
    folder: Path, run: Mapping[str, str], tables: Mapping[str, Sequence[Mapping[str, Any]]]
) -> str:
    """Add one run to the result files.

    Args:
        folder: of the files.
        run: the run's row, without its name.
        tables: file name (`KERNELS`, `PEAKS`, `UNET`) to rows. A row replaces those of an earlier
            run of the same configuration that were measured together with its namesake: the
            variants of one shape, or of one model's step.

    Returns:
        The run's name.

    Raises:
        OutputError: if a file cannot be written.
    """
    when = run["date"].replace(" ", "T")
    name = f"{when}-{run['isa']}-{run['threads']}t-w{run['bits']}"
    runs = {row["run"]: row for row in _read(folder / RUNS)}
    same = {
        key
        for key, row in runs.items()
        if all(row.get(column) == run[column] for column in _CONFIGURATION)
    }
    kept: dict[str, list[dict[str, Any]]] = {}
    for file in (KERNELS, PEAKS, UNET):
        new = [{"run": name, **row} for row in tables.get(file, ())]
        measured = {_together(file, row) for row in new}
        old = [
            row
            for row in _read(folder / file)
            if not (row["run"] in same and _together(file, row) in measured)
        ]
        kept[file] = [*old, *new]
    runs[name] = {"run": name, **run}
    used = {row["run"] for rows in kept.values() for row in rows}
    write_rows(folder / RUNS, [row for key, row in runs.items() if key in used])
    for file, rows in kept.items():
        if rows:
            write_rows(folder / file, rows)
    return name


def _together(file: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(row.get(column)) for column in _TOGETHER[file])


def read_table(folder: Path, file: str) -> list[dict[str, str]]:
    """Rows of one file with the columns of their runs; none if there is no file yet.

    A column that both have, such as ``threads`` of a ceiling, is the row's.
    """
    runs = {row["run"]: row for row in _read(folder / RUNS)}
    return [{**runs[row["run"]], **row} for row in _read(folder / file)]


def _read(path: Path) -> list[dict[str, str]]:
    return read_rows(path) if path.is_file() else []
