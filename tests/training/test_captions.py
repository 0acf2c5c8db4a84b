import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import captions
import pytest
from vocabulary import CLASSES, OTHERS, VOCABULARIES

TRAINING = Path(captions.__file__).parent


@pytest.fixture(scope="module")
def train_captions() -> list[str]:
    """Every caption of a small corpus' worth of clips."""
    rng = random.Random(1)
    texts = []
    for _ in range(40):
        for source, vocabulary in VOCABULARIES.items():
            attributes = vocabulary.draw(rng)
            texts += captions.clip_captions([source], attributes, rng.getrandbits(32))
        first, second = rng.sample(sorted(VOCABULARIES), 2)
        attributes = {"relation": rng.choice(captions.RELATIONS)}
        attributes |= {
            "first": VOCABULARIES[first].draw(rng),
            "second": VOCABULARIES[second].draw(rng),
        }
        texts += captions.clip_captions([first, second], attributes, rng.getrandbits(32))
    return texts


def _words(text: str) -> set[str]:
    return set(text.replace(",", " ").split())


def test_ten_classes_are_those_of_the_manifest() -> None:
    manifest = json.loads((TRAINING / "manifest.json").read_text())
    assert len(CLASSES) == 10
    assert manifest["classes"] == list(CLASSES)
    assert manifest["other_sources"] == list(OTHERS)


def test_manifest_lists_every_sample_as_cc0() -> None:
    import sources

    manifest = json.loads((TRAINING / "manifest.json").read_text())
    used = {name for kit in sources.SAMPLE_KITS for name in kit.values()}
    used |= {*sources.SAMPLE_TOMS.values(), *sources.TABLA_SAMPLES}
    used |= {name for names in sources.SOURCE_SAMPLES.values() for name in names}
    assert {f"{name}.flac" for name in used} == {row["file"] for row in manifest["samples"]}
    assert {row["licence"] for row in manifest["samples"]} == {"CC0-1.0"}


def test_heldout_prompts_are_eight_a_class_and_all_different() -> None:
    prompts = captions.heldout_prompts()
    assert Counter(name for name, _ in prompts) == dict.fromkeys(CLASSES, 8)
    assert len({text for _, text in prompts}) == 80


def test_no_training_caption_is_a_heldout_prompt(train_captions: list[str]) -> None:
    assert not {text for _, text in captions.heldout_prompts()} & set(train_captions)


def test_heldout_shapes_never_occur_in_training(train_captions: list[str]) -> None:
    # not only the eighty prompts are absent: training never puts an aspect before the source
    leads = re.compile(r"^(in|at|softly|quietly|loudly|slowly|quickly|fast)\b")
    assert not [text for text in train_captions if leads.match(text)]
    for _, text in captions.heldout_prompts():
        assert leads.match(text) or re.search(r", .* and ", text), text


def test_heldout_words_all_occur_in_training(train_captions: list[str]) -> None:
    known = set().union(*map(_words, train_captions))
    heldout = set().union(*(_words(text) for _, text in captions.heldout_prompts()))
    assert heldout <= known


def test_heldout_prompt_names_only_aspects_its_class_can_have() -> None:
    for name, text in captions.heldout_prompts():
        if not VOCABULARIES[name].has_register:
            assert not re.search(r"\b(register|range|pitch)\b", text), text


@pytest.mark.parametrize("source", list(VOCABULARIES))
def test_caption_says_nothing_false(source: str) -> None:
    rng = random.Random(2)
    vocabulary = VOCABULARIES[source]
    for _ in range(30):
        attributes = vocabulary.draw(rng)
        for text in captions.clip_captions([source], attributes, rng.getrandbits(32)):
            words = _words(text)
            if attributes["loudness"] != "loud":
                assert not words & {"loud", "loudly", "strong", "full"}, (text, attributes)
            if attributes["loudness"] != "soft":
                assert not words & {"soft", "softly", "quiet", "quietly", "gentle"}, text
            if attributes.get("tempo") != "fast":
                assert not words & {"fast", "quick", "quickly"}, (text, attributes)
            if attributes.get("register") != "high":
                assert "high" not in words, (text, attributes)
            if attributes.get("voice") == "man":
                assert not words & {"female", "woman", "woman's"}, text


def test_captions_of_one_clip_differ() -> None:
    attributes = {"loudness": "soft", "register": "low", "tempo": "fast"}
    texts = captions.clip_captions(["bird"], attributes, seed=3)
    assert len(set(texts)) == 3


def test_relation_of_a_mixture_is_in_its_caption() -> None:
    attributes = {"relation": "followed_by", "first": {}, "second": {}}
    for seed in range(10):
        text = captions.describe_mixture(attributes, ["bird", "bell"], random.Random(seed), 0)
        assert re.search(r"bird.*(followed by|then).*bell", text), text


def test_articles_fit_their_nouns(train_captions: list[str]) -> None:
    for text in train_captions:
        assert not re.search(r"\ba [aeio]|\ban [^aeiou]|\ba (loud |soft )?drums\b", text), text


def test_captions_do_not_depend_on_the_hash_seed() -> None:
    code = (
        "import captions\n"
        "aspects = dict(register='low', loudness='soft', tempo='slow', style='melody')\n"
        "texts = [captions.clip_captions(['flute'], aspects, seed) for seed in range(9)]\n"
        "print(captions.heldout_prompts(), texts)"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=TRAINING,
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(outputs) == 1
