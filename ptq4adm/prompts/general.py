"""The domain of sounds in general: speech, music, effects and ambience, in many sentence forms."""

from __future__ import annotations

from functools import cache

from ptq4adm.prompts.general_aspects import general_aspects
from ptq4adm.prompts.general_sources import general_sources
from ptq4adm.prompts.grammar import Forms
from ptq4adm.prompts.lexicon import BACKGROUND, SEQUENCE, TOGETHER
from ptq4adm.prompts.taxonomy import SOURCE, Aspect, Taxonomy, Words


@cache
def general_taxonomy() -> Taxonomy:
    """Aspects and sources of the two tables."""
    sources = general_sources()
    # a hundred sources would be most of all pairs: each counts as a cell only
    source = Aspect(SOURCE, {source.name: Words() for source in sources}, is_paired=False)
    return Taxonomy((source, *general_aspects()), sources)


GENERAL_FORMS = Forms(
    openings=(
        "{}",
        "{}",
        "{}",
        "{}",
        "the sound of {}",
        "a recording of {}",
        "you can hear {}",
        "audio of {}",
    ),
    joins={
        SEQUENCE: ("{a}, then {b}", "{a} and then {b}", "{a} before {b}", "{a}, after that {b}"),
        TOGETHER: ("{a} while {b}", "{a} and {b}", "{a} as {b}"),
        BACKGROUND: ("{a} with {b} in the background", "{a} over the sound of {b}"),
    },
)
