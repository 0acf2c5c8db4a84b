"""The greedy choice: lazy is plain, gains shrink, greedy beats chance."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch.nn import functional

from ptq4adm.prompts import find_domain
from ptq4adm.prompts.choose import Candidates, Greedy
from ptq4adm.prompts.coverage import Grid, union

COUNT = 60


def _candidates(seed: int, *, has_space: bool = True) -> Candidates:
    """Random candidates; a third of the bits and vectors are copies, so that gains tie."""
    rng = random.Random(seed)
    grid = Grid(find_domain("audioldm-tiny").tagger)
    bits = [sum(1 << rng.randrange(grid.size) for _ in range(9)) for _ in range(COUNT)]
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(COUNT, 6, dtype=torch.float64, generator=generator)
    for i in range(COUNT // 3):
        bits[-1 - i] = bits[i]
        vectors[-1 - i] = vectors[i]
    return Candidates(grid, bits, functional.normalize(vectors, dim=1) if has_space else None)


def _plain(candidates: Candidates, chosen: list[int], count: int, weight: float) -> list[int]:
    """Greedy by its definition: every gain anew in every round, by the formula in float64."""
    chosen, grid = list(chosen), candidates.grid

    def value(members: list[int]) -> tuple[float, float]:
        covered = union(candidates.bits[i] for i in members).bit_count()
        if candidates.vectors is None:
            return covered, 0.0
        apart = [(candidates.vectors - candidates.vectors[i]).norm(dim=1) for i in members]
        away = torch.stack(apart).min(dim=0).values
        return covered, float((away**2).sum())

    first = value(chosen)
    for _ in range(count):
        now, best = value(chosen), (-1.0, -1)
        for i in range(COUNT):
            if i in chosen:
                continue
            then = value([*chosen, i])
            gain = weight * (then[0] - now[0]) / (grid.size - first[0])
            if candidates.vectors is not None:
                gain += (1 - weight) * (now[1] - then[1]) / first[1]
            if gain > best[0] + 1e-7:
                best = (gain, i)
        chosen.append(best[1])
    return chosen


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_lazy_is_plain(seed: int, weight: float) -> None:
    candidates = _candidates(seed)
    greedy = Greedy(candidates, [5, 9], grid_weight=weight, power=2)
    for index, _ in itertools.islice(greedy.best_first(), 15):
        greedy.add(index)
    assert greedy.chosen == _plain(candidates, [5, 9], 15, weight)


def test_without_a_space_the_grid_is_all() -> None:
    candidates = _candidates(2, has_space=False)
    greedy = Greedy(candidates, [0], grid_weight=0.0, power=2)
    for index, _ in itertools.islice(greedy.best_first(), 10):
        greedy.add(index)
    assert greedy.chosen == _plain(candidates, [0], 10, 1.0)
    assert greedy.coverage() == candidates.measure(greedy.chosen)
    assert greedy.coverage().radius is None


def test_gains_shrink_and_sum_to_what_is_gained() -> None:
    candidates = _candidates(3)
    greedy = Greedy(candidates, [0], grid_weight=0.5, power=2)
    shares = []
    for index, gain in greedy.best_first():
        assert gain == greedy.gain(index)
        shares.append(greedy.as_share(gain))
        greedy.add(index)
    assert shares == sorted(shares, reverse=True)
    assert len(greedy.chosen) == COUNT
    # the space is covered whole, the grid as far as the candidates go
    covered = union(candidates.bits).bit_count() - candidates.bits[0].bit_count()
    missing = candidates.grid.size - candidates.bits[0].bit_count()
    assert sum(shares) == pytest.approx(0.5 + 0.5 * covered / missing, abs=1e-6)
    assert greedy.coverage().radius == pytest.approx(0.0, abs=1e-7)


def test_the_running_coverage_is_the_measured_one() -> None:
    candidates = _candidates(4)
    greedy = Greedy(candidates, [3], grid_weight=0.5, power=4)
    for index, _ in itertools.islice(greedy.best_first(), 12):
        greedy.add(index)
        measured, running = candidates.measure(greedy.chosen), greedy.coverage()
        assert (running.prompts, running.cells, running.pairs) == (
            measured.prompts,
            measured.cells,
            measured.pairs,
        )
        assert running.radius == pytest.approx(measured.radius)
        assert running.mean_distance == pytest.approx(measured.mean_distance)


def test_a_candidate_that_was_passed_over_does_not_come_again() -> None:
    greedy = Greedy(_candidates(5), [0], grid_weight=0.5, power=2)
    given = []
    for index, _ in greedy.best_first():
        given.append(index)
        if len(given) % 2:
            greedy.add(index)
    assert sorted(given) == list(range(1, COUNT))


def test_greedy_beats_chance() -> None:
    candidates = _candidates(6)
    greedy = Greedy(candidates, [0], grid_weight=0.5, power=2)
    for index, _ in itertools.islice(greedy.best_first(), 9):
        greedy.add(index)
    found = greedy.coverage()
    for seed in range(20):
        chance = candidates.measure([0, *random.Random(seed).sample(range(1, COUNT), 9)])
        assert found.pairs > chance.pairs
        assert found.mean_distance < chance.mean_distance
