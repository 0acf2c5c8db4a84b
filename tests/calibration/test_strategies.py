"""The choice of pairs: planted rare ranges, formulas by hand, and what must not matter."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
import torch

from ptq4adm.calibration import STRATEGIES
from ptq4adm.calibration.bins import PairTable, measure_cover
from ptq4adm.calibration.strategies import (
    choose_skewed_steps,
    choose_uniform_steps,
    covering,
    find_strategy,
    share_out,
    tdac_weights,
)
from ptq4adm.errors import CalibrationError, ConfigError

P, S, D, SIZE = 40, 10, 12, 20
# (pair, column) of the only ranges in bin 15
PLANTED = [(17, 0), (101, 3), (102, 3), (233, 7), (301, 11), (399, 5)]


def _table(prompts: int = P, steps: int = S, columns: int = D) -> PairTable:
    """Ranges in bins 4 to 7, by chance."""
    generator = torch.Generator().manual_seed(1)
    bins = torch.randint(4, 8, (prompts * steps, columns), generator=generator, dtype=torch.int16)
    return PairTable(
        keys=tuple(f"key {i}" for i in range(prompts)),
        timesteps=torch.arange(steps, dtype=torch.float64).flip(0) * (1000 / steps) + 50,
        num_train_timesteps=1000,
        bins=bins,
        strata=torch.zeros(steps, dtype=torch.int64),
        features=torch.randn(steps, 6, generator=generator),
    )


def _planted() -> PairTable:
    table = _table()
    for pair, column in PLANTED:
        table.bins[pair, column] = 15
    return table


def _found(pairs: list[int]) -> set[int]:
    """Columns whose rare bin is covered."""
    return {column for pair, column in PLANTED if pair in pairs}


RARE = {column for _, column in PLANTED}


class TestPlantedRanges:
    """Six pairs of 400 hold five layers' rare ranges; 20 pairs are chosen."""

    def test_activation_aware_finds_every_one(self) -> None:
        table = _planted()
        for seed in range(5):
            assert _found(find_strategy("activation-aware")(table, SIZE, seed)) == RARE

    @pytest.mark.parametrize("name", ["random", "uniform-steps", "skewed-steps"])
    def test_blind_strategies_miss_some_whatever_the_seed(self, name: str) -> None:
        table = _planted()
        for seed in range(20):
            assert _found(find_strategy(name)(table, SIZE, seed)) < RARE

    def test_without_the_cover_term_they_are_missed(self) -> None:
        # what the first test checks is the cover term's doing
        assert _found(covering(1.0)(_planted(), SIZE, 0)) < RARE

    def test_one_pair_of_two_in_a_rare_bin_is_enough(self) -> None:
        chosen = covering(0.0)(_planted(), 5, 0)
        assert _found(chosen) == RARE
        assert len({101, 102} & set(chosen)) == 1

    def test_the_bulk_is_matched_better_than_by_chance_and_than_without_the_density_term(
        self,
    ) -> None:
        table = _planted()
        ours = measure_cover(table, find_strategy("activation-aware")(table, SIZE, 0)).distance
        only_cover = measure_cover(table, covering(0.0)(table, SIZE, 0)).distance
        by_chance = [
            measure_cover(table, find_strategy("random")(table, SIZE, seed)).distance
            for seed in range(10)
        ]
        assert ours < min(by_chance)
        assert ours < only_cover


def _objective(table: PairTable, pairs: list[int], size: int, density: Fraction) -> Fraction:
    """F(S) of `ptq4adm.calibration.cover`, from its formula, in exact numbers."""
    M, covered, everything, alike, used = table.pairs, Fraction(0), Fraction(0), Fraction(0), 0
    for column in table.bins.T.tolist():
        n = {b: column.count(b) for b in column if b >= 0}
        if len(n) < 2:
            continue
        used += 1
        c = {b: sum(column[pair] == b for pair in pairs) for b in n}
        everything += sum(Fraction(1, n[b]) for b in n)
        covered += sum(Fraction(1, n[b]) for b in n if c[b])
        alike += 1 - sum(abs(Fraction(c[b], size) - Fraction(n[b], M)) for b in n) / 2
    return (1 - density) * covered / everything + density * alike / used


@pytest.mark.parametrize("density", [Fraction(0), Fraction(1, 2), Fraction(1)])
def test_every_pick_is_the_greedy_one(density: Fraction) -> None:
    table = _table(prompts=5, steps=4, columns=4)
    table.bins[3, 0] = 15
    table.bins[7, 1] = -1  # a layer that did not run there
    table.bins[:, 3] = 2  # a layer that never changes
    size = 8
    chosen = covering(float(density))(table, size, 0)
    for k, pick in enumerate(chosen):
        values = {
            pair: _objective(table, [*chosen[:k], pair], size, density)
            for pair in range(table.pairs)
            if pair not in chosen[:k]
        }
        # gains are rounded to 2^-44 a layer
        assert values[pick] >= max(values.values()) - Fraction(1, 1 << 40)


@pytest.mark.parametrize("name", STRATEGIES)
class TestEveryStrategy:
    """What the protocol promises."""

    @pytest.mark.parametrize("size", [1, 7, 10, 133, P * S])
    def test_pairs_are_different_and_as_many_as_asked_for(self, name: str, size: int) -> None:
        chosen = find_strategy(name)(_table(), size, 0)
        assert len(chosen) == len(set(chosen)) == size
        assert set(chosen) <= set(range(P * S))

    def test_the_same_seed_gives_the_same_pairs_and_another_others(self, name: str) -> None:
        choose = find_strategy(name)
        assert choose(_table(), SIZE, 3) == choose(_table(), SIZE, 3)
        if name != "activation-aware":  # there the seed only breaks ties
            assert choose(_table(), SIZE, 3) != choose(_table(), SIZE, 4)

    def test_the_order_of_the_prompts_does_not_matter(self, name: str) -> None:
        table = _planted()
        order = random.Random(0).sample(range(P), P)
        moved = PairTable(
            keys=tuple(table.keys[i] for i in order),
            timesteps=table.timesteps,
            num_train_timesteps=1000,
            bins=table.bins.view(P, S, D)[order].flatten(0, 1),
            strata=table.strata,
            features=table.features,
        )
        here, there = (
            [(t.keys[pair // S], pair % S) for pair in find_strategy(name)(t, SIZE, 0)]
            for t in (table, moved)
        )
        assert here == there


def test_ties_are_broken_by_the_seed() -> None:
    table = _table()
    table.bins[:] = torch.arange(P * S)[:, None] % 2  # two kinds of pairs
    choose = find_strategy("activation-aware")
    assert choose(table, SIZE, 3) != choose(table, SIZE, 4)


def test_uniform_steps_takes_every_step_as_often() -> None:
    steps = [pair % S for pair in choose_uniform_steps(_table(), 20, 0)]
    assert [steps.count(s) for s in range(S)] == [2] * S
    few = sorted(pair % S for pair in choose_uniform_steps(_table(), 5, 0))
    assert few == [1, 3, 5, 7, 9]


def test_skewed_steps_follow_the_normal_distribution() -> None:
    table = _table(prompts=400)
    picked = torch.tensor(choose_skewed_steps(table, 1500, 0)) % S
    t = table.timesteps[picked]
    # N(400, 400^2) cut to [0, 1000): mean and variance of a truncated normal distribution
    a, b = -1.0, 1.5
    below, above = (math.exp(-x * x / 2) / math.sqrt(2 * math.pi) for x in (a, b))
    inside = (math.erf(b / math.sqrt(2)) - math.erf(a / math.sqrt(2))) / 2
    shift = (below - above) / inside
    mean = 400 + 400 * shift
    deviation = 400 * math.sqrt(1 + (a * below - b * above) / inside - shift**2)
    # 1500 draws of a deviation of 258: the mean's own is 7, and steps are 100 apart
    assert abs(float(t.mean()) - mean) < 25
    assert abs(float(t.std()) - deviation) < 20


class TestDensityAndDiversity:
    """EDA-DM's formula."""

    # squared distances 0 (0, 1), 1 (0, 2), 2 (0, 3), 1 (2, 3); cosines 1, 0, -1, 0
    FEATURES = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])

    def test_weights_by_hand(self) -> None:
        # density 2 2 1 1, so 1 1 0 0; diversity 3 3 3 5, so 0 0 0 1; lambda 5
        found = tdac_weights(self.FEATURES, 0.3, 5.0)
        torch.testing.assert_close(found, torch.tensor([1.0, 1.0, 0.0, 5.0]).double())

    def test_the_threshold_is_part_of_the_neighbourhood(self) -> None:
        # at 1 density is 3 3 4 2, so 1/2 1/2 1 0
        found = tdac_weights(self.FEATURES, 1.0, 0.0)
        torch.testing.assert_close(found, torch.tensor([0.5, 0.5, 1.0, 0.0]).double())

    def test_equal_steps_have_equal_weights(self) -> None:
        assert tdac_weights(torch.ones(3, 4), 0.3, 5.0).tolist() == [1.0, 1.0, 1.0]

    def test_counts_by_hand(self) -> None:
        assert share_out([1, 1, 0, 5], 14, 100) == [2, 2, 0, 10]
        # 10 do not fit into 6: the 4 left go to the others in proportion
        assert share_out([1, 1, 0, 5], 14, 6) == [4, 4, 0, 6]
        # step 2 gets pairs only when there is no other place
        assert share_out([1, 1, 0, 5], 20, 6) == [6, 6, 2, 6]
        assert share_out([1, 1, 1], 4, 9) == [2, 1, 1]

    def test_pairs_of_a_step_follow_the_weights(self) -> None:
        table = _table(prompts=20, steps=4)
        table.features.resize_(4, 2).copy_(self.FEATURES)
        steps = [pair % 4 for pair in find_strategy("density-diversity")(table, 14, 0)]
        assert [steps.count(s) for s in range(4)] == [2, 2, 0, 10]

    def test_no_features_are_refused(self) -> None:
        table = _table()
        table.features.resize_(S, 0)
        with pytest.raises(CalibrationError, match="no features"):
            find_strategy("density-diversity")(table, 4, 0)


class TestCover:
    """What is said of a choice."""

    def test_curve_and_distance_by_hand(self) -> None:
        table = _table(prompts=2, steps=2, columns=2)
        table.bins[:] = torch.tensor([[0, 0], [0, 1], [1, 2], [1, 3]])
        # six occupied bins: pair 1 covers two, pair 0 one more, pair 3 the next two
        cover = measure_cover(table, [1, 0, 3])
        assert cover.curve == pytest.approx((2 / 6, 3 / 6, 5 / 6))
        # columns: |1/2 - 2/3| and |1/2 - 1/3|; three of |1/4 - 1/3| and one of 1/4
        assert cover.distance == pytest.approx(((1 / 6 + 1 / 6) + (3 / 12 + 1 / 4)) / 2 / 2)

    def test_all_pairs_cover_everything_and_are_alike(self) -> None:
        table = _planted()
        cover = measure_cover(table, list(range(table.pairs)))
        assert cover.curve[-1] == 1.0
        assert cover.distance == pytest.approx(0.0, abs=1e-12)

    def test_layers_that_never_ran_or_never_change_do_not_count(self) -> None:
        table = _table()
        table.bins[:, 0], table.bins[:, 1] = -1, 3
        assert measure_cover(table, list(range(P * S))).curve[-1] == 1.0
        table.bins[:] = -1
        assert measure_cover(table, [0, 1]).curve == (1.0, 1.0)
        assert len(find_strategy("activation-aware")(table, 5, 0)) == 5


def test_an_unknown_strategy_is_refused_with_the_names() -> None:
    with pytest.raises(ConfigError, match="'best', needs one of 'random', 'uniform-steps'"):
        find_strategy("best")


@pytest.mark.parametrize("density", [-0.1, 1.1, float("nan")])
def test_a_density_out_of_range_is_refused(density: float) -> None:
    with pytest.raises(ConfigError, match="density"):
        covering(density)(_table(), 4, 0)
