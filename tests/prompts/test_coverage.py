"""Coverage of the grid and of a space, against counts and distances written out."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from ptq4adm.prompts import Domain, find_domain, measure
from ptq4adm.prompts.coverage import Grid, distances, whole_costs


@pytest.fixture(scope="module")
def domain() -> Domain:
    return find_domain("audioldm-tiny")


def test_shares_are_counts_of_the_taxonomy(domain: Domain) -> None:
    prompts = ["a loud flute playing a melody", "a bird chirping slowly, then drums playing"]
    said, pairs = set(), set()
    for prompt in prompts:
        tags = domain.tagger.tag(prompt)
        for clause in tags.clauses:
            cells = [c for c in (*clause, *tags.scene) if c in domain.taxonomy.cells]
            said.update(cells)
            pairs.update(frozenset(p) for p in itertools.combinations(cells, 2))
    grid = [frozenset(pair) for pair in domain.taxonomy.pairs]
    coverage = measure(domain.tagger, prompts)
    assert coverage.cells == len(said) / len(domain.taxonomy.cells)
    assert coverage.pairs == sum(pair in pairs for pair in grid) / len(grid)
    assert 0 < coverage.pairs < 0.1
    assert coverage.radius is None
    assert coverage.prompts == 2


def test_pairs_hold_within_a_clause_only(domain: Domain) -> None:
    grid = Grid(domain.tagger)
    apart = grid.bits(domain.tagger.tag("a slow flute melody and a fast bird"))
    for source, tempo in (("flute", "fast"), ("bird", "slow")):
        missing = (("source", source), ("tempo", tempo))
        assert missing in domain.taxonomy.pairs
        assert missing in grid.missing(apart)


def test_missing_and_covered_make_the_grid(domain: Domain) -> None:
    grid = Grid(domain.tagger)
    bits = grid.bits(domain.tagger.tag("a flute playing a melody"))
    assert len(grid.missing(bits)) + bits.bit_count() == grid.size
    assert len(grid.missing(0)) == grid.size
    assert grid.shares((1 << grid.size) - 1) == (1.0, 1.0)


def test_radius_and_mean_distance(domain: Domain) -> None:
    rng = np.random.default_rng(0)
    points = rng.standard_normal((40, 5))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    chosen = points[:7]
    away = [min(math.dist(p, c) for c in chosen) for p in points]
    coverage = measure(
        domain.tagger,
        ["a bird chirping"] * 7,
        vectors=torch.from_numpy(chosen),
        reference=torch.from_numpy(points),
    )
    assert coverage.radius == pytest.approx(max(away), abs=1e-12)
    assert coverage.mean_distance == pytest.approx(sum(away) / 40, abs=1e-7)


def test_distances_are_0_to_2() -> None:
    one = torch.eye(3, dtype=torch.float64)
    found = distances(one, torch.cat([one, -one]))
    assert found.diagonal().tolist() == [0.0, 0.0, 0.0]
    assert found[0].tolist() == pytest.approx([0, 2**0.5, 2**0.5, 2, 2**0.5, 2**0.5])
    # the product of a vector with itself can exceed 1 by a rounding
    tilted = torch.nn.functional.normalize(torch.full((1, 7), 1.0 + 1e-9, dtype=torch.float64))
    assert bool(torch.isfinite(distances(tilted, tilted)).all())


@pytest.mark.parametrize(("power", "cost"), [(1, 500_000), (2, 250_000), (4, 62_500)])
def test_costs_are_whole(power: int, cost: int) -> None:
    found = whole_costs(torch.tensor([0.5, 0.0], dtype=torch.float64), power)
    assert found.tolist() == [cost, 0]
    assert found.dtype == torch.int64
