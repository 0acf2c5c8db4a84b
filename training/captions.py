"""The caption grammar: from a clip's true attributes to sentences, and the held-out prompts.

A caption names a source and a random subset of its aspects (register, tempo, loudness, playing
style). Training captions begin with the source; the sentence shapes that put an aspect first, or
join two aspects by "and" at the end, are reserved for `heldout_prompts`. This module knows
nothing of audio.
"""

import functools
import random

from vocabulary import (
    CLASSES,
    LOUDNESS_ADJECTIVES,
    LOUDNESS_TAILS,
    PLURALS,
    REGISTER_ADJECTIVES,
    REGISTER_TAILS,
    TEMPO_ADJECTIVES,
    TEMPO_TAILS,
    VOCABULARIES,
    Vocabulary,
)

HELDOUT_PER_CLASS = 8
HELDOUT_SEED = 20240613

RELATIONS = ("followed_by", "while", "over")
_JOINS = {
    "followed_by": ("{a} followed by {b}", "{a}, then {b}", "{a} and then {b}"),
    "while": ("{a} while {b}", "{a} and {b}", "{a} together with {b}"),
    "over": ("{a} over {b}", "{a} with {b} in the background"),
}


def _with_article(words: str) -> str:
    if words.endswith(PLURALS):
        return words
    return ("an " if words[0] in "aeiou" else "a ") + words


def _tail(vocabulary: Vocabulary, aspect: str, attributes: dict, rng: random.Random) -> str:
    """An aspect as the end of a sentence: "in a low register", "slowly", "at full volume"."""
    value = attributes[aspect]
    if aspect == "register":
        return rng.choice(REGISTER_TAILS[vocabulary.pitch_word][value])
    return rng.choice((TEMPO_TAILS if aspect == "tempo" else LOUDNESS_TAILS)[value])


def _noun(vocabulary: Vocabulary, attributes: dict, aspects: set[str], rng: random.Random) -> str:
    """The source with its article; loudness and register are its adjectives."""
    words = []
    if "loudness" in aspects and LOUDNESS_ADJECTIVES[attributes["loudness"]]:
        words.append(rng.choice(LOUDNESS_ADJECTIVES[attributes["loudness"]]))
    if "register" in aspects:
        words.append(rng.choice(REGISTER_ADJECTIVES[attributes["register"]]))
    nouns = vocabulary.voices[attributes["voice"]] if vocabulary.voices else vocabulary.nouns
    return _with_article(" ".join([*words, rng.choice(nouns)]))


def _action(vocabulary: Vocabulary, attributes: dict, aspects: set[str], rng: random.Random) -> str:
    """The participle, with the playing style and perhaps the tempo as the style's adjective."""
    if "style" not in aspects:
        return rng.choice(vocabulary.actions)
    style = rng.choice(vocabulary.styles[attributes["style"]])
    if not vocabulary.style_is_object:
        return style
    if "tempo" in aspects and not style.startswith("the "):
        style = f"{rng.choice(TEMPO_ADJECTIVES[attributes['tempo']])} {style}"
    played = style if style.startswith("the ") else _with_article(style)
    return f"{rng.choice(vocabulary.actions)} {played}"


def _clause(
    source: str, attributes: dict, aspects: set[str], rng: random.Random
) -> tuple[str, list[str]]:
    """Say the aspects by adjectives, action and tails: the clause, and the tails apart."""
    vocabulary = VOCABULARIES[source]
    candidates = sorted({"register", "loudness"} & aspects)  # a set's order changes between runs
    adjectives = {name for name in candidates if rng.random() < 0.6}
    adjectives -= {"loudness"} if attributes.get("loudness") == "normal" else set()
    noun = _noun(vocabulary, attributes, adjectives, rng)
    in_action = {"style"} & aspects
    if in_action and "tempo" in aspects and vocabulary.style_is_object and rng.random() < 0.5:
        in_action.add("tempo")
    has_action = bool(in_action) or "tempo" in aspects or rng.random() < 0.5
    action = _action(vocabulary, attributes, in_action, rng) if has_action else ""
    said = adjectives | in_action
    if "the same note" in action:  # has no place for a tempo adjective
        said.discard("tempo")
    tails = [_tail(vocabulary, name, attributes, rng) for name in sorted(aspects - said)]
    return f"{noun} {action}".strip(), tails


def _aspects(attributes: dict, count: int, rng: random.Random) -> set[str]:
    names = [name for name in ("register", "tempo", "loudness", "style") if name in attributes]
    return set(rng.sample(names, min(count, len(names))))


def describe(source: str, attributes: dict, rng: random.Random, n_aspects: int) -> str:
    """Write one training caption of a single-source clip.

    Args:
        source: a key of `vocabulary.VOCABULARIES`.
        attributes: the clip's true aspects, e.g. ``{"register": "low", "loudness": "soft"}``.
        rng: decides the words.
        n_aspects: how many aspects the caption names, 0 for the source alone.
    """
    clause, tails = _clause(source, attributes, _aspects(attributes, n_aspects, rng), rng)
    rng.shuffle(tails)
    if rng.random() < 0.25:
        clause = f"the sound of {clause}"
    return f"{clause} {tails[0]}" if len(tails) == 1 else ", ".join([clause, *tails])


def describe_mixture(
    attributes: dict, sources: list[str], rng: random.Random, n_aspects: int
) -> str:
    """Write one training caption of a mixture.

    Args:
        attributes: ``{"relation": one of RELATIONS, "first": aspects, "second": aspects}``.
        sources: the two sources, in the same order.
        rng: decides the words.
        n_aspects: how many aspects are named of each source.
    """
    parts = []
    for source, key in zip(sources, ("first", "second"), strict=True):
        clause, tails = _clause(
            source, attributes[key], _aspects(attributes[key], n_aspects, rng), rng
        )
        parts.append(" ".join([clause, *tails[:1]]))
    return rng.choice(_JOINS[attributes["relation"]]).format(a=parts[0], b=parts[1])


def clip_captions(sources: list[str], attributes: dict, seed: int, count: int = 3) -> list[str]:
    """Write `count` different training captions of one clip: full, middling and short.

    Raises:
        ValueError: if the grammar cannot make that many different ones.
    """
    rng = random.Random(seed)
    captions: list[str] = []
    for attempt in range(50 * count):
        if len(captions) == count:
            return captions
        if len(sources) == 2:
            text = describe_mixture(attributes, sources, rng, n_aspects=rng.choice((0, 1)))
        else:
            n_aspects = ((3, 4), (1, 2), (0, 1))[(len(captions) + attempt // 20) % 3]
            text = describe(sources[0], attributes, rng, rng.choice(n_aspects))
        if text not in captions and text not in _heldout_texts():
            captions.append(text)
    raise ValueError(f"no {count} different captions for {sources} with {attributes}")


def _heldout_text(source: str, attributes: dict, shape: int, rng: random.Random) -> str:
    """One prompt in a sentence shape that `describe` never produces."""
    vocabulary = VOCABULARIES[source]
    style = {"style"} & attributes.keys()
    names = sorted({"register", "tempo", "loudness"} & attributes.keys())
    rng.shuffle(names)
    lead, rest = names[0], names[1:]
    tails = [_tail(vocabulary, name, attributes, rng) for name in names]
    bare = _noun(vocabulary, attributes, set(), rng)
    if shape == 0:  # an aspect first
        return f"{tails[0]}, {bare} {_action(vocabulary, attributes, style, rng)}"
    if shape == 1 and rest:  # two aspects at the end, joined by "and"
        return f"{bare} {_action(vocabulary, attributes, set(), rng)}, {' and '.join(tails[:2])}"
    if shape == 2:  # an aspect first, then "the sound of" with adjectives
        adjectives = {"register", "loudness"} & attributes.keys() - {lead}
        return f"{tails[0]}, the sound of {_noun(vocabulary, attributes, adjectives, rng)}"
    return f"{tails[0]}, the sound of {bare} {_action(vocabulary, attributes, style, rng)}"


@functools.cache
def _heldout() -> tuple[tuple[str, str], ...]:
    rng = random.Random(HELDOUT_SEED)
    prompts: list[tuple[str, str]] = []
    for name in CLASSES:
        texts: list[str] = []
        while len(texts) < HELDOUT_PER_CLASS:
            text = _heldout_text(name, VOCABULARIES[name].draw(rng), len(texts) % 4, rng)
            if text not in texts:
                texts.append(text)
        prompts += [(name, text) for text in texts]
    return tuple(prompts)


@functools.cache
def _heldout_texts() -> frozenset[str]:
    return frozenset(text for _, text in _heldout())


def heldout_prompts() -> list[tuple[str, str]]:
    """The prompts kept from training: (class name, prompt), eight for each of the ten classes."""
    return list(_heldout())
