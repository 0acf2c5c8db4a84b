"""Which tiles are measured, which of them wins, and what is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ptq4adm.errors import ConfigError
from ptq4adm.kernels import tuner, tuning
from ptq4adm.kernels.tuning import Problem, TileConfig

GEMM = Problem("w4a8_gemm", 8192, 320, (320,), capability=90, multiprocessors=132, device="gpu")
CONV = replace(GEMM, kernel="w4a8_conv2d", taps=9, box=(256, 16))
PROBLEMS = [
    GEMM,
    CONV,
    replace(GEMM, M=128, N=1280, channels=(1280,)),
    replace(GEMM, kernel="w8a8_gemm", N=2560, is_gated=True),
    replace(CONV, M=2048, N=640, channels=(640,), box=None),
    replace(CONV, capability=80, multiprocessors=108, box=None),
    replace(GEMM, capability=89, multiprocessors=128, channels=(320, 640)),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_candidates_are_legal_distinct_and_begin_with_the_plan(problem: Problem) -> None:
    found = tuner.candidates(problem)
    assert found[0] == tuning.plan_config(problem)
    assert len(set(found)) == len(found) == tuner.MOST_CANDIDATES
    for config in found:
        assert tuning.illegal_reason(config, problem) is None, config


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_candidates_vary_what_the_estimate_cannot_rank(problem: Problem) -> None:
    found = tuner.candidates(problem)
    assert {config.num_warps for config in found} == {4, 8}
    assert len({config.num_stages for config in found}) > 1
    assert len({(config.block_m, config.block_n) for config in found}) >= 3
    if problem.box is not None:
        assert {config.form for config in found} == {"gather", "tma"}


@pytest.mark.parametrize("limit", [1, 2, 6, 30])
def test_the_limit_holds(limit: int) -> None:
    found = tuner.candidates(CONV, limit)
    assert len(found) == limit
    assert found[: min(limit, 6) // 2] == tuner.candidates(CONV, 6)[: min(limit, 6) // 2]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_candidates_hold_what_the_estimate_likes_best(problem: Problem) -> None:
    ranked = tuner._ranked(problem)
    assert ranked[0] == tuning.plan_config(problem)
    assert len(ranked) >= 5
    assert set(ranked[:5]) <= set(tuner.candidates(problem))


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="limit = 0: expected at least 1"):
        tuner.candidates(GEMM, 0)


def test_the_fastest_wins_if_it_gains_more_than_noise() -> None:
    planned, other = TileConfig(128, 128), TileConfig(64, 128)
    assert tuner.fastest({planned: 100.0, other: 98.5}, planned) == planned
    assert tuner.fastest({planned: 100.0, other: 97.0}, planned) == other
    assert tuner.fastest({planned: 100.0, other: 120.0}, planned) == planned
    assert tuner.fastest({other: 120.0}, planned) == other  # the planned one did not run


def test_tiles_of_several_m_share_a_file_that_the_lookup_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, many = TileConfig(32, 64), TileConfig(64, 64)
    small = replace(GEMM, M=64)
    assert not tuner.is_measured(GEMM, tmp_path)
    path = tuner.write(GEMM, many, tmp_path)
    assert path == tuner.write(small, few, tmp_path)
    assert path.name == "w4a8_gemm-n320-k320-gpu.json"
    assert tuner.is_measured(GEMM, tmp_path)
    assert not tuner.is_measured(replace(GEMM, M=65), tmp_path)
    monkeypatch.setattr(tuning, "CONFIGS", tmp_path)
    assert tuning.find_config(GEMM) == many
    assert tuning.find_config(replace(GEMM, M=100)) == few
    assert tuner.is_measured(small, None)


def test_a_tile_that_cannot_run_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"powers of two; it is not written"):
        tuner.write(GEMM, TileConfig(48, 64), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_with_an_illegal_tile_counts_as_not_measured(tmp_path: Path) -> None:
    path = tuner.config_path(GEMM, tmp_path)
    tuning.save_configs(path, {GEMM.M: TileConfig(48, 64)})
    assert not tuner.is_measured(GEMM, tmp_path)


def test_the_interpreter_writes_only_where_it_is_told(tmp_path: Path) -> None:
    rehearsed = replace(GEMM, capability=0, device="interpreter")
    with pytest.raises(ConfigError, match=r"'interpreter'.*give --output DIR"):
        tuner.config_path(rehearsed, None)
    assert tuner.config_path(rehearsed, tmp_path).parent == tmp_path
