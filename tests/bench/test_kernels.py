"""The benchmark end to end, on small shapes, with whatever peers are installed."""

from __future__ import annotations

import dataclasses
import gc
import sys

import pytest
import torch

from ptq4adm.bench import kernels
from ptq4adm.bench.kernels import KernelJob, measure, run_kernels
from ptq4adm.bench.ours import MATMUL, OURS, QUANTIZE, exact_product, own_variants
from ptq4adm.bench.peers import PEERS, select_peers
from ptq4adm.bench.peers.signal_stack import signal_stack
from ptq4adm.bench.problem import Problem, Variant, check_variant
from ptq4adm.bench.shapes import LayerShape, ModelLayer
from ptq4adm.errors import BenchmarkError, ConfigError
from ptq4adm.ops import cpu, reference
from ptq4adm.ops.arguments import Conv2dGeometry, Matmul, MatmulOptions
from ptq4adm.packing.layout import KLayout, weight_to_rows

pytestmark = pytest.mark.skipif(
    cpu.unavailable_reason() is not None, reason="the compiled module is not built"
)

# odd sizes: ragged in M, N and K for every library
SHAPES = [
    LayerShape("conv3x3", 2, 9, 5, 40, 24),
    LayerShape("conv3x3-stride2", 2, 9, 6, 40, 24),
    LayerShape("conv3x3-upsample", 2, 5, 3, 40, 24),
    LayerShape("conv1x1", 2, 9, 5, 40, 24),
    LayerShape("linear", 1, 33, 1, 128, 24),
]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_SAMPLE_SECONDS", 0.02)
    monkeypatch.setattr(kernels, "_PEAK_MS", 1.0)
    monkeypatch.setattr(kernels, "_PEAK_TRIES", 1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", PEERS)
def test_installed_peers_compute_the_layer(name: str, shape: LayerShape) -> None:
    (peers, missing) = select_peers((name,))
    if missing:
        pytest.skip(missing[name])
    problem = Problem.random(shape, threads=1)
    for variant in peers[0].variants(problem):
        assert check_variant(variant, problem) <= variant.tolerance


@pytest.mark.skipif(sys.platform != "linux", reason="alternate signal stacks are read on Linux")
def test_peers_leave_the_stack_of_signal_handlers_alone() -> None:
    before = signal_stack()
    peers, _ = select_peers()
    for peer in peers:
        problem = Problem.random(SHAPES[-1], threads=1)
        # freed in the order they were made
        variants = [peer.variants(problem) for _ in range(2)]
        for variant in [v for found in variants for v in found]:
            variant.run()
        variants.pop(0)
        gc.collect()
        variants.clear()
        gc.collect()
        assert signal_stack() == before, peer.name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_our_variants_are_checked_against_the_reference(shape: LayerShape, bits: int) -> None:
    problem = Problem.random(shape, threads=1)
    variants = own_variants(problem, bits=bits, isa="auto")
    assert [variant.name for variant in variants] == [OURS, MATMUL, QUANTIZE]
    for variant in variants:
        check_variant(variant, problem)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_product_is_the_reference(shape: LayerShape) -> None:
    problem = Problem.random(shape, threads=1)
    x_q = torch.randint(-127, 128, problem.x.shape, dtype=torch.int8)
    w_q = torch.randint(-127, 128, problem.weight.shape, dtype=torch.int8)
    kernel = (shape.kernel, shape.kernel)
    layout = KLayout((shape.in_channels,), kernel)
    rows = weight_to_rows(w_q.reshape(shape.N, shape.in_channels, *kernel).contiguous(), layout)
    if not problem.is_linear:
        x_q = x_q.permute(0, 2, 3, 1)
    call = Matmul(8, x_q, torch.ones(()), rows, torch.ones(shape.N), MatmulOptions())
    if problem.is_linear:
        (expected,) = reference.accumulate_linear(call)
    else:
        geometry = Conv2dGeometry(
            kernel,
            (shape.stride, shape.stride),
            (problem.padding, problem.padding),
            upsample=shape.out_size if shape.is_upsampled else None,
        )
        (expected,) = reference.accumulate_conv2d(call, geometry)
    assert exact_product(problem, x_q, w_q).equal(expected.flatten(0, -2).double())


def test_a_kernel_that_is_off_by_one_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = cpu.accumulate_linear

    def wrong(*args, **keywords) -> list[torch.Tensor]:
        acc = exact(*args, **keywords)
        acc[0][3, 2] += 1
        return acc

    monkeypatch.setattr(cpu, "accumulate_linear", wrong)
    problem = Problem.random(SHAPES[-1], threads=1)
    ours = own_variants(problem, bits=4, isa="auto")[0]
    with pytest.raises(BenchmarkError, match=r"1 of 792 int32 accumulators"):
        check_variant(ours, problem)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: y * 1.1, "relative error 0.1"),
        (lambda y: y * float("nan"), "relative error nan"),
        (lambda y: y.T, "result .24, 33., expected .33, 24."),
    ],
)
def test_a_peer_with_a_wrong_result_is_not_timed(change, message: str) -> None:
    problem = Problem.random(SHAPES[-1], threads=1)
    variant = Variant("wrong", lambda: change(problem.expected), lambda y: y, 0.05)
    with pytest.raises(BenchmarkError, match=message):
        check_variant(variant, problem)


def test_rows_of_all_kinds_are_complete() -> None:
    layers = [ModelLayer("tiny", shape, 3) for shape in SHAPES]
    result = measure(KernelJob(threads=1, seconds=0.001), layers)
    peers, missing = select_peers(None)
    assert set(result["missing"]) == set(missing)
    for shape in SHAPES:
        rows = {row["variant"]: row for row in result["rows"] if row["shape"] == str(shape)}
        assert {OURS, MATMUL, QUANTIZE, "torch-fp32"} <= set(rows)
        for row in rows.values():
            assert (row["M"], row["N"], row["K"], row["count"]) == (shape.M, shape.N, shape.K, 3)
            assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
            assert row["variant_isa"]
    assert result["run"]["threads"] == "1"
    assert all(result["run"][f"version_{peer.name}"] for peer in peers)
    assert {peak["threads"] for peak in result["peaks"]} == {1}


def test_a_missing_peer_has_a_reason_and_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    peers, missing = select_peers(None)
    assert set(missing) == {"onnxruntime", "openvino"}
    assert "torch-fp32" in [peer.name for peer in peers]
    for reason in missing.values():
        assert "pip install 'ptq4adm[bench]'" in reason


def test_quick_takes_the_shapes_that_matter_most() -> None:
    job = KernelJob(models=("audioldm-s",), is_quick=True)
    kinds = [layer.shape.kind for layer in job.layers()]
    assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(job.kinds, 2)
    assert str(job.layers()[0].shape) == "conv3x3 2x256x16 128->128"
    assert len(KernelJob(models=("audioldm-s",)).layers()) > 40


def test_avx2_is_measured_in_a_process_that_forbids_the_rest() -> None:
    if cpu.default_isa() == "scalar":
        pytest.skip("this processor has no AVX2")
    job = KernelJob(
        models=("make-an-audio",),
        kinds=("conv3x3-stride2",),
        isa="avx2",
        threads=1,
        peers=("torch-fp32", "fbgemm-int8"),
        seconds=0.001,
    )
    result = run_kernels(job, progress=False)
    isas = {row["variant"]: row["variant_isa"] for row in result["rows"]}
    assert set(isas) == {OURS, MATMUL, QUANTIZE, "torch-fp32", "fbgemm-int8"}
    for isa in isas.values():
        assert isa in ("avx2", "?"), isas


@pytest.mark.parametrize(
    "change",
    [
        {"models": ("x",)},
        {"kinds": ("conv5x5",)},
        {"peers": ("y",)},
        {"isa": "sse"},
        {"bits": 3},
        {"threads": 0},
    ],
    ids=str,
)
def test_wrong_jobs_are_refused(change: dict) -> None:
    (value,) = change.values()
    named = value[0] if isinstance(value, tuple) else value
    with pytest.raises(ConfigError, match=str(named)):
        dataclasses.replace(KernelJob(), **change)
