"""Reads `sources-general.txt`: what sounds, what it is called, what it does."""

from __future__ import annotations

import itertools
import re
from functools import cache

from ptq4adm.errors import ConfigError
from ptq4adm.prompts.tables import Row, read_file, read_rows, split_list
from ptq4adm.prompts.taxonomy import Action, Source

_TABLE = "sources-general.txt"
_COLUMNS = 5
_SAID_OF_ALL = frozenset({"loudness", "space", "count"})
_HEADING = re.compile(
    r"\[(?P<family>\w+) (?P<modality>\w+)\](?P<traits>[\w ]*)(?:;(?P<options>.*))?"
)


@cache
def general_sources() -> tuple[Source, ...]:
    """Every source of the table, in its order."""
    return parse_sources(read_file(_TABLE), _TABLE)


def parse_sources(text: str, name: str) -> tuple[Source, ...]:
    """Sources of a table; the first lines of `sources-general.txt` say how it is written.

    Raises:
        ConfigError: if a heading or a row is not of that form; names the line.
    """
    return tuple(_source(row) for row in read_rows(text, name, _COLUMNS))


def _source(row: Row) -> Source:
    heading = _HEADING.fullmatch(row.heading)
    if heading is None:
        raise ConfigError(
            f"{row.where}: under {row.heading!r}; expected '[family modality] traits; options'"
        )
    name, nouns, verbs, also, agents = row.cells
    options = (heading["options"] or "").split()
    excluded = [value for word, value in itertools.pairwise(options) if word == "not"]
    return Source(
        name=name,
        family=heading["family"],
        modality=heading["modality"],
        nouns=split_list(nouns),
        actions=tuple(Action(verb) for verb in split_list(verbs)),
        traits=_SAID_OF_ALL.union(heading["traits"].split()),
        also=split_list(also),
        agents=split_list(agents),
        is_carrier="carrier" in options,
        never=frozenset(("space", value) for value in excluded),
    )
