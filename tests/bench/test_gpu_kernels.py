"""The GPU benchmark end to end in Triton's interpreter, on toy shapes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from ptq4adm import ops
from ptq4adm.bench import gpu_kernels
from ptq4adm.bench.gpu_activations import activation_variants
from ptq4adm.bench.gpu_backends import Backends
from ptq4adm.bench.gpu_calls import layer_geometry
from ptq4adm.bench.gpu_faults import describe_fault, exit_code
from ptq4adm.bench.gpu_kernels import GpuJob, make_row, measure_layer, run_gpu_kernels
from ptq4adm.bench.gpu_peers import asymmetric_groups
from ptq4adm.bench.gpu_problem import ROWS, GpuProblem
from ptq4adm.bench.gpu_products import product_variants
from ptq4adm.bench.gpu_report import format_gpu
from ptq4adm.bench.gpu_shapes import TOY_LAYERS, GpuLayer
from ptq4adm.bench.gpu_tiles import describe, tuning_problem
from ptq4adm.bench.gpu_timing import GpuCall, GpuTiming, HostTimer
from ptq4adm.bench.gpu_variant import GpuVariant, check_equal, check_steps
from ptq4adm.bench.shapes import LINEAR, LayerShape
from ptq4adm.errors import BackendUnavailableError, BenchmarkError, ConfigError, OutputError
from ptq4adm.kernels import launch
from ptq4adm.kernels.tuning import TileConfig
from ptq4adm.ops import reference
from ptq4adm.ops.arguments import Matmul, MatmulOptions

interpreted = pytest.mark.skipif(
    not launch.IS_INTERPRETED, reason="rehearsals run in Triton's interpreter"
)
CPU = torch.device("cpu")
PRODUCTS = [layer for layer in TOY_LAYERS if layer.is_product]
ACTIVATIONS = [layer for layer in TOY_LAYERS if not layer.is_product]
TRITON = Backends(("triton",))
PEAKS = {"copy": 1e12, "int8": 1e15, "fp16": 5e14}


def by_kind(layer: GpuLayer) -> str:
    return layer.shape.kind + ("-geglu" if layer.is_gated else "")


@pytest.mark.parametrize("layer", PRODUCTS, ids=by_kind)
@pytest.mark.parametrize("bits", [4, 8])
def test_exact_rows_are_the_reference(layer: GpuLayer, bits: int) -> None:
    problem = GpuProblem(layer, CPU)
    weight = problem.packed(bits, 0, "reference")
    one, options = torch.ones(1), MatmulOptions()
    call = Matmul(bits, problem.x_q, one, weight.qweight, weight.w_scale, options)
    geometry = layer_geometry(layer)
    if geometry is None:
        (expected,) = reference.accumulate_linear(call)
    else:
        (expected,) = reference.accumulate_conv2d(call, geometry)
    assert expected.numel() == layer.shape.M * layer.shape.N
    assert problem.exact_rows(bits).equal(problem.pick(expected).long())


@pytest.mark.parametrize("layer", PRODUCTS, ids=by_kind)
def test_variants_on_the_reference_backend_pass_their_checks(layer: GpuLayer) -> None:
    variants = product_variants(GpuProblem(layer, CPU), ("reference",))
    names = [variant.name for variant in variants]
    assert names[:3] == ["torch-fp16", "quantize", "w4a8"]
    assert ("w4a8-geglu-int8" in names) == layer.is_gated
    for variant in variants:
        assert 0 <= variant.check() < 0.3


@pytest.mark.parametrize("layer", ACTIVATIONS, ids=by_kind)
def test_norms_and_gates_on_the_reference_backend(layer: GpuLayer) -> None:
    for variant in activation_variants(layer, CPU, backend="reference"):
        assert 0 <= variant.check() < 5e-3


def test_checked_rows_hold_the_first_and_the_last() -> None:
    layer = GpuLayer("toy", LayerShape(LINEAR, 1, 1000, 1, 64, 16), 1)
    rows = GpuProblem(layer, CPU).rows
    assert (len(rows), int(rows[0]), int(rows[-1])) == (ROWS, 0, 999)
    assert len(set(rows.tolist())) == ROWS


def test_copies_are_equal_and_elsewhere() -> None:
    problem = GpuProblem(PRODUCTS[0], CPU)
    first, other = problem.packed(4, 0, "reference"), problem.packed(4, 2, "reference")
    assert first.qweight.equal(other.qweight)
    assert first.qweight.data_ptr() != other.qweight.data_ptr()
    one, two = problem.float_weight(0), problem.float_weight(1)
    assert one.equal(two)
    assert one.data_ptr() != two.data_ptr()
    assert one.is_contiguous(memory_format=torch.channels_last)


@interpreted
@pytest.mark.parametrize("layer", [PRODUCTS[4], PRODUCTS[5], ACTIVATIONS[2]], ids=by_kind)
def test_a_rehearsed_layer_has_a_row_for_each_variant(layer: GpuLayer) -> None:
    rows = measure_layer(GpuJob(seconds=0.0), layer, TRITON, HostTimer(), PEAKS)
    base = next(row for row in rows if row["variant"] == "torch-fp16")
    assert base["ratio_fp16"] == 1.0
    for row in rows:
        assert 0 < row["p20_us"] <= row["us"] <= row["p80_us"]
        assert row["gb_s"] > 0
        assert row["M"] == layer.shape.M
        if row["variant"].startswith("w4a8"):
            assert row["tile"] == "64x64x64 w4 s1 gather"


@interpreted
def test_a_rehearsal_runs_every_kind_and_says_what_is_missing() -> None:
    kinds = ("conv3x3", "linear", "layernorm", "groupnorm-silu", "geglu")
    result = run_gpu_kernels(
        GpuJob(kinds=kinds, bits=(4,), backends=("triton",), is_rehearsal=True, seconds=0.0),
        progress=False,
    )
    assert {row["kind"] for row in result["rows"]} == {*kinds, "linear-geglu"}
    assert {row["model"] for row in result["rows"]} == {"toy"}
    assert result["run"]["device"] == "interpreter"
    assert [peak["peak"] for peak in result["peaks"]] == ["copy", "int8", "fp16", "graph-node"]
    assert all(peak["value"] > 0 for peak in result["peaks"])
    assert result["left_out"] == []


@interpreted
def test_a_deadline_leaves_shapes_out_and_says_so() -> None:
    job = GpuJob(
        kinds=("layernorm", "geglu"),
        backends=("triton",),
        is_rehearsal=True,
        seconds=0.0,
        deadline=0.0,
    )
    result = run_gpu_kernels(job, progress=False)
    assert result["rows"] == []
    assert len(result["left_out"]) == 2


def spoil_linear(monkeypatch: pytest.MonkeyPatch, bits: int, change: Any) -> None:
    exact = ops.linear

    def wrong(*args: Any, **keywords: Any) -> torch.Tensor:
        y = exact(*args, **keywords)
        return change(y) if keywords["bits"] == bits else y

    monkeypatch.setattr(ops, "linear", wrong)


def off_by_one(y: torch.Tensor) -> torch.Tensor:
    y[7, 3] += 1
    return y


def refuse(_: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("out of\n resource")


@interpreted
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (off_by_one, "BenchmarkError: w4a8 on linear 18x64->48: 1 of 864 exact results differ"),
        (refuse, "RuntimeError: out of resource"),
    ],
    ids=["wrong", "does not run"],
)
def test_a_failed_variant_is_a_row_without_time_beside_the_others(
    monkeypatch: pytest.MonkeyPatch, change: Any, reason: str
) -> None:
    spoil_linear(monkeypatch, 4, change)
    timed: list[str] = []
    time = HostTimer.time

    def spy(self: HostTimer, calls: dict[str, GpuCall], *, seconds: float) -> Any:
        timed.extend(calls)
        return time(self, calls, seconds=seconds)

    monkeypatch.setattr(HostTimer, "time", spy)
    rows = {
        row["variant"]: row
        for row in measure_layer(GpuJob(seconds=0.0), PRODUCTS[4], TRITON, HostTimer(), PEAKS)
    }
    assert rows["w4a8"]["failed"].startswith(reason)
    assert "us" not in rows["w4a8"]
    assert rows["w4a8"]["ratio_fp16"] == ""
    assert "w4a8 triton" not in timed
    for name in ("torch-fp16", "quantize", "w8a8"):
        assert {name, f"{name} triton"} & set(timed)
        assert rows[name]["us"] > 0
        assert rows[name]["failed"] == ""


def test_a_layer_whose_tensors_cannot_be_made_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu_kernels, "GpuProblem", no_memory)
    (row,) = measure_layer(GpuJob(seconds=0.0), PRODUCTS[4], TRITON, HostTimer(), PEAKS)
    assert row["variant"] == gpu_kernels.SETUP
    assert "out of memory" in row["failed"]


def test_a_call_that_cannot_be_timed_keeps_no_other_from_it() -> None:
    def breaks(_: int) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    calls = {"good": GpuCall(lambda _: None), "bad": GpuCall(breaks)}
    timings, reasons = gpu_kernels.time_calls(HostTimer(), calls, seconds=0.0)
    assert set(timings) == {"good"}
    assert set(reasons) == {"bad"}
    assert "not permitted" in reasons["bad"]


@interpreted
def test_rows_are_handed_out_as_they_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_linear(monkeypatch, 4, off_by_one)
    saved: list[tuple[str, int]] = []

    def save(run: dict[str, str], tables: dict[str, list[dict[str, Any]]]) -> None:
        assert run["device"] == "interpreter"
        saved.extend((name, len(rows)) for name, rows in tables.items())

    job = GpuJob(
        kinds=("linear", "layernorm"),
        bits=(4,),
        backends=("triton",),
        is_rehearsal=True,
        seconds=0.0,
    )
    result = run_gpu_kernels(job, progress=False, save=save)
    assert [name for name, _ in saved] == ["gpu-peaks.csv", *["gpu-kernels.csv"] * 3]
    assert sum(count for _, count in saved[1:]) == len(result["rows"])
    assert len(result["failed"]) == 2  # without and with the gate
    assert exit_code(result) == 1
    assert "FAILED: linear 18x64->48 w4a8 triton: BenchmarkError" in format_gpu(result)


def test_a_lost_gpu_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(_: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(BackendUnavailableError, match="rows of what ran before are kept"):
        describe_fault(RuntimeError("x"), torch.device("cuda", 0))
    assert describe_fault(RuntimeError("x\n y"), CPU) == "RuntimeError: x y"


def test_rows_that_cannot_be_written_are_no_fault_of_a_kernel() -> None:
    with pytest.raises(OutputError):
        describe_fault(OutputError("no space"), CPU)


def test_without_a_gpu_it_says_what_to_do() -> None:
    if torch.cuda.is_available() and not launch.IS_INTERPRETED:
        pytest.skip("there is a GPU")
    with pytest.raises(BackendUnavailableError, match="--rehearse"):
        run_gpu_kernels(GpuJob(), progress=False)


def test_rows_count_from_the_median() -> None:
    layer = GpuLayer("toy", LayerShape(LINEAR, 1, 100, 1, 64, 16), 3)
    variant = GpuVariant("w4a8", GpuCall(lambda _: None), lambda: 0.0, 200_000, 50_000, "int8")
    timings = {
        "w4a8": GpuTiming(10.0, 9.0, 12.0, 20, 16),
        "torch-fp16": GpuTiming(15.0, 14.0, 16.0, 20, 16),
    }
    row = make_row(layer, variant, timings, 0.125, {"copy": 1e10, "int8": 1e12})
    assert row["tops"] == pytest.approx(0.02)
    assert row["gb_s"] == pytest.approx(5.0)
    assert row["peak_percent"] == pytest.approx(50.0)  # of the bandwidth; 2 of the products
    assert row["ratio_fp16"] == pytest.approx(1.5)
    nothing = make_row(layer, variant, timings, 0.125, {})
    assert nothing["peak_percent"] == ""  # no ceiling could be measured
    alone = make_row(layer, dataclasses.replace(variant, base=""), timings, 0.0, PEAKS)
    assert alone["ratio_fp16"] == ""


def test_the_weightiest_shapes_of_each_kind_come_first() -> None:
    layers = GpuJob(models=("tango",), is_quick=True).layers()
    kinds = [layer.shape.kind for layer in layers]
    assert {kinds.count(kind) for kind in kinds} == {gpu_kernels.QUICK_SHAPES}
    assert len(set(kinds[:9])) == 9
    every = GpuJob(models=("tango",)).layers()
    assert every[: len(layers)] == layers


def test_int8_may_differ_by_a_step_in_one_of_a_thousand() -> None:
    expected = torch.zeros(4000, dtype=torch.int8)
    got = expected.clone()
    got[:4] = 1
    assert check_steps("x", got, expected) == pytest.approx(1e-3)
    got[4] = 1
    with pytest.raises(BenchmarkError, match=r"0.125 % of the int8 values"):
        check_steps("x", got, expected)
    got[:5] = 0
    got[9] = 2
    with pytest.raises(BenchmarkError, match="up to 2 steps"):
        check_steps("x", got, expected)


def test_integers_of_another_shape_are_wrong() -> None:
    with pytest.raises(BenchmarkError, match="all of 6 exact results"):
        check_equal("x", torch.zeros(2, 2), torch.zeros(2, 3))


def test_groups_of_a_peer_stand_for_the_weight() -> None:
    weight = torch.randn(8, 128)
    w_q, scales, zeros = asymmetric_groups(weight)
    assert (int(w_q.min()), int(w_q.max())) == (0, 15)
    restored = ((w_q.reshape(-1, 64) - zeros) * scales).reshape(weight.shape)
    assert (restored - weight).abs().max() <= 0.51 * scales.max()


def test_tiles_in_words() -> None:
    config = TileConfig(128, 64, 64, 8, 3, 4, "tma")
    assert describe(config) == "128x64x64 w8 s3 k4 tma"
    problem = tuning_problem(PRODUCTS[0], 4, CPU)
    assert (problem.kernel, problem.N, problem.K) == ("w4a8_conv2d", 32, 576)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": ("x",)}, "model 'x'"),
        ({"kinds": ("y",)}, "kind 'y'"),
        ({"bits": (3,)}, "bits 3"),
    ],
    ids=str,
)
def test_wrong_jobs_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GpuJob(**change)
