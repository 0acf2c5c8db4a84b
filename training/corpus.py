"""Build the captioned corpus: plan the clips, render them, write audio, captions and a check.

    python training/corpus.py --out build/corpus
    python training/corpus.py --out build/corpus --render corpus.tar

A corpus is a folder with `audio.npy` (int16 [clips, 40960], 16 kHz) and `clips.jsonl` (one
object a clip). With `--render` a compact tar of at most 20 MB is written too, from the folder if
it is already rendered. What a source sounds like is in `sources.py`, what is said about it in
`captions.py`, and the reader of both forms in `compact.py`.
"""

import argparse
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import captions
import numpy as np
from compact import write_compact
from render import MissingProgramError, render_scores, require_programs
from sources import CLIP_SAMPLES, Score, compose
from tqdm import tqdm
from vocabulary import CLASSES, OTHERS, VOCABULARIES

MANIFEST = Path(__file__).with_name("manifest.json")
CLASS_SHARE = 0.8
OTHER_SHARE = 0.1  # the rest are mixtures
HELD_OUT_SHARE = 0.05  # for each of valid and test
PEAK_DB = {"soft": (-21.0, -15.0), "normal": (-11.0, -7.0), "loud": (-3.0, -1.0)}


@dataclass
class PlannedClip:
    """One clip before rendering; two parts make a mixture."""

    split: str
    class_name: str | None
    sources: list[str]
    attributes: dict
    scores: list[Score]
    peak_db: float
    captions: list[str]


def _split_names(count: int, rng: random.Random) -> list[str]:
    held_out = max(1, round(count * HELD_OUT_SHARE))
    names = ["valid"] * held_out + ["test"] * held_out
    names += ["train"] * (count - len(names))
    rng.shuffle(names)
    return names


def _phrase_key(score: Score) -> tuple:
    """What makes two clips the same phrase: notes to a hundredth of a second, tuning, words."""
    notes = tuple((round(note.start, 2), round(note.pitch, 2), note.sample) for note in score.notes)
    return (
        score.program,
        notes,
        round(score.detune_cents / 5),
        score.text,
        score.voice,
        score.expression == [],
    )


class _Planner:
    """Draws clips so that no phrase of one clip returns in another."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.seen: set[tuple] = set()

    def _new_score(self, source: str, attributes: dict) -> Score:
        for _ in range(100):
            score = compose(source, attributes, self.rng)
            if _phrase_key(score) not in self.seen:
                break
        self.seen.add(_phrase_key(score))
        return score

    def single(self, source: str, split: str) -> PlannedClip:
        attributes = VOCABULARIES[source].draw(self.rng)
        score = self._new_score(source, attributes)
        peak_db = self.rng.uniform(*PEAK_DB[attributes["loudness"]])
        texts = captions.clip_captions([source], attributes, self.rng.getrandbits(32))
        class_name = source if source in CLASSES else None
        return PlannedClip(split, class_name, [source], attributes, [score], peak_db, texts)

    def mixture(self, split: str) -> PlannedClip:
        first = self.rng.choice(CLASSES)
        second = self.rng.choice([name for name in (*CLASSES, *OTHERS) if name != first])
        sources = [first, second] if self.rng.random() < 0.5 else [second, first]
        attributes: dict = {"relation": self.rng.choice(captions.RELATIONS)}
        for key, source in zip(("first", "second"), sources, strict=True):
            aspects = VOCABULARIES[source].draw(self.rng)
            aspects.pop("loudness")  # belongs to the whole clip here
            attributes[key] = aspects
        scores = [
            self._new_score(s, attributes[key])
            for key, s in zip(("first", "second"), sources, strict=True)
        ]
        texts = captions.clip_captions(sources, attributes, self.rng.getrandbits(32))
        peak_db = self.rng.uniform(*PEAK_DB["normal"])
        return PlannedClip(split, None, sources, attributes, scores, peak_db, texts)


def plan_clips(count: int, seed: int) -> list[PlannedClip]:
    """Plan a corpus: balanced classes, then other sources and mixtures, in a shuffled order."""
    planner = _Planner(seed)
    per_class = round(count * CLASS_SHARE / len(CLASSES))
    others = round(count * OTHER_SHARE)
    mixtures = count - per_class * len(CLASSES) - others
    plans = [
        planner.single(name, split)
        for name in CLASSES
        for split in _split_names(per_class, planner.rng)
    ]
    for i, split in enumerate(_split_names(others, planner.rng)):
        plans.append(planner.single(OTHERS[i % len(OTHERS)], split))
    plans += [planner.mixture(split) for split in _split_names(mixtures, planner.rng)]
    planner.rng.shuffle(plans)
    return plans


def _unit_peak(audio: np.ndarray) -> np.ndarray:
    return audio / max(float(np.abs(audio).max()), 1e-5)


def _mix(first: np.ndarray, second: np.ndarray, relation: str) -> np.ndarray:
    """Join two clips: one after the other, both at once, or the second as a background."""
    first, second = _unit_peak(first), _unit_peak(second)
    if relation == "followed_by":
        half, fade = CLIP_SAMPLES // 2, np.linspace(1.0, 0.0, 320, dtype=np.float32)
        head = first[:half].copy()
        head[-320:] *= fade
        return np.concatenate([_unit_peak(head), _unit_peak(second[:half])])
    return first + second * (0.4 if relation == "over" else 0.8)


def finish(parts: list[np.ndarray], plan: PlannedClip) -> np.ndarray:
    """Mix, fade the cut edges and scale to the planned peak: int16 [40960]."""
    audio = parts[0] if len(parts) == 1 else _mix(parts[0], parts[1], plan.attributes["relation"])
    audio = audio.astype(np.float32, copy=True)
    audio[:48] *= np.linspace(0.0, 1.0, 48, dtype=np.float32)
    audio[-160:] *= np.linspace(1.0, 0.0, 160, dtype=np.float32)
    return np.round(_unit_peak(audio) * 10 ** (plan.peak_db / 20) * 32767).astype(np.int16)


def build(out: Path, count: int, seed: int, jobs: int, split: str | None = None) -> None:
    """Render a corpus, or one split of it, into a folder.

    The two files appear only when they are whole.
    """
    require_programs()
    plans = dict(enumerate(plan_clips(count, seed)))
    if split is not None:
        plans = {index: plan for index, plan in plans.items() if plan.split == split}
    out.mkdir(parents=True, exist_ok=True)
    scores = [score for plan in plans.values() for score in plan.scores]
    with tqdm(total=len(scores), desc="render", unit="clip") as bar:
        rendered = render_scores(scores, jobs, bar.update)
    audio = np.empty((len(plans), CLIP_SAMPLES), dtype=np.int16)
    row = 0
    with (out / "clips.partial").open("w", encoding="utf-8") as lines:
        for i, (index, plan) in enumerate(plans.items()):
            audio[i] = finish(list(rendered[row : row + len(plan.scores)]), plan)
            row += len(plan.scores)
            lines.write(json.dumps(record(index, plan)) + "\n")
    np.save(out / "audio.partial.npy", audio)
    (out / "audio.partial.npy").replace(out / "audio.npy")
    (out / "clips.partial").replace(out / "clips.jsonl")


def record(index: int, plan: PlannedClip) -> dict:
    """One line of `clips.jsonl`."""
    return {
        "index": index,
        "split": plan.split,
        "class": plan.class_name,
        "sources": plan.sources,
        "attributes": plan.attributes,
        "captions": plan.captions,
    }


def _check_manifest() -> None:
    """The classes are fixed in the manifest; the code must not drift from it."""
    manifest = json.loads(MANIFEST.read_text(encoding="utf-8"))
    if manifest["classes"] != list(CLASSES) or manifest["other_sources"] != list(OTHERS):
        raise ValueError(f"{MANIFEST} and vocabulary.py list different sources")


def main() -> int:
    """Build the corpus and, if asked, its compact form."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/corpus"), help="corpus folder")
    parser.add_argument("--render", type=Path, metavar="TAR", help="also write the compact form")
    parser.add_argument("--clips", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=("train", "valid", "test"), help="render that one only")
    parser.add_argument("--jobs", type=int, default=2, help="renderers or encoders at a time")
    arguments = parser.parse_args()
    _check_manifest()
    try:
        if arguments.render is None or not (arguments.out / "clips.jsonl").exists():
            build(arguments.out, arguments.clips, arguments.seed, arguments.jobs, arguments.split)
    except MissingProgramError as error:
        print(error, file=sys.stderr)
        return 1
    if arguments.render:
        n_clips = write_compact(arguments.out, arguments.render, arguments.jobs)
        print(f"{arguments.render}: {n_clips} clips, {arguments.render.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
