"""From a request of cells to a sentence that says them: many forms, decided by a seeded generator.

What the words are is the taxonomy's; a `Forms` holds how sentences are built. The grammar promises
nothing about what it returns: the tagger reads every sentence again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from ptq4adm.prompts.inflect import participle, plural, third_person, with_article
from ptq4adm.prompts.lexicon import PUNCTUATION, is_mass, is_plural, noun_text, words_of
from ptq4adm.prompts.taxonomy import (
    FAMILY,
    LENGTH,
    MODALITY,
    ORDER,
    SOURCE,
    Action,
    Cell,
    Source,
    Taxonomy,
)

# sentences tried until one has the length that was asked for; from the half on, words are added
_TRIES = 16
_ING, _FINITE = "ing", "finite"

LengthOf = Callable[[int], str]
"""From a number of words to a value of the aspect "length"."""


@dataclass(frozen=True)
class Request:
    """What a prompt should say.

    Attributes:
        cells: at most one of each aspect.
    """

    cells: frozenset[Cell]

    @property
    def wanted(self) -> dict[str, str]:
        """Aspect to value, in the order of names."""
        return dict(sorted(self.cells))

    def instruction(self) -> str:
        """The request in words, for a language model."""
        said = "; ".join(f"{name}: {value}" for name, value in self.wanted.items())
        return f"Write one caption of a sound, in English, a single sentence. It says: {said}."


@dataclass(frozen=True)
class Forms:
    """How sentences are built.

    Attributes:
        openings: a sentence around the clauses, {} in it; only the first one, "{}", lets a tail go
            first or a verb be finite.
        joins: order to templates with {a} and {b}.
        is_finite: whether "a dog barks" may stand for "a dog barking".
        can_lead: whether a tail may go first: "in the distance, a dog barks".
        can_drop_action: whether a source may stand alone: "a flute".
        adjective_share: how often an adjective is taken where a tail could be.
        plural_share: how often a noun is plural.
        attributes: of one source, at most.
        joined_attributes: of each of two joined sources, at most.
    """

    openings: tuple[str, ...]
    joins: Mapping[str, tuple[str, ...]]
    is_finite: bool = True
    can_lead: bool = True
    can_drop_action: bool = False
    adjective_share: float = 0.5
    plural_share: float = 0.2
    attributes: int = 3
    joined_attributes: int = 2


@dataclass
class _Clause:
    """One source with what is said of it, ready to be inflected."""

    noun: str
    is_plural: bool
    verb: str
    tails: list[str]

    def text(self, form: str, lead: str | None = None) -> str:
        """The clause with its verb as participle or finite."""
        tails = [tail for tail in self.tails if tail != lead]
        if not self.verb:
            said = self.noun
        elif form == _ING:
            said = f"{self.noun} {participle(self.verb)}"
        else:
            said = f"{self.noun} {self.verb if self.is_plural else third_person(self.verb)}"
        # "a dog barks loudly", but "a dog barks, growing louder"
        is_apart = len(tails) > 1 or any(t.split()[0].endswith("ing") for t in tails)
        end = "".join(f"{',' if is_apart else ''} {tail}" for tail in tails)
        return f"{lead}, {said}{end}" if lead else said + end


class Grammar:
    """Writes prompts of one domain.

    Args:
        taxonomy: whose words are used.
        forms: how sentences are built.
        length_of: from a number of words to a value of the aspect "length".
    """

    def __init__(self, taxonomy: Taxonomy, forms: Forms, length_of: LengthOf) -> None:
        self.taxonomy = taxonomy
        self.forms = forms
        self.length_of = length_of

    def write(self, request: Request, rng: random.Random) -> str | None:
        """One sentence, or None if no source can be all that is asked for."""
        wanted = request.wanted
        length = wanted.pop(LENGTH, None)
        sources = self._able(wanted)
        if not sources:
            return None
        text = ""
        for attempt in range(_TRIES):
            is_padded = length == "long" and attempt >= _TRIES // 2
            text = self._sentence(rng.choice(sources), wanted, rng, length, is_padded=is_padded)
            if length is None or self._length(text) == length:
                break
        return text

    def _able(self, wanted: Mapping[str, str]) -> list[tuple[Source, Action]]:
        named = {(n, v) for n, v in wanted.items() if n in (MODALITY, FAMILY, SOURCE)}
        said = [(n, v) for n, v in wanted.items() if n in self.taxonomy.attributes]
        able = []
        for source in self.taxonomy.sources:
            if named <= set(source.cells):
                fitting = [a for a in source.actions if self.taxonomy.fits(source, a, said)]
                able += [(source, action) for action in fitting]
        return able

    def _length(self, text: str) -> str:
        return self.length_of(sum(word not in PUNCTUATION for word in words_of(text)))

    def _sentence(
        self,
        chosen: tuple[Source, Action],
        wanted: Mapping[str, str],
        rng: random.Random,
        length: str | None,
        *,
        is_padded: bool,
    ) -> str:
        source, action = chosen
        said = {n: v for n, v in wanted.items() if n in self.taxonomy.attributes}
        order = wanted.get(ORDER)
        if is_padded:
            said |= self._more(source, action, said, rng, is_joined=order is not None)
        clause = self._clause(source, action, said, rng, is_short=length == "short")
        opening = "{}" if length == "short" else rng.choice(self.forms.openings)
        is_free = opening == "{}"
        form = _FINITE if is_free and self.forms.is_finite and rng.random() < 0.5 else _ING
        if order is None:
            lead = None
            if is_free and self.forms.can_lead and clause.tails and rng.random() < 0.3:
                lead = rng.choice(clause.tails)
            return opening.format(clause.text(form, lead))
        other = self._other(source, rng, is_padded=is_padded, is_short=length == "short")
        parts = [clause, other]
        if rng.random() < 0.5:
            parts.reverse()
        a, b = (part.text(form) for part in parts)
        join = rng.choice(self.forms.joins[order])
        if join.endswith("in the background") and form == _FINITE:
            b = parts[1].text(_ING)  # "with b in the background" takes no finite verb
        return opening.format(join.format(a=a, b=b))

    def _more(
        self,
        source: Source,
        action: Action,
        said: Mapping[str, str],
        rng: random.Random,
        *,
        is_joined: bool,
    ) -> dict[str, str]:
        """Attributes nobody asked for, to make a prompt longer."""
        limit = self.forms.joined_attributes if is_joined else self.forms.attributes
        more: dict[str, str] = {}
        names = [n for n in self.taxonomy.attributes if n in source.traits and n not in said]
        rng.shuffle(names)
        for name in names[: max(0, min(2, limit - len(said)))]:
            if is_joined and frozenset((name, ORDER)) in self.taxonomy.apart:
                continue
            values = [
                value
                for value in self.taxonomy.aspect(name).values
                if self.taxonomy.fits(source, action, [(name, value)])
            ]
            if values:
                more[name] = rng.choice(values)
        return more

    def _other(
        self, source: Source, rng: random.Random, *, is_padded: bool, is_short: bool
    ) -> _Clause:
        """The second source of a prompt with an order."""
        others = [s for s in self.taxonomy.sources if s.name != source.name]
        other = rng.choice(others)
        action = rng.choice(other.actions)
        said = self._more(other, action, {}, rng, is_joined=True) if is_padded else {}
        return self._clause(other, action, said, rng, is_short=is_short)

    def _clause(
        self,
        source: Source,
        action: Action,
        said: Mapping[str, str],
        rng: random.Random,
        *,
        is_short: bool,
    ) -> _Clause:
        adjectives: list[str] = []
        tails: list[str] = []
        verb = action.plain
        spoken = dict(self.taxonomy.sayings(action))
        for name in self.taxonomy.attributes:
            if name not in said or name in spoken:
                continue
            words = self.taxonomy.aspect(name).values[said[name]]
            own = source.tails(words)
            fits_noun = not (source.is_carrier or source.agents) and len(adjectives) < 2
            if "{}" in action.verb and name == "tempo":
                if words.adjectives and rng.random() < self.forms.adjective_share:
                    verb = action.verb.replace("{}", rng.choice(words.adjectives) + " ")
                    continue
                fits_noun = False
            is_adjective = words.adjectives and fits_noun and name != "tempo"
            if is_adjective and (not own or is_short or rng.random() < self.forms.adjective_share):
                adjectives.append(rng.choice(words.adjectives))
            elif own:
                tails.append(min(own, key=len) if is_short else rng.choice(own))
            else:
                adjectives.append(rng.choice(words.adjectives))
        rng.shuffle(tails)
        clause = self._noun_phrase(source, adjectives, rng)
        is_needed = bool(spoken) or "tempo" in said or bool(source.agents)
        if self.forms.can_drop_action and not is_needed and rng.random() < 0.4:
            verb = ""
        return replace(clause, verb=_fix_article(verb), tails=tails)

    def _noun_phrase(
        self, source: Source, adjectives: Iterable[str], rng: random.Random
    ) -> _Clause:
        noun = rng.choice(source.agents or source.nouns)
        words = " ".join([*adjectives, noun_text(noun)])
        if is_mass(noun) or is_plural(noun):
            return _Clause(words, is_plural(noun), "", [])
        if not source.agents and rng.random() < self.forms.plural_share:
            return _Clause(plural(words), True, "", [])
        return _Clause(with_article(words), False, "", [])


def _fix_article(verb: str) -> str:
    """Make "play a arpeggio" "play an arpeggio": the word after "a" may have been put in."""
    head, found, rest = verb.partition(" a ")
    return f"{head} {with_article(rest)}" if found else verb
