"""Tuning backend cuda, rehearsed on the emulator: one file a GPU, which its products look up."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ptq4adm.bench import gpu_emulation
from ptq4adm.bench.gpu_backends import CUDA, backends_on
from ptq4adm.bench.gpu_kernels import GpuJob, measure_layer
from ptq4adm.bench.gpu_tile_sets import TILE_SETS
from ptq4adm.bench.gpu_tiles import use_configs
from ptq4adm.bench.gpu_timing import HostTimer
from ptq4adm.bench.gpu_tune import TuneJob, format_tune, measure_product, run_tune
from ptq4adm.errors import BackendUnavailableError, ConfigError
from ptq4adm.kernels import launch, tuning
from ptq4adm.kernels.tuning import Problem
from ptq4adm.ops import cuda_backend, cuda_choice, cuda_matmul, cuda_tiles
from ptq4adm.ops.cuda_tiles import CudaTile

interpreted = pytest.mark.skipif(
    not launch.IS_INTERPRETED, reason="rehearsals run in Triton's interpreter"
)
CPU = torch.device("cpu")
TILES = (CudaTile(64, 32), CudaTile(128, 128))
SIZES = ((128, 128), (128, 64), (64, 64), (64, 32))


@pytest.fixture(scope="module")
def _emulator() -> None:
    if importlib.util.find_spec("pybind11") is None:
        pytest.skip("pybind11 is not installed")
    gpu_emulation.build()


@pytest.fixture(autouse=True)
def _configs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tuning, "CONFIGS", tuning.CONFIGS)  # restored afterwards
    yield
    monkeypatch.undo()
    cuda_tiles.forget()
    tuning.find_config.cache_clear()


def rehearsal(folder: Path | None, **changes: Any) -> TuneJob:
    return TuneJob(kinds=("linear",), backend=CUDA, is_rehearsal=True, output=folder, **changes)


# --- which tiles --------------------------------------------------------------------------------


@pytest.fixture
def _tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    infos = [SimpleNamespace(block_m=m, block_n=n) for m, n in SIZES]
    module = SimpleNamespace(matmul_tiles=lambda: infos)
    monkeypatch.setattr(cuda_backend, "module", lambda: module)


@pytest.mark.usefixtures("_tiles")
def test_every_tile_and_split_is_a_candidate_the_counted_one_first() -> None:
    problem = Problem("w4a8_conv2d", 128, 640, (640,), 9, multiprocessors=132)
    found = TILE_SETS[CUDA].candidates(problem, None)
    assert found[0] == cuda_choice.choose_tile(128, 640, 90, 132)
    assert set(found) == {CudaTile(*size, split) for size in SIZES for split in cuda_choice.SPLITS}
    assert len(found) == len(set(found)) == 32
    few = TILE_SETS[CUDA].candidates(problem, 6)
    assert few == found[:6]


@pytest.mark.usefixtures("_tiles")
def test_sums_are_split_where_there_are_steps_and_idle_multiprocessors() -> None:
    short = Problem("w4a8_gemm", 64, 640, (192,), multiprocessors=132)
    splits = {tile.split_k for tile in TILE_SETS[CUDA].candidates(short, None)}
    assert splits == {1, 2, 3}
    full = Problem("w4a8_gemm", 8192, 2560, (2560,), multiprocessors=132)
    found = TILE_SETS[CUDA].candidates(full, None)
    assert set(found) == {CudaTile(*size) for size in SIZES}


# --- a run --------------------------------------------------------------------------------------


@interpreted
@pytest.mark.usefixtures("_emulator")
def test_a_run_writes_one_file_and_goes_on_where_it_was(tmp_path: Path) -> None:
    result = run_tune(rehearsal(tmp_path), progress=False)
    assert result["failed"] == result["unusable"] == result["left_out"] == []
    assert [Path(name) for name in result["files"]] == [tmp_path / "cuda-interpreter.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["cuda-interpreter.json"]
    stored = json.loads((tmp_path / "cuda-interpreter.json").read_text())
    assert list(stored["tiles"]) == [
        *("w4a8_gemm-geglu-n64-k64", "w4a8_gemm-n48-k64", "w4a8_gemm-n64-k64"),
    ]
    assert list(stored["tiles"]["w4a8_gemm-n48-k64"]) == ["18"]
    rows = result["rows"]
    assert [row["planned"] for row in rows] == [1, 0] * 3
    assert sum(row["chosen"] for row in rows) == 3
    assert {(row["backend"], row["family"]) for row in rows} == {("cuda", "sm80")}
    assert list(rows[0])[-5:] == ["backend", "family", "block_m", "block_n", "split_k"]
    assert "backend cuda: 6 measurements" in format_tune(result)
    again = run_tune(rehearsal(tmp_path), progress=False)
    assert (again["known"], again["rows"], again["files"]) == (3, [], [])
    fresh = run_tune(rehearsal(tmp_path, is_fresh=True), progress=False)
    assert (fresh["known"], len(fresh["rows"])) == (0, 6)


@interpreted
@pytest.mark.usefixtures("_emulator")
@pytest.mark.parametrize("kind", ["conv3x3", "conv1x1", "linear"])
def test_what_was_tuned_runs_from_then_on(kind: str, tmp_path: Path) -> None:
    job = replace(rehearsal(tmp_path), kinds=(kind,), bits=(4, 8))
    run_tune(job, progress=False)
    path = tmp_path / "cuda-interpreter.json"
    tiles = cuda_tiles.load(path, "interpreter")
    other = CudaTile(128, 64)
    cuda_tiles.save(
        path, "interpreter", {name: dict.fromkeys(by_m, other) for name, by_m in tiles.items()}
    )
    use_configs(tmp_path)
    ran = []
    with backends_on(CPU, [CUDA]) as backends:
        launched = cuda_matmul._launch

        def spy(module: Any, arguments: Any, bits: int, *rest: Any) -> None:
            (tile,) = (value for value in rest if isinstance(value, CudaTile))
            ran.append((bits, (tile.block_m, tile.block_n)))
            launched(module, arguments, bits, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda_matmul, "_launch", spy)
            layers = GpuJob(kinds=(kind,), is_rehearsal=True).layers()
            for layer in layers:
                rows = measure_layer(GpuJob(seconds=0.0), layer, backends, HostTimer(), {})
                own = [row for row in rows if row["backend"] == CUDA and row["tile"]]
                assert {row["tile"] for row in own} == {"sm80 128x64"}
    assert set(ran) == {(4, (128, 64)), (8, (128, 64))}


@interpreted
@pytest.mark.usefixtures("_emulator")
def test_groups_and_splits_have_their_tiles(tmp_path: Path) -> None:
    job = replace(rehearsal(tmp_path, is_grouped=True), kinds=("conv3x3",))
    product = job.products(CPU)[0]
    with backends_on(CPU, [CUDA]):
        tiles = (CudaTile(64, 32), CudaTile(64, 32, 3), CudaTile(128, 64, 2))
        measured = measure_product(product, tiles, HostTimer())
        assert measured.failed == measured.unusable == []
        assert [row["tile"] for row in measured.rows] == [
            *("sm80 64x32", "sm80 64x32 k3", "sm80 128x64 k2"),
        ]
        TILE_SETS[CUDA].write(product.problem, tiles[1], tmp_path)
        assert TILE_SETS[CUDA].is_measured(product.problem, tmp_path)
    assert cuda_tiles.load(tmp_path / "cuda-interpreter.json", "interpreter") == {
        "w4a8_conv2d-boxes-grouped-n32-k576": {15: CudaTile(64, 32, 3)}
    }


@interpreted
@pytest.mark.usefixtures("_emulator")
def test_a_wrong_tile_is_a_row_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    product = rehearsal(None).products(CPU)[0]
    exact = cuda_matmul.linear

    def wrong(call: Any, tile: Any = None) -> torch.Tensor:
        y = exact(call, tile)
        if tile == TILES[1]:
            y[5, 7] += 1
        return y

    with backends_on(CPU, [CUDA]):
        monkeypatch.setattr(cuda_matmul, "linear", wrong)
        measured = measure_product(product, TILES, HostTimer())
    assert measured.chosen == TILES[0]
    right, bad = measured.rows
    assert (right["failed"], right["chosen"]) == ("", 1)
    assert "differs from the result of the first right tile" in bad["failed"]
    assert "us" not in bad
    assert "sm80 128x128" in measured.failed[0]


@interpreted
@pytest.mark.usefixtures("_emulator")
def test_a_tile_that_the_gpu_refuses_is_listed_and_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    product = rehearsal(None).products(CPU)[0]
    exact = cuda_matmul.linear

    def refusing(call: Any, tile: Any = None) -> torch.Tensor:
        if tile == TILES[1]:
            raise ConfigError("family 'sm90a': needs compute capability 9.0")
        return exact(call, tile)

    with backends_on(CPU, [CUDA]):
        monkeypatch.setattr(cuda_matmul, "linear", refusing)
        measured = measure_product(product, TILES, HostTimer())
    assert measured.chosen == TILES[0]
    assert measured.failed == []
    assert "needs compute capability 9.0" in measured.unusable[0]


@interpreted
@pytest.mark.usefixtures("_emulator")
def test_a_broken_file_stops_the_tuner_before_it_measures(tmp_path: Path) -> None:
    path = tmp_path / "cuda-interpreter.json"
    path.write_text("{}")
    with pytest.raises(ConfigError, match="not a file of measured tiles"):
        run_tune(rehearsal(tmp_path), progress=False)
    assert path.read_text() == "{}"


@interpreted
@pytest.mark.usefixtures("_emulator")
def test_the_emulators_times_do_not_go_into_the_package() -> None:
    with pytest.raises(ConfigError, match="give --output DIR"):
        run_tune(rehearsal(None), progress=False)


@interpreted
def test_without_the_module_the_tuner_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def missing() -> None:
        raise BackendUnavailableError("no nvcc was found")

    monkeypatch.setattr(gpu_emulation, "load", missing)
    with pytest.raises(BackendUnavailableError, match="no nvcc was found"):
        run_tune(rehearsal(tmp_path), progress=False)


def test_other_backends_have_no_tiles() -> None:
    with pytest.raises(ConfigError, match="'cpu' is none of a GPU"):
        TuneJob(backend="cpu")
