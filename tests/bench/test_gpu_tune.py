"""Tuning, rehearsed in Triton's interpreter, and what is compiled ahead."""

from __future__ import annotations

import json
import time
from concurrent.futures import Future
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ptq4adm.bench import gpu_precompile, gpu_tune
from ptq4adm.bench.gpu_calls import ProductCall
from ptq4adm.bench.gpu_precompile import Precompiler, Wanted, compiled_batches
from ptq4adm.bench.gpu_shapes import TOY_LAYERS
from ptq4adm.bench.gpu_tiles import use_configs
from ptq4adm.bench.gpu_timing import HostTimer
from ptq4adm.bench.gpu_tune import TuneJob, format_tune, measure_product, run_tune
from ptq4adm.errors import BackendUnavailableError, ConfigError
from ptq4adm.kernels import launch, tuning
from ptq4adm.kernels.tuning import TileConfig

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


@interpreted
def test_tiles_of_a_folder_are_used_from_then_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, other = linear_product().problem, TILES[1]
    assert tuning.find_config(problem) != other
    file = tmp_path / tuning.config_file(problem).name
    file.write_text(json.dumps({str(problem.M): asdict(other)}))
    monkeypatch.setattr(tuning, "CONFIGS", tuning.CONFIGS)  # restored afterwards
    use_configs(tmp_path)
    assert tuning.find_config(problem) == other
    monkeypatch.undo()
    tuning.find_config.cache_clear()


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


def off_by_one(y: torch.Tensor) -> torch.Tensor:
    y[5, 7] += 1
    return y


def refuse(_: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("out of resource: shared memory")


@interpreted
def test_a_tile_with_another_result_is_a_row_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    change_run(monkeypatch, TILES[1], off_by_one)
    measured = measure_product(linear_product(), TILES, HostTimer())
    assert measured.chosen == TILES[0]
    right, wrong = measured.rows
    assert right["us"] > 0
    assert right["failed"] == ""
    assert "us" not in wrong
    assert "differs from the result of the first right tile" in wrong["failed"]
    assert len(measured.failed) == 1
    assert "16x64x64" in measured.failed[0]
    assert measured.unusable == []


@interpreted
def test_the_planned_tile_is_held_to_exact_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    change_run(monkeypatch, TILES[0], off_by_one)
    measured = measure_product(linear_product(), TILES, HostTimer())
    assert measured.chosen == TILES[1]  # which is held to them as well, as the first right one
    assert "1 of 864 exact results" in measured.rows[0]["failed"]
    assert (measured.rows[0]["planned"], measured.rows[0]["chosen"]) == (1, 0)
    assert "planned tile" in measured.failed[0]


@interpreted
def test_a_planned_tile_that_does_not_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    change_run(monkeypatch, TILES[0], refuse)
    measured = measure_product(linear_product(), TILES, HostTimer())
    assert measured.chosen == TILES[1]
    assert len(measured.failed) == 1
    assert "planned tile 64x64x64" in measured.failed[0]
    assert "out of resource" in measured.failed[0]


@interpreted
def test_a_product_without_a_usable_tile_does_not_stop_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, saved = ProductCall.run, []

    def partly(self: ProductCall, config: TileConfig | None = None) -> torch.Tensor:
        return refuse(torch.empty(0)) if self.call.w_scale.numel() == 48 else run(self, config)

    monkeypatch.setattr(ProductCall, "run", partly)
    result = run_tune(
        rehearsal(tmp_path), progress=False, save=lambda _, tables: saved.append(tables)
    )
    assert {Path(name).name for name in result["files"]} == {
        "w4a8_gemm-n64-k64-interpreter.json",
        "w4a8_gemm-geglu-n64-k64-interpreter.json",
    }
    assert any("no tile can be used" in reason for reason in result["failed"])
    assert len(saved) == 3
    assert [row for tables in saved for row in tables["gpu-tune.csv"]] == result["rows"]
    assert "FAILED: w4a8_gemm linear 18x64->48" in format_tune(result)


@interpreted
def test_rows_of_a_lost_gpu_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check, saved = gpu_tune.Operands.check, []

    def lost(self: Any, config: TileConfig) -> None:
        if saved:
            raise BackendUnavailableError("the GPU cannot be used any more")
        check(self, config)

    def describe(error: BaseException, _: torch.device) -> str:
        raise error

    monkeypatch.setattr(gpu_tune.Operands, "check", lost)
    monkeypatch.setattr(gpu_tune, "describe_fault", describe)
    with pytest.raises(BackendUnavailableError):
        run_tune(rehearsal(tmp_path), progress=False, save=lambda _, tables: saved.append(tables))
    assert len(saved) == 1
    assert len(list(tmp_path.iterdir())) == 1


@interpreted
def test_groups_have_files_of_their_own(tmp_path: Path) -> None:
    result = run_tune(rehearsal(tmp_path, is_grouped=True), progress=False)
    assert result["failed"] == []
    assert {Path(name).name for name in result["files"]} == {
        "w4a8_gemm-grouped-n48-k64-interpreter.json",
        "w4a8_gemm-grouped-n64-k64-interpreter.json",
        "w4a8_gemm-geglu-grouped-n64-k64-interpreter.json",
    }
    assert {row["grouped"] for row in result["rows"]} == {1}


@interpreted
def test_another_tile_that_does_not_run_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    run = ProductCall.run

    def partly(self: ProductCall, config: TileConfig | None = None) -> torch.Tensor:
        return refuse(torch.empty(0)) if config == TILES[1] else run(self, config)

    monkeypatch.setattr(ProductCall, "run", partly)
    measured = measure_product(linear_product(), TILES, HostTimer())
    assert measured.chosen == TILES[0]
    assert [row["failed"] == "" for row in measured.rows] == [True, False]
    assert measured.failed == []
    assert len(measured.unusable) == 1
    assert "out of resource" in measured.unusable[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kinds": ("layernorm",)}, "kind 'layernorm' has no tiles"),
        ({"models": ("x",)}, "model 'x'"),
        ({"bits": (5,)}, "bits 5"),
        ({"bits": (4, 8), "is_grouped": True}, "groups are of 4-bit weights only"),
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
        replace(task, is_grouped=True),
        replace(task, layer=replace(layer, shape=replace(layer.shape, height=48))),
        replace(task, config=None),
        Wanted(TOY_LAYERS[6]),
    ]
    assert len({task.key(), *(other.key() for other in others)}) == 1 + len(others)


GPU = torch.device("cuda", 0)


class Pool:
    """Stands for the processes: a task of 18 rows never ends, one of 7 fails."""

    def __init__(self) -> None:
        self.submitted: list[Wanted] = []
        self.is_shut = False

    def submit(self, _: object, task: Wanted, *target: int) -> Future[None]:
        assert target == (90, 132)
        self.submitted.append(task)
        future: Future[None] = Future()
        if task.layer.shape.height == 7:
            future.set_exception(RuntimeError("no such\ninstruction"))
        elif task.layer.shape.height != 18:
            future.set_result(None)
        return future

    def shutdown(self, *, wait: bool, cancel_futures: bool) -> None:
        assert wait
        assert cancel_futures
        self.is_shut = True


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Pool:
    made = Pool()
    monkeypatch.setattr(gpu_precompile, "ProcessPoolExecutor", lambda *_, **__: made)
    monkeypatch.setattr(gpu_precompile.os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(launch, "capability", lambda _: 90)
    monkeypatch.setattr(launch, "multiprocessors", lambda _: 132)
    return made


def of_height(height: int) -> Wanted:
    layer = TOY_LAYERS[4]
    return Wanted(replace(layer, shape=replace(layer.shape, height=height)), TILES[0], is_int8=True)


def test_a_batch_compiles_what_no_earlier_one_did_and_says_what_failed(pool: Pool) -> None:
    with Precompiler(GPU, progress=False) as compiler:
        assert compiler.compile([of_height(16), of_height(7)])
        assert compiler.compile([of_height(32), of_height(1)])
        assert [task.layer.shape.height for task in pool.submitted] == [16, 7, 1]
        assert not pool.is_shut
    assert pool.is_shut
    assert len(compiler.failed) == 1
    assert compiler.failed[0].endswith("RuntimeError: no such instruction")


def test_nothing_is_waited_for_after_the_deadline(pool: Pool) -> None:
    began = time.perf_counter()
    with Precompiler(GPU, ends=began + 0.05, progress=False) as compiler:
        assert not compiler.compile([of_height(18)])
        assert pool.is_shut
    assert time.perf_counter() - began < 5


@pytest.mark.usefixtures("pool")
def test_what_is_not_compiled_in_time_is_not_measured() -> None:
    items = [16, 1, 18, 32, 48]
    with Precompiler(GPU, ends=time.perf_counter() + 0.05, progress=False) as compiler:
        batches = compiled_batches(
            items, lambda batch: [of_height(item) for item in batch], compiler, size=2
        )
        assert [item for item, is_ready in batches if is_ready] == [16, 1]


def test_without_a_gpu_nothing_is_compiled(pool: Pool) -> None:
    with Precompiler(CPU, progress=False) as compiler:
        assert compiler.compile([of_height(16)])
    assert pool.submitted == []
