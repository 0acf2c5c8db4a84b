"""The grid of aspects: which cells and pairs there are, and what is refused."""

from __future__ import annotations

import itertools

import pytest

from ptq4adm.errors import ConfigError
from ptq4adm.prompts import (
    Action,
    Aspect,
    Domain,
    Source,
    Taxonomy,
    Words,
    find_domain,
    measure,
)
from ptq4adm.prompts.general_aspects import parse_aspects
from ptq4adm.prompts.general_sources import parse_sources

PITCH = Aspect("pitch", {"low": Words(("deep",)), "high": Words((), ("at a high pitch",))})
STYLE = Aspect("style", {"held": Words(also=("held note",))})


def _source(name: str, *verbs: str, traits: str = "", **more: object) -> Source:
    actions = tuple(Action(verb) for verb in verbs)
    return Source(name, "f", "m", (name,), actions, frozenset(traits.split()), **more)  # type: ignore[arg-type]


def _taxonomy(*sources: Source, **more: object) -> Taxonomy:
    names = {source.name: Words() for source in sources}
    return Taxonomy((Aspect("source", names), PITCH, STYLE), sources, **more)  # type: ignore[arg-type]


def test_pairs_are_those_that_one_source_can_carry() -> None:
    flute = _source("flute", "play", "play a held note", traits="pitch style")
    taxonomy = _taxonomy(flute, _source("bell", "ring", traits="pitch"), _source("drum", "play"))
    said = {(a[1], b[1]) for a, b in taxonomy.pairs}
    assert said == {
        ("flute", "low"),
        ("flute", "high"),
        ("flute", "held"),
        ("low", "held"),
        ("high", "held"),
        ("bell", "low"),
        ("bell", "high"),
    }


def test_cells_are_those_that_some_source_can_carry() -> None:
    bell = _source("bell", "ring", traits="pitch", never=frozenset({("pitch", "low")}))
    assert _taxonomy(bell).cells == (("source", "bell"), ("pitch", "high"))
    general = find_domain("general").taxonomy
    animals = tuple(s for s in general.sources if s.family == "animal")
    part = Taxonomy(general.aspects, animals)
    assert {v for a, v in part.cells if a == "family"} == {"animal"}
    assert {v for a, v in part.cells if a == "source"} == {s.name for s in animals}
    # what it cannot carry may still be said, and counts for nothing
    domain = Domain("animals", part, find_domain("general").forms)
    assert 0 < measure(domain.tagger, ["a dog barking", "loud music"]).cells < 0.2


def test_an_action_can_rule_an_aspect_out() -> None:
    held = Action("play a held note", without=frozenset({"pitch"}))
    flute = Source("flute", "f", "m", ("flute",), (held,), frozenset({"pitch", "style"}))
    assert [(a[1], b[1]) for a, b in _taxonomy(flute).pairs] == [("flute", "held")]


def test_never_and_apart_leave_pairs_out() -> None:
    bell = _source("bell", "ring", traits="pitch", never=frozenset({("pitch", "low")}))
    assert [(a[1], b[1]) for a, b in _taxonomy(bell).pairs] == [("bell", "high")]
    apart = frozenset({frozenset({"source", "pitch"})})
    assert _taxonomy(_source("bell", "ring", traits="pitch"), apart=apart).pairs == ()


def test_a_longer_phrase_hides_a_shorter_one() -> None:
    taxonomy = find_domain("audioldm-tiny").taxonomy
    assert taxonomy.sayings(Action("play a {}broken chord")) == {("style", "arpeggio")}
    assert taxonomy.sayings(Action("play a held chord")) == {("style", "chord")}
    assert taxonomy.sayings(Action("rise and fall")) == {("style", "waves")}


@pytest.mark.parametrize("name", ["general", "audioldm-tiny"])
def test_grids_have_no_value_without_words_or_sources(name: str) -> None:
    taxonomy = find_domain(name).taxonomy
    paired = {aspect.name for aspect in taxonomy.aspects if aspect.is_paired}
    seen = {cell for pair in taxonomy.pairs for cell in pair}
    assert seen == {cell for cell in taxonomy.cells if cell[0] in paired}
    assert all(a[0] != b[0] for a, b in taxonomy.pairs)
    assert len(set(taxonomy.pairs)) == len(taxonomy.pairs) >= 400


@pytest.mark.parametrize("name", ["general", "audioldm-tiny"])
def test_no_phrase_says_two_values_of_one_aspect(name: str) -> None:
    for aspect in find_domain(name).taxonomy.aspects:
        for (one, first), (two, second) in itertools.combinations(aspect.values.items(), 2):
            shared = set(first.all) & set(second.all)
            assert not shared, f"{aspect.name}: {shared} say both {one} and {two}"


def test_families_are_the_top_level_of_audioset() -> None:
    values = find_domain("general").taxonomy.aspect("family").values
    assert list(values) == [
        "human",
        "animal",
        "music",
        "things",
        "nature",
        "ambiguous",
        "environment",
    ]


def test_what_makes_no_taxonomy_is_refused() -> None:
    bell = _source("bell", "ring")
    with pytest.raises(ConfigError, match="have one name"):
        _taxonomy(bell, bell)
    with pytest.raises(ConfigError, match=r"'bell'.*unknown: tempo"):
        _taxonomy(_source("bell", "ring", traits="tempo"))
    with pytest.raises(ConfigError, match="'bell': needs actions"):
        _taxonomy(_source("bell"))
    with pytest.raises(ConfigError, match="'f' is no family"):
        Taxonomy((Aspect("family", {"g": Words()}),), (bell,))
    with pytest.raises(ConfigError, match="'loudness': unknown; aspects are source, pitch, style"):
        _taxonomy(bell).aspect("loudness")
    with pytest.raises(ConfigError, match="'gong': unknown"):
        _taxonomy(bell).source("gong")


def test_tables_name_the_line_that_is_wrong() -> None:
    with pytest.raises(ConfigError, match=r"t, line 2: 'dog \| dog': needs a \[heading\]"):
        parse_sources("# first\ndog | dog", "t")
    with pytest.raises(ConfigError, match=r"t, line 2.*expected '\[family modality\]"):
        parse_sources("[animal]\ndog | dog | bark", "t")
    with pytest.raises(ConfigError, match=r"t, line 2: .* 4 columns at most"):
        parse_aspects("[pitch]\nlow | a | b | c | d", "t")
