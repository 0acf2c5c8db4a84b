"""Backend cuda beside triton in the GPU benchmark: emulated, missing, wrong."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ptq4adm.bench import gpu_backends, gpu_emulation, gpu_unet
from ptq4adm.bench.gpu_backends import Backends, backends_on
from ptq4adm.bench.gpu_calls import ProductCall, empty_call
from ptq4adm.bench.gpu_faults import exit_code
from ptq4adm.bench.gpu_kernels import GpuJob, measure_layer, run_gpu_kernels
from ptq4adm.bench.gpu_report import format_gpu, group_ratios
from ptq4adm.bench.gpu_shapes import TOY_LAYERS
from ptq4adm.bench.gpu_tiles import chosen_tile, describe, tile_columns, tuning_problem
from ptq4adm.bench.gpu_timing import GpuCall, HostTimer
from ptq4adm.bench.gpu_unet import GpuUNetJob, run_gpu_unets
from ptq4adm.bench.gpu_unet_report import format_unets
from ptq4adm.errors import BackendUnavailableError, ConfigError
from ptq4adm.kernels import launch
from ptq4adm.kernels.tuning import TileConfig
from ptq4adm.ops import backend_report, cuda_backend, cuda_choice, cuda_matmul, resolve_backend
from ptq4adm.ops.cuda_tiles import CudaTile

interpreted = pytest.mark.skipif(
    not launch.IS_INTERPRETED, reason="rehearsals run in Triton's interpreter"
)
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
LINEAR, GATED, CONV = TOY_LAYERS[4], TOY_LAYERS[5], TOY_LAYERS[0]
BOTH = Backends(("triton", "cuda"))
REASON = "no nvcc was found"


@pytest.fixture(scope="module")
def _emulator() -> None:
    """Skips where the emulator cannot be compiled; the first test compiles it."""
    if importlib.util.find_spec("pybind11") is None:
        pytest.skip("pybind11 is not installed")
    gpu_emulation.build()


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def none() -> Iterator[None]:
        raise BackendUnavailableError(REASON)
        yield

    monkeypatch.setattr(gpu_backends, "emulated", none)


def test_all_backends_that_there_are_or_the_named_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_backend, "unavailable_reason", lambda _: None)
    for named, usable in (((), ("triton", "cuda")), (("cuda",), ("cuda",)), (("triton",),) * 2):
        with backends_on(GPU, named) as found:
            assert (found.usable, found.missing) == (usable, {})


def test_a_missing_one_is_said_or_an_error_if_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda_backend, "unavailable_reason", lambda _: REASON)
    with backends_on(GPU) as found:
        assert found.usable == ("triton",)
        assert found.reasons() == {
            "backend cuda": f"backend 'cuda' is not available: {REASON}",
        }
    with pytest.raises(BackendUnavailableError, match=REASON), backends_on(GPU, ["cuda"]):
        pytest.fail("entered")


@pytest.mark.parametrize("job", [GpuJob, GpuUNetJob])
def test_other_backends_are_refused(job: Any) -> None:
    with pytest.raises(ConfigError, match="'reference' is none of a GPU"):
        job(backends=("reference",))


# --- the emulator -------------------------------------------------------------------------------


@pytest.mark.usefixtures("_emulator")
def test_the_emulator_runs_the_backend_inside_the_block_only() -> None:
    before = [status for status in backend_report() if status.name == "cuda"]
    launched = cuda_matmul._launch
    with gpu_emulation.emulated():
        assert resolve_backend("cuda", "cpu") == "cuda"
        assert cuda_backend.unavailable_reason("cpu") is None
    assert cuda_matmul._launch is launched
    assert [status for status in backend_report() if status.name == "cuda"] == before
    if not before[0].available:
        with pytest.raises(BackendUnavailableError):
            resolve_backend("cuda", "cpu")


@pytest.mark.usefixtures("_emulator")
def test_equal_sources_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_emulation.subprocess, "run", lambda *_, **__: pytest.fail("compiled"))
    assert gpu_emulation.build().exists()


def test_why_there_is_no_emulator_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(gpu_emulation, "_ROOT", tmp_path)
        patch.setenv("CXX", "no-such-compiler")
        with pytest.raises(BackendUnavailableError, match="no-such-compiler cannot be run"):
            gpu_emulation.build()
        patch.setenv("CXX", "g++")
        with pytest.raises(BackendUnavailableError, match=r"does not compile: .*matmul_emulated"):
            gpu_emulation.build()
        assert not list(tmp_path.rglob("*.so"))
        patch.setattr(gpu_emulation, "_ROOT", tmp_path / "nowhere")
        with pytest.raises(BackendUnavailableError, match="compiled from a checkout"):
            gpu_emulation.build()


# --- rows ---------------------------------------------------------------------------------------


@interpreted
@pytest.mark.usefixtures("_emulator")
@pytest.mark.parametrize("layer", [LINEAR, GATED, CONV], ids=["linear", "geglu", "conv3x3"])
def test_both_backends_have_rows_side_by_side(layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[set[str]] = []
    time = HostTimer.time

    def spy(self: HostTimer, calls: dict[str, GpuCall], *, seconds: float) -> Any:
        timed.append(set(calls))
        return time(self, calls, seconds=seconds)

    monkeypatch.setattr(HostTimer, "time", spy)
    with backends_on(CPU) as backends:
        assert backends.usable == BOTH.usable
        rows = measure_layer(GpuJob(seconds=0.0), layer, backends, HostTimer(), {"int8": 1e15})
    assert len(timed) == 1  # in turns, not one backend after the other
    assert {row["failed"] for row in rows} == {""}
    own = {"w4a8", "quantize+w4a8", "w8a8", "quantize+w8a8"}
    own |= {"w4a8-geglu", "w4a8-geglu-int8"} if layer.is_gated else set()
    by_backend = {
        name: {row["variant"]: row for row in rows if row["backend"] == name}
        for name in ("triton", "cuda", "")
    }
    assert set(by_backend["cuda"]) == own
    assert set(by_backend["triton"]) == {*own, "quantize"}  # the same quantizer: measured once
    assert set(by_backend[""]) >= {"torch-fp16"}
    for name in own:
        triton, cuda = by_backend["triton"][name], by_backend["cuda"][name]
        # float16 results of the same integers are the same in every bit, so is the error
        assert cuda["error"] == triton["error"] > 0
        assert cuda["us"] > 0
        assert cuda["tile"] == f"sm80 {cuda['block_m']}x{cuda['block_n']}"
        assert (cuda["family"], triton["family"]) == ("sm80", "")
        assert (triton["block_m"], triton["block_n"], triton["split_k"]) == (64, 64, 1)
    names = list(by_backend["cuda"]["w4a8"])
    assert names[names.index("failed") :] == [
        *("failed", "backend", "family", "block_m", "block_n", "split_k", "skipped"),
    ]  # what earlier files have keeps its place


@interpreted
@pytest.mark.usefixtures("_emulator")
def test_a_wrong_cuda_kernel_is_a_row_without_time(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = cuda_matmul.linear

    def wrong(call: Any, tile: Any = None) -> torch.Tensor:
        y = exact(call, tile)
        y[7, 3] += 1
        return y

    with backends_on(CPU) as backends:
        monkeypatch.setattr(cuda_matmul, "linear", wrong)
        job = GpuJob(seconds=0.0, bits=(4,))
        rows = measure_layer(job, LINEAR, backends, HostTimer(), {})
    found = {(row["variant"], row["backend"]): row for row in rows}
    assert "1 of 864 exact results differ" in found["w4a8", "cuda"]["failed"]
    assert "us" not in found["w4a8", "cuda"]
    assert found["w4a8", "cuda"]["family"] == "sm80"
    assert found["w4a8", "triton"]["us"] > 0


@interpreted
@pytest.mark.usefixtures("no_cuda")
def test_a_missing_backend_is_in_the_rows_and_in_the_text() -> None:
    job = GpuJob(kinds=("linear", "layernorm"), bits=(4,), is_rehearsal=True, seconds=0.0)
    result = run_gpu_kernels(job, progress=False)
    skipped = [row for row in result["rows"] if row["skipped"]]
    assert {(row["kind"], row["variant"], row["backend"]) for row in skipped} == {
        ("linear", "w4a8", "cuda"),
        ("linear-geglu", "w4a8", "cuda"),
    }
    assert {row["skipped"] for row in skipped} == {REASON}
    assert not any("us" in row for row in skipped)
    assert exit_code(result) == 0
    assert f"not measured: backend cuda: {REASON}" in format_gpu(result)
    assert {entry["backend"] for entry in group_ratios(result["rows"])} == {"triton"}
    with pytest.raises(BackendUnavailableError, match=REASON):
        run_gpu_kernels(replace(job, backends=("cuda",)), progress=False)


# --- whole steps --------------------------------------------------------------------------------

STEP = GpuUNetJob(variants=(gpu_unet.STATIC,), rounds=1, is_rehearsal=True)


@interpreted
@pytest.mark.usefixtures("_emulator")
def test_a_step_has_a_variant_for_each_backend() -> None:
    result = run_gpu_unets(STEP, progress=False)
    rows = {(row["variant"], row["backend"]): row for row in result["rows"]}
    assert list(rows) == [
        ("fp16-eager", ""),
        ("w4a8-static-graph", "triton"),
        ("w4a8-static-graph", "cuda"),
    ]
    triton, cuda = rows["w4a8-static-graph", "triton"], rows["w4a8-static-graph", "cuda"]
    assert cuda["ms"] > 0
    assert cuda["error"] == pytest.approx(triton["error"], rel=0.05)
    assert cuda["weights_mb"] == pytest.approx(triton["weights_mb"], rel=0.1)
    assert "w4a8-static-graph cuda" in format_unets(result)


@interpreted
@pytest.mark.usefixtures("no_cuda")
def test_a_step_without_the_module_is_a_row_with_the_reason() -> None:
    result = run_gpu_unets(STEP, progress=False)
    last = result["rows"][-1]
    assert (last["variant"], last["backend"]) == ("w4a8-static-graph", "cuda")
    assert (last["skipped"], last["failed"]) == (REASON, "")
    assert result["missing"] == {"backend cuda": REASON}
    assert exit_code(result) == 0
    assert f"not measured: backend cuda: {REASON}" in format_unets(result)


# --- tiles --------------------------------------------------------------------------------------


def test_tiles_in_words_and_columns() -> None:
    assert describe(CudaTile(128, 64)) == "sm80 128x64"
    assert describe(CudaTile(64, 32, 4)) == "sm80 64x32 k4"
    assert tile_columns("cuda", CudaTile(64, 32, 4)) == {
        **{"backend": "cuda", "family": "sm80"},
        **{"block_m": 64, "block_n": 32, "split_k": 4},
    }
    assert tile_columns("triton", TileConfig(16, 32))["family"] == ""
    assert set(tile_columns("", None).values()) == {""}


def test_a_row_says_the_tile_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = tuning_problem(LINEAR, 4, CPU)
    assert isinstance(chosen_tile(problem, "triton"), TileConfig)
    monkeypatch.setattr(cuda_choice, "find_tile", lambda _: CudaTile(64, 32, 2))
    assert chosen_tile(problem, "cuda") == CudaTile(64, 32, 2)


def test_a_product_goes_to_its_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    for name in ("linear", "conv2d", "accumulate_linear", "accumulate_conv2d"):
        monkeypatch.setattr(
            cuda_matmul, name, lambda *args, name=name: ran.append((name, args[-1]))
        )
    for layer in (LINEAR, CONV):
        call = replace(empty_call(layer, 4, CPU), backend="cuda")
        assert isinstance(call, ProductCall)
        call.run(CudaTile(64, 32))
        call.accumulate()
    tile = CudaTile(64, 32)
    assert ran == [
        *(("linear", tile), ("accumulate_linear", None)),
        *(("conv2d", tile), ("accumulate_conv2d", None)),
    ]
