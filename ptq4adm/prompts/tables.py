"""The text tables of this room: rows of cells under headings in brackets."""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterator
from dataclasses import dataclass

from ptq4adm.errors import ConfigError


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        where: file and line, for messages.
        heading: what stands in and after the brackets above it, "[human speech] pitch; carrier".
        cells: between the bars.
    """

    where: str
    heading: str
    cells: tuple[str, ...]


def read_file(name: str) -> str:
    """A text file of this room."""
    return importlib.resources.files("ptq4adm.prompts").joinpath(name).read_text(encoding="utf-8")


def read_lines(name: str) -> tuple[str, ...]:
    """Lines of a text file of this room, without empty ones and those that begin with #."""
    return tuple(line for _, line in _lines(read_file(name)))


def read_rows(text: str, name: str, columns: int) -> Iterator[Row]:
    """Rows of a table.

    Args:
        text: of the table.
        name: of the table, for messages.
        columns: how many a row has; those missing at its end are empty.

    Raises:
        ConfigError: if a row stands before any heading, or has too many columns.
    """
    heading = ""
    for number, line in _lines(text):
        where = f"{name}, line {number}"
        if line.startswith("["):
            heading = line
            continue
        cells = [cell.strip() for cell in line.split("|")]
        if not heading or len(cells) > columns:
            raise ConfigError(
                f"{where}: {line!r}: needs a [heading] above it, and {columns} columns at most"
            )
        yield Row(where, heading, (*cells, *[""] * (columns - len(cells))))


def split_list(cell: str) -> tuple[str, ...]:
    """Items between commas."""
    return tuple(part.strip() for part in cell.split(",") if part.strip())


def _lines(text: str) -> Iterator[tuple[int, str]]:
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip()
        if line and not line.startswith("#"):
            yield number, line
