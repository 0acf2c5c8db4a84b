"""Forms of nouns and verbs."""

from __future__ import annotations

import pytest

from ptq4adm.prompts.inflect import (
    participle,
    past_forms,
    plural,
    third_person,
    verb_forms,
    with_article,
)


@pytest.mark.parametrize(
    ("verb", "ing", "third", "past", "done"),
    [
        ("bark", "barking", "barks", "barked", "barked"),
        ("hum", "humming", "hums", "hummed", "hummed"),
        ("whir", "whirring", "whirs", "whirred", "whirred"),
        ("whisper", "whispering", "whispers", "whispered", "whispered"),
        ("crow", "crowing", "crows", "crowed", "crowed"),
        ("cry", "crying", "cries", "cried", "cried"),
        ("play a chord", "playing a chord", "plays a chord", "played a chord", "played a chord"),
        ("sing", "singing", "sings", "sang", "sung"),
        ("screech", "screeching", "screeches", "screeched", "screeched"),
        ("go off", "going off", "goes off", "went off", "gone off"),
        ("strike the hour", "striking the hour", "strikes the hour", "struck the hour", None),
        ("rise and fall", "rising and falling", "rises and falls", "rose and fell", None),
    ],
)
def test_verbs(verb: str, ing: str, third: str, past: str, done: str | None) -> None:
    assert participle(verb) == ing
    assert third_person(verb) == third
    assert past_forms(verb)[0] == past
    if done is not None:
        assert past_forms(verb)[1] == done
    assert len(set(verb_forms(verb))) == len(verb_forms(verb)) >= 3


@pytest.mark.parametrize(
    ("one", "many"),
    [
        ("church bell", "church bells"),
        ("puppy", "puppies"),
        ("goose", "geese"),
        ("old man", "old men"),
        ("group of people", "groups of people"),
        ("brass", "brasses"),
        ("dishes", "dishes"),
        ("church", "churches"),
    ],
)
def test_nouns(one: str, many: str) -> None:
    assert plural(one) == many


@pytest.mark.parametrize(
    ("words", "phrase"),
    [
        ("old bell", "an old bell"),
        ("bell", "a bell"),
        ("ukulele", "a ukulele"),
        ("hour", "an hour"),
        ("unit", "a unit"),
        ("one note", "a one note"),
    ],
)
def test_articles(words: str, phrase: str) -> None:
    assert with_article(words) == phrase
