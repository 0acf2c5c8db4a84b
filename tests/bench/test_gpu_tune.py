"""Tuning, rehearsed in Triton's interpreter, and what is compiled ahead."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ptq4adm.kernels import launch
from ptq4adm.kernels.tuning import TileConfig

from ptq4adm.bench import gpu_precompile, gpu_tune
from ptq4adm.bench.gpu_calls import ProductCall
from ptq4adm.bench.gpu_precompile import Wanted, precompile
from ptq4adm.bench.gpu_shapes import TOY_LAYERS
from ptq4adm.bench.gpu_timing import HostTimer
from ptq4adm.bench.gpu_tune import TuneJob, format_tune, measure_product, run_tune
from ptq4adm.errors import BenchmarkError, ConfigError

interpreted = pytest.mark.skipif(
    not launch.IS_INTERPRETED, reason="rehearsals run in Triton's interpreter"
)
CPU = torch.device("cpu")
TILES = (TileConfig(64, 64, num_stages=1), TileConfig(16, 64, num_stages=1))


def rehearsal(folder: Path | None, **changes: Any) -> TuneJob:
    return TuneJob(kinds=("linear",), is_rehearsal=True, output=folder, **changes)


@interpreted
def test_a_run_writes_files_and_goes_on_where_it_was(tmp_path: Path) -> None:
    result = run_tune(rehearsal(tmp_path), progress=False)
    files = {Path(name).name for name in result["files"]}
    assert files == {
        "w4a8_gemm-n48-k64-interpreter.json",
        "w4a8_gemm-n64-k64-interpreter.json",
        "w4a8_gemm-geglu-n64-k64-interpreter.json",
    }
    assert files == {path.name for path in tmp_path.iterdir()}
    chosen = [row for row in result["rows"] if row["chosen"]]
    assert len(chosen) == 3
    assert sum(row["planned"] for row in result["rows"]) == 3
    stored = json.loads((tmp_path / "w4a8_gemm-n48-k64-interpreter.json").read_text())
    assert list(stored) == ["18"]
    assert "x planned" in format_tune(result)
    again = run_tune(rehearsal(tmp_path), progress=False)
    assert (again["known"], again["rows"], again["files"]) == (3, [], [])
    fresh = run_tune(rehearsal(tmp_path, is_fresh=True), progress=False)
    assert (fresh["known"], len(fresh["files"])) == (0, 3)


@interpreted
def test_a_deadline_leaves_products_out(tmp_path: Path) -> None:
    result = run_tune(rehearsal(tmp_path, deadline=0.0), progress=False)
    assert len(result["left_out"]) == 3
    assert "no time for: w4a8_gemm linear 18x64->64 geglu" in format_tune(result)


@interpreted
def test_the_interpreter_does_not_write_into_the_package() -> None:
    with pytest.raises(ConfigError, match="give --output DIR"):
        run_tune(rehearsal(None), progress=False)


def linear_product() -> gpu_tune.Product:
    found = rehearsal(None).products(CPU)
    return next(p for p in found if p.problem.N == 48)


def change_run(monkeypatch: pytest.MonkeyPatch, wrong: TileConfig, change: Any) -> None:
    """Let one tile's result go through a function."""
    run = ProductCall.run

    def changed(self: ProductCall, config: TileConfig | None = None) -> torch.Tensor:
        y = run(self, config)
        return change(y) if config == wrong else y

    monkeypatch.setattr(ProductCall, "run", changed)
    monkeypatch.setattr(HostTimer, "time", lambda *_, **__: pytest.fail("timed"))


def off_by_one(y: torch.Tensor) -> torch.Tensor:
    y[5, 7] += 1
    return y


def refuse(_: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("out of resource: shared memory")


@interpreted
def test_a_tile_with_another_result_stops_the_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    change_run(monkeypatch, TILES[1], off_by_one)
    with pytest.raises(BenchmarkError, match=r"16x64x64 .*: differs from the planned tile's"):
        measure_product(linear_product(), TILES, HostTimer())


@interpreted
def test_the_planned_tile_is_held_to_exact_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    change_run(monkeypatch, TILES[0], off_by_one)
    with pytest.raises(BenchmarkError, match="1 of 864 exact results"):
        measure_product(linear_product(), TILES, HostTimer())


@interpreted
def test_a_planned_tile_that_does_not_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    change_run(monkeypatch, TILES[0], refuse)
    with pytest.raises(BenchmarkError, match=r"planned tile does not run: .*out of resource"):
        measure_product(linear_product(), TILES, HostTimer())


@interpreted
def test_another_tile_that_does_not_run_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    run = ProductCall.run

    def partly(self: ProductCall, config: TileConfig | None = None) -> torch.Tensor:
        return refuse(torch.empty(0)) if config == TILES[1] else run(self, config)

    monkeypatch.setattr(ProductCall, "run", partly)
    measured = measure_product(linear_product(), TILES, HostTimer())
    assert measured.chosen == TILES[0]
    assert len(measured.rows) == 1
    assert len(measured.failed) == 1
    assert "out of resource" in measured.failed[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kinds": ("layernorm",)}, "kind 'layernorm' has no tiles"),
        ({"models": ("x",)}, "model 'x'"),
        ({"bits": (5,)}, "bits 5"),
    ],
    ids=str,
)
def test_wrong_jobs_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TuneJob(**change)


# --- compiling ahead ----------------------------------------------------------------------------


def test_equal_kernels_are_compiled_once() -> None:
    layer = TOY_LAYERS[5]
    task = Wanted(layer, TILES[0])
    same_kernel = Wanted(replace(layer, shape=replace(layer.shape, height=50)), TILES[0])
    assert task.key() == same_kernel.key()
    others = [
        replace(task, config=TILES[1]),
        replace(task, bits=8),
        replace(task, is_gated=True),
        replace(task, is_int8=True),
        replace(task, layer=replace(layer, shape=replace(layer.shape, height=48))),
        replace(task, config=None),
        Wanted(TOY_LAYERS[6]),
    ]
    assert len({task.key(), *(other.key() for other in others)}) == 1 + len(others)


def test_one_kernel_needs_no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_precompile, "ProcessPoolExecutor", lambda *_, **__: pytest.fail("pool"))
    monkeypatch.setattr(launch, "capability", lambda _: 90)
    monkeypatch.setattr(launch, "multiprocessors", lambda _: 132)
    assert precompile([Wanted(TOY_LAYERS[5], TILES[0])], CPU, progress=False) == []
