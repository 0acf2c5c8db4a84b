"""Where tables lie: one file a device, in this package or where an environment variable says."""

from __future__ import annotations

import os
from pathlib import Path

from ptq4adm.dispatch.table import DispatchTable, load_table
from ptq4adm.errors import DispatchTableError

VARIABLE = "PTQ4ADM_DISPATCH"
OFF = "off"
TABLES = Path(__file__).parent / "tables"


def table_path(device: str, folder: Path | None = None) -> Path:
    """The file of a device, which may not exist.

    Args:
        device: its name; in the file's name it is lower case, words joined by underscores.
        folder: None for the package's.
    """
    words = "".join(c if c.isalnum() else " " for c in device.lower()).split()
    return (folder or TABLES) / f"{'_'.join(words)}.json"


def find_table(device: str) -> DispatchTable | None:
    """The table that holds for a device, or None if there is none.

    `PTQ4ADM_DISPATCH` names a file, a folder of files, or ``off`` for none; unset or empty, the
    package's folder is looked into.

    Raises:
        DispatchTableError: if what the variable names does not exist, a file is wrong anywhere, or
            it is of another device.
    """
    named = os.environ.get(VARIABLE, "")
    if named == OFF:
        return None
    place = Path(named) if named else TABLES
    if named and not place.exists():
        raise DispatchTableError(
            f"{VARIABLE} = {named!r}: there is no such file or folder; correct it, unset it, or "
            f"set it to {OFF!r}"
        )
    path = place if place.is_file() else table_path(device, place)
    if not path.exists():
        return None
    table = load_table(path)
    check_device(table, device)
    return table


def check_device(table: DispatchTable, device: str | None) -> None:
    """Refuse a table of another device.

    Args:
        table: the table.
        device: name of the device at hand; None for one that tables do not speak of.

    Raises:
        DispatchTableError: if they differ.
    """
    if table.device != device:
        raise DispatchTableError(
            f"{table.source}: measured on {table.device!r}, the model is on "
            f"{device or 'a device without tables'!r}; times of one device say nothing of another"
        )


def describe_table(device: str) -> str:
    """One line for people: which table holds for a device, or why none does.

    Raises:
        DispatchTableError: as `find_table`.
    """
    table = find_table(device)
    if table is not None:
        dates = sorted(run["date"] for run in table.runs if run["date"])
        newest = f", newest run {dates[-1]} UTC" if dates else ""
        return (
            f"{table.source}: {len(table.layers)} layers, {table.entries} entries of {device}"
            f"{newest}"
        )
    if os.environ.get(VARIABLE) == OFF:
        return f"no table for {device} ({VARIABLE}={OFF}): auto takes triton"
    return f"no table for {device}: auto takes triton"
