"""What a prompt can say about a sound: aspects with their values, sources, and the grid of both.

A `Taxonomy` is the one description that the tagger reads words from, the grammar writes sentences
from, and coverage counts cells and pairs of. It holds no sentence forms and no prompts.

A cell is one value of one aspect ("loudness: soft"). A pair is two values of different aspects said
of the same source ("loudness: soft" and "pitch: high"), or one of the whole prompt ("order",
"length") with any other.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ptq4adm.errors import ConfigError
from ptq4adm.prompts.inflect import participle

Cell = tuple[str, str]
"""(aspect, value)."""
Pair = tuple[Cell, Cell]
"""Two cells of different aspects, in the taxonomy's order."""

MODALITY, FAMILY, SOURCE = "modality", "family", "source"
ORDER, LENGTH = "order", "length"
# aspects of the whole prompt; every other one belongs to a source
SCENE_ASPECTS = (ORDER, LENGTH)


@dataclass(frozen=True)
class Words:
    """How one value is said.

    Attributes:
        adjectives: before the source: "loud".
        tails: after the clause, or first in the sentence: "in the distance".
        also: understood, never written.
    """

    adjectives: tuple[str, ...] = ()
    tails: tuple[str, ...] = ()
    also: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[str, ...]:
        """Every phrase."""
        return (*self.adjectives, *self.tails, *self.also)


@dataclass(frozen=True)
class Aspect:
    """One column of the grid.

    Attributes:
        name: such as "loudness".
        values: value to its words; sources, modality, order and length have none here.
        is_paired: whether its cells also count in pairs.
    """

    name: str
    values: Mapping[str, Words]
    is_paired: bool = True


@dataclass(frozen=True)
class Action:
    """What a source does.

    Attributes:
        verb: base form of a verb phrase, "play a {}melody"; an adjective may go where {} stands.
        without: aspects that cannot be said with it, such as the tempo of one held note.
    """

    verb: str
    without: frozenset[str] = frozenset()

    @property
    def plain(self) -> str:
        """The phrase without an adjective."""
        return self.verb.replace("{}", "")


@dataclass(frozen=True)
class Source:
    """One thing that sounds.

    Attributes:
        name: unique in its taxonomy.
        family: a value of the aspect "family".
        modality: a value of the aspect "modality".
        nouns: its names. A trailing "~" marks a mass noun ("rain~"), "+" a plural ("footsteps+").
        actions: what it does.
        traits: aspects that can be said of it.
        also: further names and phrases, understood but never written.
        agents: who performs it, for sources that are actions ("laughing"): written as the noun, but
            the verb is what names the source.
        is_carrier: whether it gives way to another source in its clause, as the man does in "a man
            playing a guitar".
        avoids: words that are not written of it: an instrument has a register, a bird a pitch.
        never: cells that make no sense of it: ocean waves are not indoors.
    """

    name: str
    family: str
    modality: str
    nouns: tuple[str, ...]
    actions: tuple[Action, ...]
    traits: frozenset[str]
    also: tuple[str, ...] = ()
    agents: tuple[str, ...] = ()
    is_carrier: bool = False
    avoids: frozenset[str] = frozenset()
    never: frozenset[Cell] = frozenset()

    def tails(self, words: Words) -> tuple[str, ...]:
        """The tails of a value that may be written of this source."""
        return tuple(t for t in words.tails if self.avoids.isdisjoint(t.split()))

    @property
    def cells(self) -> tuple[Cell, Cell, Cell]:
        """What naming the source says."""
        return ((MODALITY, self.modality), (FAMILY, self.family), (SOURCE, self.name))


@dataclass(frozen=True)
class Taxonomy:
    """Aspects and sources; checked when it is made.

    Attributes:
        aspects: in the order of the grid.
        sources: in order.
        apart: aspects that are never said together, such as the order of two sources and the
            loudness of one, where a model never heard of both.

    Raises:
        ConfigError: if two aspects or sources share a name, or a source names what no aspect has.
    """

    aspects: tuple[Aspect, ...]
    sources: tuple[Source, ...]
    apart: frozenset[frozenset[str]] = frozenset()
    _ranks: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ranks", {a.name: i for i, a in enumerate(self.aspects)})
        names = [source.name for source in self.sources]
        if len(self._ranks) < len(self.aspects) or len(set(names)) < len(names):
            raise ConfigError("taxonomy: two aspects, or two sources, have one name")
        for source in self.sources:
            self._check(source)

    def _check(self, source: Source) -> None:
        for aspect, value in source.cells:
            if aspect in self._ranks and value not in self.aspect(aspect).values:
                raise ConfigError(f"source {source.name!r}: {value!r} is no {aspect}")
        unknown = sorted(source.traits - self._ranks.keys())
        if unknown or not source.actions or not (source.nouns or source.agents):
            raise ConfigError(
                f"source {source.name!r}: needs actions, nouns or agents, and traits that are "
                f"aspects (unknown: {', '.join(unknown) or 'none'})"
            )

    def aspect(self, name: str) -> Aspect:
        """The aspect of that name.

        Raises:
            ConfigError: if there is none.
        """
        if name not in self._ranks:
            raise ConfigError(f"aspect {name!r}: unknown; aspects are {', '.join(self._ranks)}")
        return self.aspects[self._ranks[name]]

    def source(self, name: str) -> Source:
        """The source of that name.

        Raises:
            ConfigError: if there is none.
        """
        if name not in self._sources:
            raise ConfigError(f"source {name!r}: unknown to this taxonomy")
        return self._sources[name]

    @property
    def attributes(self) -> tuple[str, ...]:
        """Aspects said of a source by words of their own, in order."""
        named = (MODALITY, FAMILY, SOURCE, *SCENE_ASPECTS)
        return tuple(a.name for a in self.aspects if a.name not in named)

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """Every cell that some source can carry, or that is one of the whole prompt, in order."""
        found = {cell for source in self.sources for cell in self._cells_of(source)}
        return tuple(c for c in self._order if c in found or c[0] in SCENE_ASPECTS)

    @cached_property
    def pairs(self) -> tuple[Pair, ...]:
        """Every pair that one source can carry, in order.

        Pairs that no source can carry ("speech" with the family "animal") are not part of the grid.
        """
        found: dict[Pair, None] = {}
        scene = [cell for cell in self._order if cell[0] in SCENE_ASPECTS]
        for source in self.sources:
            for pair in self.pairs_of([*self._cells_of(source), *scene]):
                if self._fits_one_action(source, pair):
                    found[pair] = None
        return tuple(sorted(found, key=self._pair_rank))

    def pairs_of(self, cells: Iterable[Cell]) -> Iterator[Pair]:
        """Pairs among cells that hold together, without those whose aspects are not paired."""
        known = {cell for cell in cells if self.aspect(cell[0]).is_paired}
        for first, second in itertools.combinations(sorted(known, key=self._cell_rank), 2):
            if first[0] != second[0] and frozenset((first[0], second[0])) not in self.apart:
                yield first, second

    def sayings(self, action: Action) -> frozenset[Cell]:
        """Cells that an action's own words say: "play a held note" says its style."""
        return self._sayings[action.plain]

    @cached_property
    def _sources(self) -> dict[str, Source]:
        return {source.name: source for source in self.sources}

    @cached_property
    def _sayings(self) -> dict[str, frozenset[Cell]]:
        phrases = [
            (phrase, (name, value))
            for name in self.attributes
            for value, words in self.aspect(name).values.items()
            for phrase in words.all
        ]
        found: dict[str, frozenset[Cell]] = {}
        for action in (action for source in self.sources for action in source.actions):
            # "rise and fall" is known by "rising and falling"
            padded = f" {action.plain} | {participle(action.plain)} "
            said = [(phrase, cell) for phrase, cell in phrases if f" {phrase} " in padded]
            # "a broken chord" is no chord: a phrase inside a longer one does not count
            found[action.plain] = frozenset(
                cell
                for phrase, cell in said
                if not any(phrase != other and f" {phrase} " in f" {other} " for other, _ in said)
            )
        return found

    @cached_property
    def _order(self) -> dict[Cell, int]:
        cells = ((aspect.name, value) for aspect in self.aspects for value in aspect.values)
        return {cell: i for i, cell in enumerate(cells)}

    def _cell_rank(self, cell: Cell) -> int:
        return self._order[cell]

    def _pair_rank(self, pair: Pair) -> tuple[int, int]:
        return self._order[pair[0]], self._order[pair[1]]

    def _cells_of(self, source: Source) -> list[Cell]:
        """Cells that a source can carry."""
        said = (
            (name, value)
            for name in self.attributes
            if name in source.traits
            for value in self._sayable(source, name)
        )
        named = [cell for cell in source.cells if cell in self._order]
        return [*named, *(cell for cell in said if self._fits_one_action(source, [cell]))]

    def _sayable(self, source: Source, name: str) -> list[str]:
        """Values of an attribute for which this source has words: its own, or of its actions."""
        by_action = {v for a in source.actions for n, v in self.sayings(a) if n == name}
        return [
            value
            for value, words in self.aspect(name).values.items()
            if value in by_action or words.adjectives or words.tails
        ]

    def _fits_one_action(self, source: Source, cells: Sequence[Cell]) -> bool:
        return any(self.fits(source, action, cells) for action in source.actions)

    def fits(self, source: Source, action: Action, cells: Iterable[Cell]) -> bool:
        """Whether a source doing this can be said to have these attributes."""
        said = dict(self.sayings(action))
        for name, value in cells:
            if name not in self.attributes:
                continue
            if name not in source.traits or name in action.without:
                return False
            if (name, value) in source.never:
                return False
            words = self.aspect(name).values[value]
            if said.get(name, value) != value:
                return False
            if name not in said and not (words.adjectives or words.tails):
                return False
        return True
