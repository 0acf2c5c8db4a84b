"""From a taxonomy to a dictionary of phrases: what each run of words can mean.

Inflected forms are made here, once; the tagger only looks phrases up.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from ptq4adm.prompts.inflect import plural, verb_forms
from ptq4adm.prompts.taxonomy import Cell, Source, Taxonomy

SEQUENCE, TOGETHER, BACKGROUND = "sequence", "together", "background"
# words between two clauses, and how the clauses are then ordered
CONNECTIVES: dict[str, tuple[str, ...]] = {
    SEQUENCE: (
        "then", "and then", "followed by", "followed shortly by", "before", "after", "afterwards",
        "later", "finally", "eventually", "subsequently", "after that", "after which",
        "until",
    ),
    TOGETHER: (
        "and", "while", "as", "with", "together with", "along with", "alongside", "during", "amid",
        "at the same time", "simultaneously", "accompanied by", "mixed with", "plus", "when",
        "but", "at the same time as",
    ),
    BACKGROUND: ("over",),
}  # fmt: skip
# what follows is how the source before sounds, if it names no more than a kind of sound: "a piano
# with a warm tone"
DESCRIBES = "with"
# these order two clauses wherever they stand in one of them
ORDER_WORDS: dict[str, tuple[str, ...]] = {
    BACKGROUND: ("in the background", "in background", "background", "on top of"),
    SEQUENCE: ("first", "at the end", "at the beginning", "in succession", "one after another"),
    TOGETHER: ("in unison",),
}
NEGATIONS = (
    "no", "not", "without", "never", "nor", "neither", "isn't", "aren't", "doesn't", "don't",
    "free of", "free from", "absence of", "lack of", "lacking", "instead of", "rather than",
)  # fmt: skip
_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?|[,;.:!?]")
_MASS, _PLURAL = "~", "+"
PUNCTUATION = frozenset(",;.:!?")

Phrase = tuple[str, ...]


def words_of(text: str) -> list[str]:
    """Lower-case words and punctuation marks; hyphens separate, a possessive loses its ending."""
    lowered = text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").replace("-", " ")
    return [w.removesuffix("'s") for w in _WORD.findall(lowered)]


def noun_text(noun: str) -> str:
    """A noun of a source without its mark."""
    return noun.rstrip(_MASS + _PLURAL)


def is_mass(noun: str) -> bool:
    """Whether it takes no article: "rain~"."""
    return noun.endswith(_MASS)


def is_plural(noun: str) -> bool:
    """Whether it is a plural: "footsteps+"."""
    return noun.endswith(_PLURAL)


@dataclass
class Meaning:
    """What one phrase can mean.

    Attributes:
        cells: values it says.
        nouns: sources it names.
        verbs: sources that do it.
        connective: how it orders the clauses at its sides, or None.
        order: how it orders the prompt, or None.
        is_negation: whether it denies what follows.
    """

    cells: list[Cell] = field(default_factory=list)
    nouns: list[Source] = field(default_factory=list)
    verbs: list[Source] = field(default_factory=list)
    connective: str | None = None
    order: str | None = None
    is_negation: bool = False


class Lexicon:
    """Every phrase a taxonomy knows.

    Args:
        taxonomy: whose words they are.
    """

    def __init__(self, taxonomy: Taxonomy) -> None:
        self.meanings: dict[Phrase, Meaning] = {}
        for aspect in taxonomy.aspects:
            for value, words in aspect.values.items():
                for phrase in words.all:
                    self._at(phrase).cells.append((aspect.name, value))
        for source in taxonomy.sources:
            self._add_source(source, taxonomy)
        # what can be said; the words below only join or deny it
        self.vocabulary = self._words()
        for order, phrases in CONNECTIVES.items():
            for phrase in phrases:
                self._at(phrase).connective = order
        for order, phrases in ORDER_WORDS.items():
            for phrase in phrases:
                self._at(phrase).order = order
        for phrase in NEGATIONS:
            self._at(phrase).is_negation = True
        self.longest = max(map(len, self.meanings))
        self.words = self._words()

    def find(self, words: list[str], start: int) -> tuple[int, Meaning] | None:
        """The longest phrase that begins at `start`: its length and meaning."""
        for length in range(min(self.longest, len(words) - start), 0, -1):
            meaning = self.meanings.get(tuple(words[start : start + length]))
            if meaning is not None:
                return length, meaning
        return None

    def _words(self) -> frozenset[str]:
        return frozenset(word for phrase in self.meanings for word in phrase)

    def _add_source(self, source: Source, taxonomy: Taxonomy) -> None:
        singular = [noun_text(n) for n in source.nouns if not is_plural(n)] + list(source.also)
        named = [noun_text(n) for n in source.nouns] + list(source.also)
        for noun in _unique([*named, *map(plural, singular)]):
            self._at(noun).nouns.append(source)
        for action in source.actions:
            for verb in verb_forms(action.plain):
                meaning = self._at(verb)
                if source not in meaning.verbs:
                    meaning.verbs.append(source)
                # the phrase is found whole, so what its words say is kept with it
                said = sorted(taxonomy.sayings(action) - set(meaning.cells))
                meaning.cells += said

    def _at(self, phrase: str) -> Meaning:
        return self.meanings.setdefault(tuple(words_of(phrase)), Meaning())


def _unique(items: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(items))
