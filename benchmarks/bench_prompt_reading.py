"""How well prompts are read and written: the tagger on captions by hand, the grammar's round trip.

    python benchmarks/bench_prompt_reading.py

Rows go to benchmarks/results/prompts-reading.csv. tests/prompts holds floors below them.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

from ptq4adm.bench import append_rows, environment
from ptq4adm.prompts import find_domain
from ptq4adm.prompts.generator import requests_for

ROOT = Path(__file__).resolve().parents[1]
CAPTIONS = ROOT / "tests" / "prompts" / "captions.txt"
# what the captions say of; the source itself is not among it
CHECKED = frozenset(
    "family modality order count loudness pitch tempo space timbre texture".split()
)  # fmt: skip
REQUESTS = 2000
Cell = tuple[str, str]
Row = dict[str, str | int | float]


def read_captions(part: str) -> Iterator[tuple[str, set[Cell]]]:
    """Captions of a part, "seen" or "unseen", with the cells a person says they say."""
    current = ""
    for line in CAPTIONS.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            current = line.strip("[]")
        elif line and not line.startswith("#") and current == part:
            caption, _, said = line.partition(" | ")
            entries = (entry.split("=") for entry in said.split())
            yield caption, {(name, value) for name, vs in entries for value in vs.split(",")}


def score_captions(part: str) -> Row:
    """Precision and recall over cells, and the captions that are right in all."""
    tagger = find_domain("general").tagger
    right = missed = wrong = exact = count = 0
    for caption, expected in read_captions(part):
        found = {cell for cell in tagger.tag(caption).cells if cell[0] in CHECKED}
        right += len(found & expected)
        missed += len(expected - found)
        wrong += len(found - expected)
        exact += found == expected
        count += 1
    return {
        "what": f"tagger, {part} captions",
        "count": count,
        "exact": exact,
        "precision": right / (right + wrong),
        "recall": right / (right + missed),
    }


def round_trip(name: str, count: int, seed: int = 11) -> Row:
    """Prompts that say all they were asked for, and the share of cells found again."""
    domain, rng = find_domain(name), random.Random(seed)
    requests = requests_for(domain, rng)
    exact = asked = found = 0
    for _ in range(count):
        request = next(requests)
        text = domain.grammar.write(request, rng)
        assert text is not None, f"no source can be {request}"
        said = request.cells & domain.tagger.tag(text).cells
        exact += said == request.cells
        asked, found = asked + len(request.cells), found + len(said)
    return {
        "what": f"grammar, {name}",
        "count": count,
        "exact": exact,
        "recall": found / asked,
    }


def main() -> None:
    """Measure, print, append the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    rows = [score_captions(part) for part in ("seen", "unseen")]
    rows += [round_trip(name, REQUESTS) for name in ("general", "audioldm-tiny")]
    for row in rows:
        print(row)
    append_rows(
        arguments.results / "prompts-reading.csv", [{**environment(ROOT), **r} for r in rows]
    )


if __name__ == "__main__":
    main()
