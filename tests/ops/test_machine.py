"""Ceilings and the instruction sampler: known names, sane numbers, what is really executed."""

from __future__ import annotations

import time

import pytest
import torch

from ptq4adm.errors import BackendUnavailableError, ConfigError
from ptq4adm.ops import cpu
from ptq4adm.ops.arguments import Matmul, MatmulOptions
from ptq4adm.ops.machine import (
    InstructionCounts,
    measure_peak,
    peak_kinds,
    sample_instructions,
    sampler_missing,
)
from ptq4adm.ops.prepack import packed_shape

pytestmark = pytest.mark.skipif(
    cpu.unavailable_reason() is not None, reason="the compiled module is not built"
)

can_sample = pytest.mark.skipif(sampler_missing() != "", reason=f"sampler {sampler_missing()}")


def test_every_ceiling_is_measured_or_says_what_it_needs() -> None:
    kinds = peak_kinds()
    assert kinds["copy"] == ""
    for kind, missing in kinds.items():
        if missing:
            with pytest.raises(BackendUnavailableError, match=missing):
                measure_peak(kind, milliseconds=1)
        else:
            # 0.05: a memory of 1990; 1e5: no core of today
            assert 0.05 < measure_peak(kind, milliseconds=5) < 1e5


def test_operations_are_counted_alike() -> None:
    # vpdpbusd does in one instruction what vpmaddubsw and vpaddw do in two, and no core is slower
    kinds = peak_kinds()
    if kinds["dpbusd_256"] or kinds["maddubs_avx2"] or kinds["fma_avx2"]:
        pytest.skip(f"needs all three: {kinds}")
    rates = {
        kind: max(measure_peak(kind, milliseconds=10) for _ in range(5))
        for kind in ("fma_avx2", "maddubs_avx2", "dpbusd_256")
    }
    # 4 int8 values share the place of a float32; both units may double or halve the port count
    assert 1.5 < rates["dpbusd_256"] / rates["fma_avx2"] < 9
    assert 0.9 < rates["dpbusd_256"] / rates["maddubs_avx2"] < 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "fma"}, "unknown"),
        ({"kind": "copy", "threads": 0}, "threads = 0"),
        ({"kind": "copy", "milliseconds": 0.0}, "milliseconds = 0"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        measure_peak(**arguments)


@can_sample
@pytest.mark.parametrize("isa", ["avx2"])
def test_our_kernels_execute_the_set_they_are_told(isa: str) -> None:
    if cpu.default_isa() == "scalar":
        pytest.skip("this processor has no AVX2")
    M, N, K = 64, 64, 512
    qweight = torch.randint(0, 256, packed_shape(4, N, K, "cpu"), dtype=torch.uint8)
    call = Matmul(
        4,
        torch.randint(-127, 128, (M, K), dtype=torch.int8),
        torch.ones(()),
        qweight,
        torch.ones(N),
        MatmulOptions(),
    )
    counts = sample_instructions(lambda: _busy(lambda: cpu.linear(call, isa=isa)))
    assert counts.total > 10
    assert counts.isa() == isa


@can_sample
def test_plain_python_is_scalar() -> None:
    counts = sample_instructions(lambda: _busy(lambda: sum(range(1000))))
    assert counts.isa() == "scalar", counts


@can_sample
def test_sampling_ends_with_an_error_of_the_work() -> None:
    def fail() -> None:
        raise RuntimeError("of the work")

    for _ in range(2):  # the second would fail to start if the first had not stopped
        with pytest.raises(RuntimeError, match="of the work"):
            sample_instructions(fail)


@pytest.mark.parametrize(
    ("counts", "isa"),
    [
        ((100, 0, 5, 0, 80, 80, 40), "avx512_vnni"),
        ((100, 0, 5, 0, 80, 80, 0), "avx512"),
        ((100, 0, 5, 80, 5, 85, 40), "avx512_vnni-256"),
        ((100, 0, 5, 80, 0, 80, 0), "avx512-256"),
        ((100, 0, 5, 80, 0, 0, 40), "avx_vnni"),
        ((100, 0, 5, 80, 0, 0, 0), "avx2"),
        ((100, 60, 5, 2, 0, 0, 0), "sse"),
        ((100, 1, 2, 1, 0, 0, 0), "scalar"),
        ((9, 0, 0, 9, 0, 0, 0), "?"),
    ],
)
def test_name_of_the_executed_set(counts: tuple[int, ...], isa: str) -> None:
    # total, sse, 128, 256 and 512 bits, evex, dpbusd
    assert InstructionCounts(*counts).isa() == isa


def _busy(call: object) -> None:
    end = time.process_time() + 0.25
    while time.process_time() < end:
        call()
