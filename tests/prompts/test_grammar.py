"""Sentences that say what was asked for, in the words of the domain."""

from __future__ import annotations

import random
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from ptq4adm.prompts import Domain, Request, find_domain
from ptq4adm.prompts.generator import make_pool
from ptq4adm.prompts.lexicon import PUNCTUATION, words_of

ROOT = Path(__file__).resolve().parents[2]
# measured over 2000 requests (benchmarks/results/prompts-reading.csv): general 0.98 of prompts and
# 0.995 of cells, shipped 0.95 and 0.984
REQUESTS = 500
FLOORS = {"general": (0.95, 0.98), "audioldm-tiny": (0.92, 0.97)}


@pytest.mark.parametrize("name", ["general", "audioldm-tiny"])
def test_round_trip(
    reading: ModuleType, name: str, record_property: Callable[[str, object], None]
) -> None:
    score = reading.round_trip(name, REQUESTS)
    for key, value in score.items():
        record_property(f"{name} {key}", value)
    prompts, cells = FLOORS[name]
    assert score["exact"] / REQUESTS >= prompts
    assert score["recall"] >= cells


@pytest.mark.parametrize("name", ["general", "audioldm-tiny"])
def test_every_pair_of_the_grid_can_be_written(name: str) -> None:
    domain, rng = find_domain(name), random.Random(3)
    missed = []
    for pair in domain.taxonomy.pairs:
        for _ in range(12):
            text = domain.grammar.write(Request(frozenset(pair)), rng)
            if text is not None and pair in domain.tagger.pairs(domain.tagger.tag(text)):
                break
        else:
            missed.append(pair)
    assert len(missed) <= 0.01 * len(domain.taxonomy.pairs), missed


@pytest.mark.parametrize("name", ["general", "audioldm-tiny"])
def test_sentences_are_english(name: str) -> None:
    texts = make_pool(find_domain(name), 400, seed=2)
    for text in texts:
        assert not re.search(r"\ba [aeio]", text), text
        assert not re.search(r"\ban [^aeiouh]", text), text
        assert not re.search(r"  |\{|\}|~|\+|\ba a\b| ,|,,", text), text
        assert not text.endswith((" and", " with", " a", ",")), text
    starts = Counter(text.split()[0] for text in texts)
    assert starts.most_common(1)[0][1] < 0.7 * len(texts)


def test_impossible_requests_are_refused() -> None:
    grammar = find_domain("audioldm-tiny").grammar
    request = Request(frozenset({("source", "drums"), ("pitch", "high")}))
    assert grammar.write(request, random.Random(0)) is None
    assert "pitch: high; source: drums" in request.instruction()


@pytest.fixture(scope="module")
def training() -> object:
    """The caption grammar that the shipped pipeline was trained on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "training"))
        import captions

        yield captions
    for name in ("captions", "vocabulary"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def shipped() -> Domain:
    return find_domain("audioldm-tiny")


def _training_words(captions: object) -> set[str]:
    rng, found = random.Random(0), set()
    names = list(captions.VOCABULARIES)  # type: ignore[attr-defined]
    for _ in range(6000):
        sources = rng.sample(names, 2)
        drawn = [captions.VOCABULARIES[s].draw(rng) for s in sources]  # type: ignore[attr-defined]
        text = captions.describe(sources[0], drawn[0], rng, rng.randint(0, 4))  # type: ignore[attr-defined]
        mixture = {"relation": rng.choice(captions.RELATIONS)}  # type: ignore[attr-defined]
        mixture |= {"first": drawn[0], "second": drawn[1]}
        text += " " + captions.describe_mixture(mixture, sources, rng, 1)  # type: ignore[attr-defined]
        found.update(words_of(text))
    return found - PUNCTUATION


def test_the_shipped_domain_has_the_words_of_training(training: object, shipped: Domain) -> None:
    trained = _training_words(training)
    pool = {word for text in make_pool(shipped, 1500, seed=4) for word in words_of(text)}
    assert pool - PUNCTUATION - trained == set(), "words the model never saw"
    assert trained - pool - PUNCTUATION == set(), "words of training that are never written"


def test_the_shipped_domain_names_the_sources_of_training(
    training: object, shipped: Domain
) -> None:
    names = {name.replace("_", " ") for name in training.VOCABULARIES}  # type: ignore[attr-defined]
    own = {source.name for source in shipped.taxonomy.sources}
    assert own == names - {"speech"} | {"man", "woman"}


def test_the_shipped_domain_writes_no_heldout_prompt(training: object, shipped: Domain) -> None:
    held = {text.lower() for _, text in training.heldout_prompts()}  # type: ignore[attr-defined]
    assert len(held) == 80
    assert all(shipped.is_reserved(text) for text in held)
    assert held.isdisjoint(make_pool(shipped, 1500, seed=5))
    assert not any(shipped.is_reserved(seed) for seed in shipped.seeds)
