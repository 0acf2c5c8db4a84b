"""Augmentation from end to end, and what is refused or said on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

import ptq4adm
from ptq4adm.errors import ConfigError, OutputError, PromptError
from ptq4adm.prompts import (
    Augmentation,
    AugmentSettings,
    GrammarGenerator,
    Request,
    augment_prompts,
    find_domain,
    measure,
)
from ptq4adm.prompts.duplicates import NearDuplicates, plain_key, similarity, stems
from ptq4adm.prompts.generator import make_pool
from ptq4adm.prompts.picture import draw_curve, draw_text

SEEDS = ["a dog barking loudly", "slow piano music", "rain on a roof"]
SMALL = AugmentSettings(pool=150)


@pytest.fixture(scope="module")
def result() -> Augmentation:
    return augment_prompts(SEEDS, 12, settings=SMALL)


def test_seeds_come_first_and_coverage_rises(result: Augmentation) -> None:
    assert result.prompts[:3] == tuple(SEEDS)
    assert len(result.prompts) == len(set(result.prompts)) == 12
    assert result.added == result.prompts[3:]
    assert len(result.curve) == 10
    pairs = [point.coverage.pairs for point in result.curve]
    assert pairs == sorted(pairs)
    assert result.after.pairs > 5 * result.before.pairs
    assert result.stop == "the budget is spent"
    assert (result.domain, result.encoder, result.generator) == ("general", None, "grammar")
    tagger = find_domain("general").tagger
    assert result.after == measure(tagger, result.prompts)
    assert result.before == measure(tagger, SEEDS)


def test_the_same_arguments_give_the_same_prompts_in_any_process(result: Augmentation) -> None:
    code = (
        "import json; from ptq4adm.prompts import *;"
        f"print(json.dumps(augment_prompts({SEEDS!r}, 12, "
        "settings=AugmentSettings(pool=150)).to_dict()))"
    )
    # whatever this process hashes with, sets have another order there
    hash_seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == json.loads(json.dumps(result.to_dict()))
    other = augment_prompts(SEEDS, 12, settings=replace(SMALL, seed=1))
    assert other.added != result.added


def test_a_file_keeps_everything(result: Augmentation, tmp_path: Path) -> None:
    result.save(tmp_path / "a.json")
    assert Augmentation.load(tmp_path / "a.json") == result
    result.save_prompts(tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_text().splitlines() == list(result.prompts)
    with pytest.raises(OutputError, match="cannot be written"):
        result.save(tmp_path / "no" / "a.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "x"}, "is no augmentation"),
        ({"format_version": 2}, "format version 2, this package knows 1"),
        ({"curve": None}, "missing or unknown entries"),
        ({"more": 1}, "missing or unknown entries"),
    ],
)
def test_other_files_are_refused(
    result: Augmentation, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    (tmp_path / "a.json").write_text(json.dumps(result.to_dict() | change))
    with pytest.raises(PromptError, match=message):
        Augmentation.load(tmp_path / "a.json")
    (tmp_path / "b.json").write_text(json.dumps(result.to_dict())[:-20])
    with pytest.raises(PromptError, match="cannot be read"):
        Augmentation.load(tmp_path / "b.json")


def test_target_and_small_gains_stop_it() -> None:
    found = augment_prompts(SEEDS, 100, settings=replace(SMALL, target=0.2))
    assert found.stop == "the target of 0.2 is reached"
    last, before = found.curve[-1].coverage, found.curve[-2].coverage
    assert min(last.cells, last.pairs) >= 0.2 > min(before.cells, before.pairs)
    found = augment_prompts(SEEDS, 100, settings=replace(SMALL, eps=0.01, patience=2))
    assert found.stop == "2 candidates in a row gain no more than 0.01"
    gains = [point.gain for point in found.curve[1:]]
    assert all(gain > 0.01 for gain in gains[:-1])
    assert gains[-1] <= 0.01
    found = augment_prompts(["a bird chirping"], 40, settings=AugmentSettings(pool=5))
    assert found.stop in ("no candidate is left", "3 candidates in a row gain no more than 0")
    assert len(found.prompts) <= 6


def test_no_near_duplicates(result: Augmentation) -> None:
    found = [stems(prompt) for prompt in result.prompts]
    for i, one in enumerate(found):
        assert all(similarity(one, other) < 0.9 for other in found[:i])


def test_what_near_means() -> None:
    known = NearDuplicates(["a dog barking loudly in the distance"])
    assert "The dogs bark, loudly, in a distance!" in known
    assert "in the distance, a dog barks loudly" in known
    assert "a dog barking softly in the distance" not in known
    assert plain_key("A dog, barking.") == plain_key("the dog barking") == "dog barking"


def test_duplicate_seeds_are_left_out_and_said() -> None:
    found = augment_prompts([*SEEDS, "A dog barking, loudly!"], 4, settings=SMALL)
    assert found.seeds == 3
    assert found.prompts[:3] == tuple(SEEDS)
    assert "1 of 4 seeds are duplicates: left out" in found.warnings


def test_excluded_prompts_are_never_used() -> None:
    first = augment_prompts(SEEDS, 12, settings=SMALL)
    exclude = [first.added[0], first.added[1].upper(), SEEDS[1]]
    found = augment_prompts(SEEDS, 12, exclude=exclude, settings=SMALL)
    known = NearDuplicates(exclude)
    assert not any(prompt in known for prompt in found.prompts)
    assert found.seeds == 2
    assert "kept for evaluation, so left out: 'slow piano music'" in found.warnings
    with pytest.raises(PromptError, match="all 3 are captions that are kept"):
        augment_prompts(SEEDS, 12, exclude=SEEDS, settings=SMALL)


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        ([], "got an empty list, needs at least one"),
        ("a dog barks", "got one string, needs a list"),
        (["a dog barks", " \n"], "seed 1 is empty"),
        (["a dog barks", 3], "seed 1: got int, needs a string"),
        (["xyzzy", "plugh"], "not one of the 2 says anything"),
        (["\u96e8\u304c\u964d\u308b"], "not one of the 1 says anything"),
        ([f"{a} dog barks" for a in ("a", "one", "my", "his", "her")], "budget 4 is below the 5"),
    ],
)
def test_unusable_seeds(seeds: Sequence[str], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        augment_prompts(seeds, 4, settings=SMALL)


@pytest.mark.parametrize("budget", [0, -1, 2.5, True, None])
def test_unusable_budgets(budget: object) -> None:
    with pytest.raises(PromptError, match="needs a whole number of at least 1"):
        augment_prompts(SEEDS, budget)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "values",
    [
        {"seed": -1},
        {"pool": 0},
        {"pool": 20000},
        {"power": 7},
        {"patience": 0},
        {"grid_weight": 1.1},
        {"grid_weight": float("nan")},
        {"eps": -0.1},
        {"target": 2.0},
        {"seed": True},
    ],
)
def test_settings_out_of_range(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        AugmentSettings(**values)  # type: ignore[arg-type]


def test_other_languages_are_a_warning() -> None:
    seeds = [*SEEDS, "ein Hund bellt laut im Garten", "\u96e8\u304c\u964d\u308b\u97f3"]
    found = augment_prompts(seeds, 6, settings=SMALL)
    assert found.seeds == 5
    said = [w for w in found.warnings if "do not look English" in w]
    assert len(said) == 1
    assert said[0].startswith("2 of 5 seeds")
    assert "ein Hund" in said[0]


def test_a_long_prompt_counts_as_far_as_it_is_read() -> None:
    long = "a piano plays. " + "some words that say nothing at all, " * 300 + "then a dog barks"
    assert len(long) > 10_000
    found = augment_prompts([long], 2, settings=SMALL)
    assert found.prompts[0] == " ".join(long.split())
    assert any("characters, of which" in w and "are read" in w for w in found.warnings)
    start = "a piano plays. " + "some words that say nothing at all, " * 9
    short = augment_prompts([start], 2, settings=SMALL)
    assert found.before.cells == short.before.cells


def test_the_domain_s_own_seeds(caplog: pytest.LogCaptureFixture) -> None:
    found = augment_prompts(None, 20, settings=SMALL)
    assert found.seeds == 10
    assert "10 of the domain's 64 seeds are taken, half of the budget" in found.warnings
    assert "half of the budget" in caplog.text
    whole = augment_prompts(None, 70, settings=SMALL)
    assert (whole.seeds, whole.warnings) == (64, ())
    with pytest.raises(PromptError, match="'tango': unknown; domains are general, audioldm-tiny"):
        augment_prompts(None, 20, domain="tango")


def test_a_pipeline_names_its_domain(tiny_pipeline: Path) -> None:
    pipe = ptq4adm.load_pipeline(tiny_pipeline)
    assert pipe.prompt_domain is None
    pipe.prompt_domain = "audioldm-tiny"
    found = augment_prompts(None, 20, pipe=pipe, settings=SMALL)
    assert (found.domain, found.encoder) == ("audioldm-tiny", "AudioLDM")
    assert found.after.radius < found.before.radius
    assert found.after.mean_distance < found.before.mean_distance
    assert ptq4adm.augment_prompts is augment_prompts
    unknown = augment_prompts(["a banjo and a bird", "a flute"], 3, domain="audioldm-tiny")
    assert any("does not know: 'banjo'" in warning for warning in unknown.warnings)


class _Model:
    """Stands for a language model: a careless one, whose every second answer is of no use."""

    name = "model"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, requests: Sequence[Request], seed: int) -> list[str]:
        self.asked += [request.instruction() for request in requests]
        good = GrammarGenerator(find_domain("audioldm-tiny").grammar)(requests, seed)
        bad = ["", "xyzzy", "a banjo playing", "a bird " * 90]
        return [*bad, "a church organ playing a held chord", *good[::2]]


def test_another_generator_is_read_and_filtered() -> None:
    domain, model = find_domain("audioldm-tiny"), _Model()
    pool = make_pool(domain, 100, 0, generator=model)
    assert len(pool) == 100
    assert model.asked[0].startswith("Write one caption of a sound")
    assert not any("banjo" in text or len(text) > 300 for text in pool)
    assert "a church organ playing a held chord" not in pool, "a caption of the test split"
    found = augment_prompts(None, 20, domain=domain, generator=model, settings=SMALL)
    assert found.generator == "model"


def test_a_generator_that_says_nothing_is_refused() -> None:
    class Silent:
        name = "silent"

        def __call__(self, _requests: Sequence[Request], _seed: int) -> list[str]:
            return ["", "???"]

    with pytest.raises(PromptError, match="'silent': none of its prompts can be used"):
        augment_prompts(SEEDS, 5, generator=Silent(), settings=SMALL)


def test_pools_are_different_prompts_and_seeded() -> None:
    domain = find_domain("general")
    pool = make_pool(domain, 150, 0)
    assert len({plain_key(text) for text in pool}) == len(pool) == 150
    assert pool == make_pool(domain, 150, 0)
    assert pool[:50] != make_pool(domain, 50, 1)
    assert any("bird" in text for text in pool)
    assert not any("bird" in t for t in make_pool(domain, 50, 0, refuse=lambda t: "bird" in t))


def test_the_curve_as_text_and_picture(result: Augmentation, tmp_path: Path) -> None:
    lines = draw_text(result, rows=4).splitlines()
    assert [line.split()[0] for line in lines] == ["prompts", "3", "6", "9", "12"]
    assert f"{result.after.pairs:.1%}" in lines[-1]
    assert lines[-1].count("#") > lines[1].count("#")
    pytest.importorskip("matplotlib", reason="needs the extra 'demo'")
    draw_curve(tmp_path / "curve.svg", result)
    assert "<svg" in (tmp_path / "curve.svg").read_text()
    draw_curve(tmp_path / "curve.png", result)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"a picture is a \.png or a \.svg"):
        draw_curve(tmp_path / "curve.pdf", result)
