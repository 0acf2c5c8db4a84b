"""English inflection: the forms of nouns and verbs that captions of sounds use.

Rules for regular words, lists for the others. Only the first word of a verb phrase and the last
word of a noun are inflected: "fall on a roof" becomes "falling on a roof". "rise and fall" has two.
"""

from __future__ import annotations

import re

_VOWELS = "aeiou"
# base: (past, past participle)
_IRREGULAR_VERBS = {
    "beat": ("beat", "beaten"),
    "blow": ("blew", "blown"),
    "break": ("broke", "broken"),
    "come": ("came", "come"),
    "drive": ("drove", "driven"),
    "fall": ("fell", "fallen"),
    "fly": ("flew", "flown"),
    "go": ("went", "gone"),
    "hit": ("hit", "hit"),
    "read": ("read", "read"),
    "ring": ("rang", "rung"),
    "rise": ("rose", "risen"),
    "run": ("ran", "run"),
    "sing": ("sang", "sung"),
    "speak": ("spoke", "spoken"),
    "strike": ("struck", "struck"),
    "sweep": ("swept", "swept"),
    "tear": ("tore", "torn"),
}
_IRREGULAR_PLURALS = {
    "child": "children",
    "goose": "geese",
    "knife": "knives",
    "leaf": "leaves",
    "man": "men",
    "mouse": "mice",
    "person": "people",
    "sheep": "sheep",
    "wolf": "wolves",
    "woman": "women",
}
# one vowel group, but the stress or the ending keeps the consonant single
_NOT_DOUBLED = {"sew", "box", "relax"}
_DOUBLED = {"whir"}
# begin with a vowel letter but a consonant sound, and the other way round
_TAKES_A = re.compile(r"^(?:uni|use|usu|uku|one|eu)")
_TAKES_AN = re.compile(r"^(?:hour|honest)")


def participle(verb: str) -> str:
    """Participle: "bark" to "barking"; of a phrase, its first word."""
    if (both := _two_verbs(verb)) is not None:
        return f"{participle(both[0])} and {participle(both[1])}"
    first, rest = _split(verb)
    if first.endswith("ie"):
        form = first[:-2] + "ying"
    elif first.endswith("e") and not first.endswith(("ee", "oe", "ye")):
        form = first[:-1] + "ing"
    else:
        form = _doubled(first) + "ing"
    return form + rest


def third_person(verb: str) -> str:
    """Third person: "bark" to "barks"; of a phrase, its first word."""
    if (both := _two_verbs(verb)) is not None:
        return f"{third_person(both[0])} and {third_person(both[1])}"
    first, rest = _split(verb)
    return _add_s(first) + rest


def past_forms(verb: str) -> tuple[str, str]:
    """Past and past participle: "sing" to ("sang", "sung"); of a phrase, of its first word."""
    if (both := _two_verbs(verb)) is not None:
        first_forms, second_forms = past_forms(both[0]), past_forms(both[1])
        past, done = (f"{a} and {b}" for a, b in zip(first_forms, second_forms, strict=True))
        return past, done
    first, rest = _split(verb)
    if first in _IRREGULAR_VERBS:
        past, done = _IRREGULAR_VERBS[first]
        return past + rest, done + rest
    if first.endswith("e"):
        form = first + "d"
    elif first.endswith("y") and first[-2] not in _VOWELS:
        form = first[:-1] + "ied"
    else:
        form = _doubled(first) + "ed"
    return form + rest, form + rest


def verb_forms(verb: str) -> tuple[str, ...]:
    """Every form of a verb phrase, each once, the base first."""
    forms = (verb, third_person(verb), participle(verb), *past_forms(verb))
    return tuple(dict.fromkeys(forms))


def plural(noun: str) -> str:
    """Plural: "church bell" to "church bells", "group of people" to "groups of people"."""
    head, separator, rest = noun.partition(" of ")
    before, space, last = head.rpartition(" ")
    changed = _IRREGULAR_PLURALS.get(last)
    if changed is None:
        changed = last if last.endswith("s") and not last.endswith("ss") else _add_s(last)
    return before + space + changed + separator + rest


def with_article(words: str) -> str:
    """With its article: "old bell" to "an old bell"."""
    return f"{'an' if _sounds_like_vowel(words) else 'a'} {words}"


def _sounds_like_vowel(words: str) -> bool:
    if _TAKES_A.match(words):
        return False
    return words[0] in _VOWELS or _TAKES_AN.match(words) is not None


def _two_verbs(verb: str) -> tuple[str, str] | None:
    """The two verbs of "rise and fall"; None for anything else."""
    first, joint, second = verb.partition(" and ")
    return (first, second) if joint and " " not in first + second else None


def _split(phrase: str) -> tuple[str, str]:
    first, space, rest = phrase.partition(" ")
    return first, space + rest


def _add_s(word: str) -> str:
    if word.endswith(("s", "x", "z", "ch", "sh")) or word in ("go", "echo"):
        return word + "es"
    if word.endswith("y") and word[-2] not in _VOWELS:
        return word[:-1] + "ies"
    return word + "s"


def _doubled(verb: str) -> str:
    """The form before -ing and -ed: "hum" to "humm"; "whisper" and "cheer" stay."""
    if verb in _DOUBLED:
        return verb + verb[-1]
    is_short = len(re.findall(f"[{_VOWELS}]+", verb)) == 1 and len(verb) >= 3
    ends_single = (
        is_short
        and verb[-1] not in _VOWELS + "wxy"
        and verb[-2] in _VOWELS
        and verb[-3] not in _VOWELS
    )
    return verb + verb[-1] if ends_single and verb not in _NOT_DOUBLED else verb
