"""When two prompts are one: the same words, or nearly the same set of words."""

from __future__ import annotations

import re

from ptq4adm.prompts.lexicon import PUNCTUATION, words_of

NEAR = 0.9
"""Jaccard similarity of two prompts' word stems from which on they are near duplicates.

High on purpose: "softly" for "loudly" in a prompt of ten words is a similarity of 0.82, and the
difference that calibration wants.
"""

_ARTICLES = frozenset({"a", "an", "the"})
_ENDING = re.compile(r"(?<=[a-z]{3})(?:ings?|ed|es|s)$")


def plain_key(prompt: str) -> str:
    """A prompt's words in order, without case, punctuation and articles."""
    return " ".join(w for w in words_of(prompt) if w not in PUNCTUATION and w not in _ARTICLES)


def stems(prompt: str) -> frozenset[str]:
    """Its different words without article and ending: "barks" and "barking" are one."""
    return frozenset(_ENDING.sub("", word) for word in plain_key(prompt).split())


def similarity(first: frozenset[str], second: frozenset[str]) -> float:
    """Jaccard similarity of two sets of stems, 0 to 1."""
    union = len(first | second)
    return len(first & second) / union if union else 1.0


class NearDuplicates:
    """Prompts seen so far, asked whether another one is nearly one of them."""

    def __init__(self, prompts: list[str] | tuple[str, ...] = (), near: float = NEAR) -> None:
        self.near = near
        self._by_stem: dict[str, list[frozenset[str]]] = {}
        for prompt in prompts:
            self.add(prompt)

    def add(self, prompt: str) -> None:
        """Remember a prompt."""
        found = stems(prompt)
        for stem in found:
            self._by_stem.setdefault(stem, []).append(found)

    def __contains__(self, prompt: object) -> bool:
        if not isinstance(prompt, str):
            return False
        own = stems(prompt)
        seen: set[frozenset[str]] = set()
        for stem in own:
            for other in self._by_stem.get(stem, ()):
                if other not in seen and similarity(own, other) >= self.near:
                    return True
                seen.add(other)
        return False
