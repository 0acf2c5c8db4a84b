"""The aspects of sounds in general: reads `aspects-general.txt`, adds those of a whole prompt."""

from __future__ import annotations

from functools import cache

from ptq4adm.prompts.tables import read_file, read_rows, split_list
from ptq4adm.prompts.taxonomy import LENGTH, ORDER, Aspect, Words

_TABLE = "aspects-general.txt"
_COLUMNS = 4
_SHORT_WORDS, _MEDIUM_WORDS = 6, 13

# said by the words between clauses, and by the number of words
ORDER_ASPECT = Aspect(ORDER, {name: Words() for name in ("sequence", "together", "background")})
LENGTH_ASPECT = Aspect(LENGTH, {name: Words() for name in ("short", "medium", "long")})


@cache
def general_aspects() -> tuple[Aspect, ...]:
    """Every aspect of the table, in its order, then order and length."""
    return (*parse_aspects(read_file(_TABLE), _TABLE), ORDER_ASPECT, LENGTH_ASPECT)


def parse_aspects(text: str, name: str) -> tuple[Aspect, ...]:
    """Aspects of a table; the first lines of `aspects-general.txt` say how it is written.

    Raises:
        ConfigError: if a row stands before any heading, or has too many columns.
    """
    found: dict[str, dict[str, Words]] = {}
    for row in read_rows(text, name, _COLUMNS):
        value, *words = row.cells
        aspect = row.heading.strip("[] ")
        found.setdefault(aspect, {})[value] = Words(*(split_list(cell) for cell in words))
    return tuple(Aspect(aspect, values) for aspect, values in found.items())


def length_of(words: int) -> str:
    """Which length a prompt of so many words has: short to 6, medium to 13, long above."""
    if words <= _SHORT_WORDS:
        return "short"
    return "medium" if words <= _MEDIUM_WORDS else "long"
