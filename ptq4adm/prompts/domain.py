"""A domain: what a model can be asked for, and the seed prompts that ask for it.

A taxonomy, the sentence forms, seeds, and the captions that must never be used. Two come with the
package: "general" and that of the shipped pipeline, "audioldm-tiny".
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

from ptq4adm.errors import PromptError
from ptq4adm.prompts.general import GENERAL_FORMS, general_taxonomy
from ptq4adm.prompts.general_aspects import length_of
from ptq4adm.prompts.grammar import Forms, Grammar
from ptq4adm.prompts.lexicon import PUNCTUATION, words_of
from ptq4adm.prompts.tables import read_lines
from ptq4adm.prompts.tagger import Tagger
from ptq4adm.prompts.taxonomy import Taxonomy
from ptq4adm.prompts.tiny import TINY_FORMS, TINY_TAXONOMY

GENERAL, TINY = "general", "audioldm-tiny"
_KEY_DIGITS = 8


@dataclass(frozen=True)
class Domain:
    """What prompts may be about.

    Attributes:
        name: shown in results.
        taxonomy: aspects and sources.
        forms: of the sentences that are written.
        seeds: prompts to start from when the caller has none.
        reserved: `reserved_key` of captions that are kept for evaluation.
        is_closed: whether a word outside the taxonomy means nothing to the model.
    """

    name: str
    taxonomy: Taxonomy
    forms: Forms
    seeds: tuple[str, ...] = ()
    reserved: frozenset[str] = frozenset()
    is_closed: bool = False

    @cached_property
    def tagger(self) -> Tagger:
        """Reads prompts of this domain."""
        return Tagger(self.taxonomy, length_of)

    @cached_property
    def grammar(self) -> Grammar:
        """Writes prompts of this domain."""
        return Grammar(self.taxonomy, self.forms, length_of)

    @cached_property
    def vocabulary(self) -> frozenset[str]:
        """Words of the taxonomy and of the sentence forms."""
        forms = (*self.forms.openings, *(t for joins in self.forms.joins.values() for t in joins))
        written = {word for form in forms for word in words_of(form.replace("{}", ""))}
        return self.tagger.lexicon.vocabulary | written | {"a", "an", "the"}

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of a prompt that are not in the vocabulary, each once."""
        words = dict.fromkeys(word for word in words_of(prompt) if word not in PUNCTUATION)
        return [word for word in words if word not in self.vocabulary]

    def is_reserved(self, prompt: str) -> bool:
        """Whether a prompt is one of the captions kept for evaluation."""
        return bool(self.reserved) and reserved_key(prompt) in self.reserved


def reserved_key(prompt: str) -> str:
    """Names a caption without showing it: SHA-256 of its words, 8 hex digits.

    Case and punctuation do not matter. A prompt is taken for another one by chance once in
    millions, and is then left out.
    """
    return hashlib.sha256(" ".join(words_of(prompt)).encode()).hexdigest()[:_KEY_DIGITS]


def find_domain(name: str) -> Domain:
    """A domain that comes with the package.

    Raises:
        PromptError: if there is none of that name.
    """
    if name not in _DOMAINS:
        raise PromptError(
            f"prompt domain {name!r}: unknown; domains are {', '.join(_DOMAINS)}, or pass a "
            "ptq4adm.prompts.Domain of your own"
        )
    return _DOMAINS[name]()


@cache
def _general() -> Domain:
    return Domain(GENERAL, general_taxonomy(), GENERAL_FORMS, read_lines("seeds-general.txt"))


@cache
def _tiny() -> Domain:
    return Domain(
        TINY,
        TINY_TAXONOMY,
        TINY_FORMS,
        seeds=read_lines("seeds-audioldm-tiny.txt"),
        reserved=frozenset(read_lines("reserved-audioldm-tiny.txt")),
        is_closed=True,
    )


_DOMAINS: dict[str, Callable[[], Domain]] = {GENERAL: _general, TINY: _tiny}
