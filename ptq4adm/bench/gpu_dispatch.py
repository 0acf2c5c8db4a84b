"""Makes a dispatch table of the rows that the kernel benchmark wrote (`gpu-kernels.csv`).

Only times of one run are compared with each other, because only they were taken in turns: for each
layer and number of rows, the newest run that timed the most backends counts, and what it says of a
backend that failed. Columns that are not named here are not read.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ptq4adm.bench.gpu_environment import REHEARSAL
from ptq4adm.bench.gpu_variant import FLOAT
from ptq4adm.dispatch import KINDS, DispatchTable, LayerKey, Times
from ptq4adm.dispatch.table import RUN_COLUMNS
from ptq4adm.errors import DispatchTableError

_NEEDED = ("device", "kind", "variant", "M", "N", "K", "us", "failed")
# rows had no column for it when there was one backend only
_USUAL_BACKEND = "triton"
# w4a8, quantize+w4a8, and the same with a backend's name
_VARIANT = re.compile(r"(?P<whole>quantize\+)?w(?P<bits>[48])a8(?:-(?P<backend>cuda|triton))?")
_GATED = "-geglu"

_Place = tuple[LayerKey, int]


def read_table(paths: Sequence[Path], device: str | None = None) -> DispatchTable:
    """A device's table from files of rows.

    Args:
        paths: CSV files, older ones first.
        device: whose rows count; None if all are of one device.

    Raises:
        DispatchTableError: if a file cannot be read or lacks a column, a row is wrong, there are
            rows of several devices and none is named, or none of the device.
    """
    rows = [(f"{path}, row {i + 2}", row) for path in paths for i, row in enumerate(_read(path))]
    measured = [(where, row) for where, row in rows if row["device"] != REHEARSAL]
    devices = sorted({row["device"] for _, row in measured})
    names = ", ".join(map(str, paths))
    if not devices:
        what = "rows of a rehearsal only, which are no measurements" if rows else "no rows"
        raise DispatchTableError(f"{names}: {what}; run `ptq4adm bench --device cuda` on a GPU")
    if device is None and len(devices) > 1:
        raise DispatchTableError(
            f"{names}: rows of {len(devices)} devices ({'; '.join(devices)}); name one with "
            "--device, a table is of one"
        )
    chosen = devices[0] if device is None else device
    if chosen not in devices:
        raise DispatchTableError(f"{names}: no rows of {chosen!r}; there are {'; '.join(devices)}")
    return make_table(chosen, [(where, row) for where, row in measured if row["device"] == chosen])


def make_table(device: str, rows: Iterable[tuple[str, Mapping[str, str]]]) -> DispatchTable:
    """A table of rows of one device.

    Args:
        device: its name.
        rows: where each stands, for messages, and its columns; older ones first.

    Raises:
        DispatchTableError: if a value is wrong, or no row is of a product.
    """
    places: dict[_Place, dict[tuple[str, ...], _Run]] = {}
    halves: dict[tuple[str, int, int, int], dict[tuple[str, ...], float]] = {}
    for where, row in rows:
        kind = row["kind"].removesuffix(_GATED)
        if kind not in KINDS:
            continue  # norms and gates
        run = tuple(row.get(name, "") for name in RUN_COLUMNS)
        M, N, K = (_whole(where, row, name) for name in "MNK")
        if row["variant"] == FLOAT:
            if not row["failed"]:
                halves.setdefault((kind, M, N, K), {})[run] = _microseconds(where, row)
            continue
        match = _VARIANT.fullmatch(row["variant"])
        if match is None or row.get("skipped"):
            continue  # other libraries, gated forms; a backend that was not there
        key = LayerKey(kind, int(match["bits"]), N, K)
        found = places.setdefault((key, M), {}).setdefault(run, _Run())
        backend = match["backend"] or row.get("backend") or _USUAL_BACKEND
        if row["failed"]:
            found.failed[backend] = row["failed"]
        else:
            times = found.layer if match["whole"] else found.product
            times[backend] = _microseconds(where, row)
    if not places:
        raise DispatchTableError(f"no rows of this package's products on {device!r}; nothing to do")
    return _assemble(device, places, halves)


class _Run:
    """What one run says of one layer at one number of rows."""

    def __init__(self) -> None:
        self.product: dict[str, float] = {}
        self.layer: dict[str, float] = {}
        self.failed: dict[str, str] = {}


def _assemble(
    device: str,
    places: dict[_Place, dict[tuple[str, ...], _Run]],
    halves: dict[tuple[str, int, int, int], dict[tuple[str, ...], float]],
) -> DispatchTable:
    runs: dict[tuple[str, ...], int] = {}
    layers: dict[LayerKey, dict[int, Times]] = {}
    for (key, M), found in places.items():
        # of equally many backends the last: runs stand in the order of their rows
        run = max(reversed(found), key=lambda name: len(_backends(found[name])))
        best = found[run]
        layers.setdefault(key, {})[M] = Times(
            run=runs.setdefault(run, len(runs)),
            float16=halves.get((key.kind, M, key.N, key.K), {}).get(run),
            product={n: us for n, us in best.product.items() if n not in best.failed},
            layer={n: us for n, us in best.layer.items() if n not in best.failed},
            failed=best.failed,
        )
    described = tuple(dict(zip(RUN_COLUMNS, run, strict=True)) for run in runs)
    return DispatchTable(device, described, layers)


def _backends(run: _Run) -> set[str]:
    return {*run.product, *run.failed}


def _read(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or ()
            missing = [name for name in _NEEDED if name not in columns]
            if missing:
                raise DispatchTableError(
                    f"{path}: no column {missing[0]!r}; needs rows of `ptq4adm bench --device "
                    "cuda`, gpu-kernels.csv"
                )
            rows: list[dict[str, Any]] = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DispatchTableError(f"{path}: cannot be read ({error}); name another file") from error
    for i, row in enumerate(rows):
        if None in row or None in row.values():
            raise DispatchTableError(
                f"{path}, row {i + 2}: has another number of cells than the header; the file is "
                "cut short or damaged"
            )
    return rows


def _whole(where: str, row: Mapping[str, str], name: str) -> int:
    try:
        value = int(row[name])
    except ValueError:
        value = 0
    if value < 1:
        raise DispatchTableError(
            f"{where}: {name} = {row[name]!r}, needs a whole number of at least 1"
        )
    return value


def _microseconds(where: str, row: Mapping[str, str]) -> float:
    try:
        value = float(row["us"])
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise DispatchTableError(f"{where}: us = {row['us']!r}, needs microseconds above 0")
    return value
