"""Result rows: a CSV file whose every line names its machine, commit and versions."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from ptq4adm.errors import OutputError

Row = Mapping[str, str | int | float]


def environment(root: Path | None = None) -> dict[str, str]:
    """Describe where a measurement is made.

    Args:
        root: checkout whose commit is named; none leaves ``commit`` empty.

    Returns:
        date (UTC), commit (with ``+`` when files differ from it), device, cores, threads, and the
        versions of torch and Python.
    """
    import torch

    commit = ""
    if root is not None:
        commit = _git(root, "rev-parse", "--short", "HEAD")
        if commit and _git(root, "status", "--porcelain", "--untracked-files=no"):
            commit += "+"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M"),
        "commit": commit,
        "device": _cpu_name(),
        "cores": str(
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        ),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def append_rows(path: Path, rows: Sequence[Row]) -> None:
    """Add rows to a CSV file, atomically, widening its header where a row brings new columns.

    Args:
        path: the file; made with its folder when missing.
        rows: one mapping a line; columns a row lacks stay empty.

    Raises:
        OutputError: if the file cannot be written.
    """
    old = read_rows(path) if path.exists() else []
    write_rows(path, [*old, *rows])


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write a CSV file, atomically; its columns are those of all rows.

    Args:
        path: the file; made with its folder when missing, replaced when there.
        rows: one mapping a line; columns a row lacks stay empty.

    Raises:
        OutputError: if the file cannot be written.
    """
    columns: list[str] = []
    for row in rows:
        columns.extend(name for name in row if name not in columns)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        temporary.replace(path)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot write result rows ({error.strerror}); choose a writable folder"
        ) from error


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read a CSV file of rows: one dictionary of strings a line."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    name = platform.processor() or platform.machine()
    flags = ""
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() == "flags":
                flags = value
                break
    best = next((f for f in ("avx512_vnni", "avx_vnni", "avx2") if f in flags.split()), "")
    return f"{name} ({best})" if best else name


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=False, timeout=20
        )
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
