"""What is wrong with prompts somebody gives: refused, left out, or said in a warning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ptq4adm.errors import PromptError
from ptq4adm.prompts.domain import Domain
from ptq4adm.prompts.duplicates import NearDuplicates, plain_key
from ptq4adm.prompts.lexicon import PUNCTUATION, words_of

UNREAD_WORDS = 64
"""Words a prompt is read to where no encoder says more: most text encoders stop at 77 tokens."""

# share of its letters, and of its words, under which a prompt does not look English
_ASCII_SHARE = 0.7
_KNOWN_SHARE = 0.25
_SHOWN = 60  # characters of a prompt in a message
_NAMED = 5  # items listed in a message
_COMMON_WORDS = frozenset(
    """a about above across after again against all along also am an and another any are around as
    at back be because been before behind being below beneath beside between big both but by can
    comes coming could did do does doing down each every few first for from further gets getting
    goes going had has have having he hear heard her here high him his how i if in inside into is
    it its just kind large last left like little long low made make makes making many more most
    moving near new next night no nor not now of off old on once one only onto or other our out
    outside over own past people place playing put quite right room same several she short small so
    some someone something sound sounds such tall than that the their them then there these they
    thing this those through time to together too top toward towards two type under until up upon
    used very was way we were what when where which while who whose will with within without would
    you young""".split()
)


@dataclass(frozen=True)
class CheckedPrompts:
    """Prompts that can be used.

    Attributes:
        prompts: in their order, with plain spaces.
        read: what is read of each.
        warnings: what was left out, and what looks wrong.
    """

    prompts: list[str]
    read: list[str]
    warnings: list[str]


def check_seeds(
    seeds: Sequence[str],
    domain: Domain,
    *,
    exclude: Sequence[str] = (),
    read: Callable[[str], str] | None = None,
) -> CheckedPrompts:
    """Seeds without duplicates and reserved captions, and what else there is to say of them.

    Args:
        seeds: none empty.
        domain: whose words they should use.
        exclude: prompts that must not be used.
        read: the part of a prompt that the encoder reads; None for the first 64 words.

    Raises:
        PromptError: if there is no seed, one is empty or no string, or none says anything.
    """
    texts = _check_types(seeds)
    warnings: list[str] = []
    texts = _without_duplicates(texts, warnings)
    texts = _without_reserved(texts, domain, exclude, warnings)
    parts = [_first_words(text) if read is None else read(text) for text in texts]
    for text, part in zip(texts, parts, strict=True):
        if part != text:
            warnings.append(
                f"{_quoted(text)} has {len(text)} characters, of which {len(part)} are read; the "
                "rest is not counted: shorten it"
            )
    if all(domain.tagger.tag(part).is_empty for part in parts):
        raise PromptError(
            f"seeds: not one of the {len(texts)} says anything in the domain {domain.name!r}, such "
            f"as {_quoted(texts[0])}; write English captions of sounds: 'a dog barks far away'"
        )
    _warn_of_language(texts, domain, warnings)
    return CheckedPrompts(texts, parts, warnings)


def _check_types(seeds: Sequence[str]) -> list[str]:
    if isinstance(seeds, str):
        raise PromptError("seeds: got one string, needs a list of prompts")
    if not seeds:
        raise PromptError(
            "seeds: got an empty list, needs at least one prompt; None takes the domain's own"
        )
    texts = []
    for i, seed in enumerate(seeds):
        if not isinstance(seed, str):
            raise PromptError(f"seed {i}: got {type(seed).__name__}, needs a string")
        text = " ".join(seed.split())
        if not text:
            raise PromptError(f"seed {i} is empty; describe a sound, or leave the line out")
        texts.append(text)
    return texts


def _without_duplicates(texts: list[str], warnings: list[str]) -> list[str]:
    kept: dict[str, str] = {}
    for text in texts:
        # a text of which no word is Latin has no words to compare
        kept.setdefault(plain_key(text) or text, text)
    found = list(kept.values())
    if len(found) < len(texts):
        warnings.append(f"{len(texts) - len(found)} of {len(texts)} seeds are duplicates: left out")
    return found


def _without_reserved(
    texts: list[str], domain: Domain, exclude: Sequence[str], warnings: list[str]
) -> list[str]:
    refused = NearDuplicates(list(exclude))
    bad = [text for text in texts if domain.is_reserved(text) or text in refused]
    if bad:
        warnings.append(f"kept for evaluation, so left out: {_listed(bad)}")
    kept = [text for text in texts if text not in bad]
    if not kept:
        raise PromptError(
            f"seeds: all {len(texts)} are captions that are kept for evaluation; give others"
        )
    return kept


def _warn_of_language(texts: list[str], domain: Domain, warnings: list[str]) -> None:
    foreign = [text for text in texts if not looks_english(text, domain)]
    if foreign:
        warnings.append(
            f"{len(foreign)} of {len(texts)} seeds do not look English, which is all that the "
            f"tagger reads: {_listed(foreign)}"
        )
    if not domain.is_closed:
        return
    unknown = {word: None for text in texts for word in domain.unknown_words(text)}
    if unknown:
        warnings.append(
            f"words that the domain {domain.name!r} does not know: {_listed(list(unknown))}; a "
            "model of that domain makes nothing of them"
        )


def looks_english(text: str, domain: Domain) -> bool:
    """Whether a prompt is mostly ASCII letters, with a quarter of its words known ones."""
    letters = [character for character in text if character.isalpha()]
    words = [word for word in words_of(text) if word not in PUNCTUATION]
    if not letters or not words:
        return False
    ascii_share = sum(character.isascii() for character in letters) / len(letters)
    known = domain.tagger.lexicon.words | _COMMON_WORDS
    known_share = sum(word in known for word in words) / len(words)
    return ascii_share >= _ASCII_SHARE and known_share >= _KNOWN_SHARE


def _first_words(text: str) -> str:
    words = text.split()
    return text if len(words) <= UNREAD_WORDS else " ".join(words[:UNREAD_WORDS])


def _quoted(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")


def _listed(texts: Sequence[str]) -> str:
    shown = ", ".join(_quoted(text) for text in texts[:_NAMED])
    more = len(texts) - _NAMED
    return f"{shown} and {more} more" if more > 0 else shown
