"""Candidates for a domain: what to ask for, who writes it, and what of it is taken.

A generator is anything that turns requests into prompts. The grammar is the default: it works
offline and gives the same prompts for the same seed. A language model fits the same interface
(docs/prompts.md shows one); what it writes is read by the tagger and refused where it leaves the
domain, so a careless model costs candidates and not coverage.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from ptq4adm.errors import PromptError
from ptq4adm.prompts.domain import Domain
from ptq4adm.prompts.duplicates import plain_key
from ptq4adm.prompts.grammar import Grammar, Request
from ptq4adm.prompts.taxonomy import LENGTH, ORDER, SOURCE, Cell

# attributes beside the two that were asked for: so many prompts add none, one or two
_EXTRAS = (0, 0, 1, 1, 1, 2, 2)
# rounds over all pairs before a pool is given up as full
_ROUNDS = 40
_LONGEST = 300  # characters; a candidate is one sentence


class PromptGenerator(Protocol):
    """Writes prompts for requests."""

    @property
    def name(self) -> str:
        """Shown in results."""

    def __call__(self, requests: Sequence[Request], seed: int) -> Sequence[str]:
        """Prompts for these requests: any number, in any order.

        Args:
            requests: what the prompts should say.
            seed: the same seed must give the same prompts.
        """


class GrammarGenerator:
    """The grammar behind the generator's interface.

    Args:
        grammar: of the domain.
    """

    name = "grammar"

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar

    def __call__(self, requests: Sequence[Request], seed: int) -> list[str]:
        """One prompt a request; requests that no source can meet are passed over."""
        rng = random.Random(seed)
        written = (self._grammar.write(request, rng) for request in requests)
        return [text for text in written if text is not None]


def requests_for(domain: Domain, rng: random.Random) -> Iterator[Request]:
    """Endless requests: every pair and every unpaired cell of the grid, round after round.

    Each asks for one pair (or cell) and for up to two attributes more.
    """
    taxonomy = domain.taxonomy
    unpaired: list[tuple[Cell, ...]] = [
        (cell,) for cell in taxonomy.cells if not taxonomy.aspect(cell[0]).is_paired
    ]
    asked: list[tuple[Cell, ...]] = [*taxonomy.pairs, *unpaired]
    while True:
        rng.shuffle(asked)
        for cells in asked:
            yield Request(frozenset(_with_extras(domain, cells, rng).items()))


def make_pool(
    domain: Domain,
    size: int,
    seed: int,
    *,
    generator: PromptGenerator | None = None,
    refuse: Callable[[str], bool] | None = None,
) -> list[str]:
    """Different candidates of a domain, in the order in which they were written.

    Args:
        domain: what they are about.
        size: how many; fewer if the generator has no more to say.
        seed: of requests and words.
        generator: None for the domain's grammar.
        refuse: candidates to leave out, beside those that are reserved.

    Raises:
        PromptError: if not one candidate could be used.
    """
    write = GrammarGenerator(domain.grammar) if generator is None else generator
    rng = random.Random(seed)
    requests = requests_for(domain, rng)
    per_round = len(domain.taxonomy.pairs) or 1
    found: dict[str, str] = {}
    for _ in range(_ROUNDS):
        if len(found) >= size:
            break
        asked = [next(requests) for _ in range(min(per_round, 2 * (size - len(found)) + 8))]
        before = len(found)
        for text in write(asked, rng.getrandbits(32)):
            usable = _usable(domain, text)
            if usable is not None and not (refuse is not None and refuse(usable)):
                found.setdefault(plain_key(usable), usable)
        if len(found) == before:
            break
    if not found:
        raise PromptError(
            f"generator {write.name!r}: none of its prompts can be used in the domain "
            f"{domain.name!r}; it needs one English sentence a request, in the domain's words"
        )
    return list(found.values())[:size]


def _usable(domain: Domain, text: str) -> str | None:
    """The prompt with plain spaces, or None if it is no candidate."""
    clean = " ".join(text.split())
    if not clean or len(clean) > _LONGEST or domain.is_reserved(clean):
        return None
    if domain.is_closed and domain.unknown_words(clean):
        return None
    return None if domain.tagger.tag(clean).is_empty else clean


def _with_extras(domain: Domain, cells: Iterable[Cell], rng: random.Random) -> dict[str, str]:
    """Cells with further attributes that one source can have at the same time."""
    taxonomy = domain.taxonomy
    wanted = dict(cells)
    asked = set(wanted.items())
    fitting = [
        (source, action)
        for source in taxonomy.sources
        if {c for c in asked if c[0] not in (*taxonomy.attributes, ORDER, LENGTH)}
        <= set(source.cells)
        for action in source.actions
        if taxonomy.fits(source, action, asked)
    ]
    if not fitting:
        return wanted
    source, action = rng.choice(fitting)
    # the source is asked for as well: with it all that follows can be said of one thing
    if SOURCE in (aspect.name for aspect in taxonomy.aspects):
        wanted[SOURCE] = source.name
    names = [n for n in taxonomy.attributes if n in source.traits and n not in wanted]
    rng.shuffle(names)
    limit = domain.forms.joined_attributes if ORDER in wanted else domain.forms.attributes
    said = sum(name in taxonomy.attributes for name in wanted)
    for name in names[: max(0, min(rng.choice(_EXTRAS), limit - said))]:
        if ORDER in wanted and frozenset((name, ORDER)) in taxonomy.apart:
            continue
        own = dict(taxonomy.sayings(action))
        values = [own[name]] if name in own else list(taxonomy.aspect(name).values)
        fits = [v for v in values if taxonomy.fits(source, action, [*wanted.items(), (name, v)])]
        if fits:
            wanted[name] = rng.choice(fits)
    return wanted
