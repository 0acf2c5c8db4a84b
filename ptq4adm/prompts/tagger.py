"""From a prompt to the cells and pairs it says.

Rules of words and phrases, longest first; what follows a negation is passed over. A prompt is cut
into clauses, one a source, because "a slow flute and a loud drum" says nothing of a loud flute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ptq4adm.prompts.lexicon import (
    BACKGROUND,
    DESCRIBES,
    PUNCTUATION,
    SEQUENCE,
    TOGETHER,
    Lexicon,
    Meaning,
    words_of,
)
from ptq4adm.prompts.taxonomy import FAMILY, LENGTH, ORDER, SOURCE, Cell, Pair, Source, Taxonomy

# how far a negation reaches, unless a clause ends before
_NEGATION_WORDS = 4
# sources of this family are sounds without a cause, and give way to one that has a cause
_WEAK = "ambiguous"


@dataclass(frozen=True)
class Tags:
    """What a prompt says.

    Attributes:
        clauses: cells of each clause.
        scene: cells of the whole prompt: order and length.
    """

    clauses: tuple[frozenset[Cell], ...]
    scene: frozenset[Cell]

    @property
    def cells(self) -> frozenset[Cell]:
        """Every cell."""
        return self.scene.union(*self.clauses)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was understood: the length alone says nothing."""
        return all(name == LENGTH for name, _ in self.cells)

    def values(self, aspect: str) -> frozenset[str]:
        """Values of one aspect."""
        return frozenset(value for name, value in self.cells if name == aspect)


@dataclass
class _Clause:
    cells: set[Cell] = field(default_factory=set)
    nouns: list[Source] = field(default_factory=list)
    verbs: list[list[Source]] = field(default_factory=list)
    order: str | None = None  # said inside it
    joined_by: str | None = None  # the connective before it; None for punctuation
    is_description: bool = False  # begins with "with"

    def add(self, other: _Clause) -> None:
        """Take over what a clause without a source says."""
        self.cells |= other.cells
        self.nouns += other.nouns
        self.verbs += other.verbs
        self.order = self.order or other.order


class Tagger:
    """Reads prompts with one taxonomy's words.

    Args:
        taxonomy: whose cells are found.
        length_of: from a number of words to a value of the aspect "length".
    """

    def __init__(self, taxonomy: Taxonomy, length_of: Callable[[int], str]) -> None:
        self.taxonomy = taxonomy
        self.lexicon = Lexicon(taxonomy)
        self.length_of = length_of
        self._known = frozenset(aspect.name for aspect in taxonomy.aspects)

    def tag(self, prompt: str) -> Tags:
        """What one prompt says."""
        words = words_of(prompt)
        clauses = _merge(self._clauses(words))
        count = sum(word not in PUNCTUATION for word in words)
        scene = {(LENGTH, self.length_of(count))} if count else set()
        order = _order(clauses)
        if order is not None:
            scene.add((ORDER, order))
        said = [self._known_cells(_cells(clause)) for clause in clauses]
        return Tags(tuple(cells for cells in said if cells), self._known_cells(scene))

    def pairs(self, tags: Tags) -> frozenset[Pair]:
        """Pairs that tags hold: inside a clause, and of the scene with everything."""
        found: set[Pair] = set()
        for cells in tags.clauses or (frozenset(),):
            found.update(self.taxonomy.pairs_of(cells | tags.scene))
        return frozenset(found)

    def _clauses(self, words: list[str]) -> list[_Clause]:
        clauses, denied, i = [_Clause()], 0, 0
        while i < len(words):
            if words[i] in PUNCTUATION:
                clauses.append(_Clause())
                denied, i = 0, i + 1
                continue
            found = self.lexicon.find(words, i)
            if found is None:
                denied, i = max(0, denied - 1), i + 1
                continue
            length, meaning = found
            i += length
            if meaning.is_negation:
                denied = _NEGATION_WORDS
            elif meaning.connective is not None:
                clauses.append(_Clause(joined_by=meaning.connective))
                clauses[-1].is_description = words[i - length : i] == [DESCRIBES]
                denied = 0
            elif denied:
                denied = max(0, denied - length)
            else:
                _take(clauses[-1], meaning)
        return clauses

    def _known_cells(self, cells: Iterable[Cell]) -> frozenset[Cell]:
        return frozenset(cell for cell in cells if cell[0] in self._known)


def _take(clause: _Clause, meaning: Meaning) -> None:
    clause.cells.update(meaning.cells)
    clause.nouns += meaning.nouns
    if meaning.verbs and not meaning.nouns:
        clause.verbs.append(meaning.verbs)
    clause.order = clause.order or meaning.order


def _merge(clauses: list[_Clause]) -> list[_Clause]:
    """Join what says no source to its neighbour, and clauses of the same sources."""
    merged: list[_Clause] = []
    pending: _Clause | None = None
    for clause in clauses:
        if not _has_source(clause):
            # "in the distance, a dog barks": said before there is a source to say it of
            if merged:
                merged[-1].add(clause)
                if clause.joined_by == SEQUENCE:
                    merged[-1].order = SEQUENCE
            elif pending is None:
                pending = clause
            else:
                pending.add(clause)
            continue
        if pending is not None:
            clause.add(pending)
            clause.joined_by = clause.joined_by or pending.joined_by
            pending = None
        if merged and clause.is_description and all(s.family == _WEAK for s in clause.nouns):
            clause.nouns.clear()
            merged[-1].add(clause)
        elif merged and _is_same(merged[-1], clause):
            merged[-1].add(clause)
            if clause.joined_by == SEQUENCE:
                merged[-1].order = SEQUENCE
        else:
            merged.append(clause)
    return merged or ([pending] if pending is not None else [])


def _has_source(clause: _Clause) -> bool:
    return bool(clause.nouns or clause.verbs) or any(name == FAMILY for name, _ in clause.cells)


def _is_same(first: _Clause, second: _Clause) -> bool:
    """Whether the second goes on about the first: "a dog barks and growls"."""
    sources, others = _sources(first), _sources(second)
    if not (second.nouns or second.verbs):
        # only "music" or "animals": nothing new beside a source that is one
        return {c for c in second.cells if c[0] == FAMILY} <= _cells(first)
    if second.nouns or not second.verbs:
        return bool(sources) and sources == others
    # a verb without a noun belongs to the noun before it, if that can do it
    return any(source in verbs for verbs in second.verbs for source in sources) or not others


def _sources(clause: _Clause) -> list[Source]:
    """The sources a clause names: nouns first, verbs where they say more."""
    nouns = list(dict.fromkeys(clause.nouns))
    carriers = [source for source in nouns if source.is_carrier]
    others = [source for source in nouns if not source.is_carrier]
    by_verb: list[Source] = []
    if not others:
        for verbs in clause.verbs:
            able = [s for s in verbs if s in carriers]
            performed = [s for s in verbs if s.agents]
            if able:
                by_verb += [s for s in able if s not in by_verb]
            elif carriers and len(performed) == 1:
                others += performed
            elif not nouns and len(verbs) == 1:
                others += verbs
    firm = [source for source in others if source.family != _WEAK] or others
    return list(dict.fromkeys([*by_verb, *firm] if firm else carriers))


def _cells(clause: _Clause) -> set[Cell]:
    """What a clause says, its sources included."""
    cells = set(clause.cells)
    sources = _sources(clause)
    for source in sources:
        cells.update(source.cells)
    if not sources and clause.verbs:
        # whatever all who can do it have in common
        shared = set.intersection(*({*s.cells} for verbs in clause.verbs for s in verbs))
        cells |= {cell for cell in shared if cell[0] != SOURCE}
    return cells


def _order(clauses: list[_Clause]) -> str | None:
    said = [clause.order for clause in clauses if clause.order is not None]
    joins = [clause.joined_by for clause in clauses]
    if BACKGROUND in said:
        return BACKGROUND
    if SEQUENCE in said or (len(clauses) > 1 and SEQUENCE in joins):
        return SEQUENCE
    if len(clauses) < 2:
        return None
    return BACKGROUND if BACKGROUND in joins else TOGETHER
