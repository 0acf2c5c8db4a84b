"""The driver for compute-sanitizer, in Triton's interpreter: every way is taken and checked."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from scripts import load_script

from ptq4adm.bench import gpu_emulation
from ptq4adm.bench.gpu_calls import ProductCall
from ptq4adm.kernels import launch
from ptq4adm.ops import cuda_matmul, triton_matmul
from ptq4adm.ops.arguments import MatmulOptions

CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(
    not launch.IS_INTERPRETED, reason="rehearsals run in Triton's interpreter"
)


sanitize = load_script("sanitize_gpu")


def ways(name: str) -> set[tuple[bool, str]]:
    case = sanitize.CASES[name]
    problem = ProductCall(sanitize.make_call(case), case.geometry).problem()
    return {(tile.split_k > 1, tile.form) for tile in sanitize.tiles(problem)}


def test_boxes_splits_and_every_option_are_among_the_cases() -> None:
    assert {(False, "tma"), (False, "gather")} <= ways("conv-tma")
    for name in ("conv-split", "gemm-split", "conv-segments", "gemm-groups"):
        assert {(True, "gather"), (False, "gather")} <= ways(name)
    used: set[str] = set()
    default = MatmulOptions()
    for case in sanitize.CASES.values():
        options = sanitize.make_call(case).options
        used |= {
            f for f in MatmulOptions.__slots__ if getattr(options, f) is not getattr(default, f)
        }
    assert used == set(MatmulOptions.__slots__)
    assert {case.bits for case in sanitize.CASES.values()} == {4, 8}


def test_a_large_tile_is_among_them() -> None:
    case = sanitize.CASES["gemm"]
    problem = ProductCall(sanitize.make_call(case), None).problem()
    assert max(tile.block_m * tile.block_n for tile in sanitize.tiles(problem)) >= 128 * 128


@interpreted
@pytest.mark.parametrize("name", ["conv-tma-groups-full", "gemm-geglu-int8"])
def test_a_case_takes_its_ways(name: str) -> None:
    assert sanitize.run_product(name, sanitize.CASES[name], CPU) == ways(name)


@interpreted
def test_a_wrong_case_is_said_and_does_not_stop_the_next(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exact = triton_matmul.accumulate_linear

    def wrong(call: Any, config: Any) -> list[torch.Tensor]:
        sums = exact(call, config)
        if call.bits == 8:
            sums[0][20, 49] += 1
        return sums

    monkeypatch.setattr(triton_matmul, "accumulate_linear", wrong)
    assert sanitize.run_cases(["gemm-w8", "layernorm", "quantize"], CPU, deadline=None) == 1
    text = capsys.readouterr().out
    assert "FAILED: gemm-w8: BenchmarkError" in text
    assert "1 of 1050 exact results differ" in text
    assert "layernorm: right\nquantize: right" in text
    assert "3 of 3 cases ran, 1 failed" in text


def test_a_deadline_leaves_cases_out_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert sanitize.run_cases(["gemm", "geglu"], CPU, deadline=-1.0) == 0
    text = capsys.readouterr().out
    assert "no time for: gemm, geglu" in text
    assert "0 of 2 cases ran" in text


@interpreted
def test_processes_share_the_cases_and_a_wrong_one_is_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert sanitize.run_jobs(["quantize", "geglu"], 8, ["--rehearse"]) == 0
    text = capsys.readouterr().out
    assert "quantize: right" in text
    assert "geglu: right" in text
    assert "2 cases in 2 processes, 0 of which failed" in text
    assert sanitize.run_jobs(["no such case"], 2, []) == 1
    assert "1 of which failed" in capsys.readouterr().out


# --- backend cuda -------------------------------------------------------------------------------


@pytest.fixture
def emulator() -> Iterator[Any]:
    pytest.importorskip("pybind11")
    with gpu_emulation.emulated():
        yield gpu_emulation.load()


@interpreted
def test_every_tile_of_the_module_is_taken_whole_and_the_ends_split(emulator: Any) -> None:
    case = sanitize.CASES["conv-split"]
    problem = ProductCall(sanitize.make_call(case), case.geometry).problem()
    found = sanitize.tiles(problem, "cuda")
    sizes = {(info.block_m, info.block_n) for info in emulator.matmul_tiles()}
    assert {(t.block_m, t.block_n) for t in found if t.split_k == 1} == sizes
    assert len({(t.block_m, t.block_n) for t in found if t.split_k > 1}) == 2
    assert {t.split_k for t in found} == {1, 2, 3}


@interpreted
@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize("name", ["conv-segments", "gemm-geglu-units"])
def test_a_case_of_the_cuda_backend_takes_its_ways(name: str) -> None:
    ran = sanitize.run_product(name, sanitize.CASES[name], CPU, "cuda")
    assert {is_split for is_split, _ in ran} == {False, True}
    assert len({form for _, form in ran}) == 4


@interpreted
@pytest.mark.usefixtures("emulator")
def test_a_wrong_cuda_kernel_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exact = cuda_matmul.accumulate_linear

    def wrong(call: Any, tile: Any) -> list[torch.Tensor]:
        sums = exact(call, tile)
        if tile.split_k == 3:
            sums[0][8, 49] += 1
        return sums

    monkeypatch.setattr(cuda_matmul, "accumulate_linear", wrong)
    names = ["gemm-split", "conv-stride"]
    assert sanitize.run_cases(names, CPU, deadline=None, backend="cuda") == 1
    text = capsys.readouterr().out
    assert "FAILED: gemm-split: BenchmarkError" in text
    assert "split_k=3" in text
    assert "conv-stride: right" in text


def test_what_is_triton_s_in_both_backends_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["sanitize_gpu.py", "--backend", "cuda", "--case", "layernorm"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit):
        sanitize.main()
    assert "case 'layernorm': backend cuda runs Triton's" in capsys.readouterr().err
    assert set(sanitize.all_names("cuda")) == set(sanitize.CASES)
