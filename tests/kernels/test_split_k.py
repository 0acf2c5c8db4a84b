"""Shares of K, slabs and counters; sums are tested in test_gemm.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ptq4adm.kernels import split_k
from ptq4adm.kernels.split_k import first_splits, workspace

CPU = torch.device("cpu")


@pytest.mark.parametrize("splits", range(2, 17))
@pytest.mark.parametrize(("K", "K2"), [(64, 64), (64, 100_000), (100_000, 64), (1280, 640)])
def test_every_segment_gets_a_split(splits, K, K2) -> None:
    first = first_splits(splits, K, K2)
    assert 1 <= first <= splits - 1
    if splits > 4 and min(K, K2) * 8 > max(K, K2):
        assert abs(first / splits - K / (K + K2)) <= 0.5 / splits + 1e-9


def test_one_segment_gets_all_splits() -> None:
    assert first_splits(5, 640, 0) == 5
    assert first_splits(1, 640, 320) == 1


def test_a_whole_product_needs_no_memory() -> None:
    assert workspace(CPU, 1, 1000, 16384) == (None, None)


def test_slabs_hold_every_partial_sum() -> None:
    slabs, counters = workspace(CPU, 3, 5, 256)
    assert slabs is not None
    assert counters is not None
    assert (slabs.dtype, slabs.numel()) == (torch.int32, 3 * 5 * 256)
    assert (counters.dtype, counters.tolist()) == (torch.int32, [0] * 5)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU as counters see it: a stream, whether it is captured, and memory (of the CPU)."""
    state = SimpleNamespace(device=torch.device("cuda", 0), stream=1, is_capturing=False, made=[])
    zeros = torch.zeros

    def make(size: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        assert device == state.device
        state.made.append(size)
        return zeros(size, dtype=dtype)

    current = lambda _: SimpleNamespace(cuda_stream=state.stream)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.is_capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", current)
    monkeypatch.setattr(torch, "zeros", make)
    return state


def _addresses(counters: Tensor) -> set[int]:
    return {counters.data_ptr() + 4 * i for i in range(counters.numel())}


def test_launches_of_one_stream_share_counters(gpu: SimpleNamespace) -> None:
    counters = split_k._Counters()
    first, second = counters.take(gpu.device, 10), counters.take(gpu.device, 4096)
    assert first.data_ptr() == second.data_ptr()
    gpu.stream = 2
    assert _addresses(counters.take(gpu.device, 10)).isdisjoint(_addresses(second))
    assert counters.take(gpu.device, 5000).numel() == 5000


def test_captured_launches_share_with_nothing(gpu: SimpleNamespace) -> None:
    counters = split_k._Counters()
    taken = [_addresses(counters.take(gpu.device, 10))]
    gpu.is_capturing = True
    taken += [_addresses(counters.take(gpu.device, 10)) for _ in range(3)]
    assert len(set.union(*taken)) == 40


def test_counters_of_earlier_graphs_are_never_used_again(gpu: SimpleNamespace) -> None:
    """Graphs hold addresses, not tensors: what they count in is kept, and refilled in time."""
    counters = split_k._Counters()
    seen: set[int] = set()
    for _ in range(3):
        gpu.is_capturing = False
        counters.take(gpu.device, 10)
        gpu.is_capturing = True
        for _ in range(5):
            taken = counters.take(gpu.device, split_k._SUPPLY // 8)
            ends = {taken.data_ptr(), taken.data_ptr() + 4 * (taken.numel() - 1)}
            assert seen.isdisjoint(ends)
            seen |= ends
    assert gpu.made.count(split_k._SUPPLY) == 3
    assert len(counters._kept) == 3


def test_a_capture_without_supply_zeroes_counters_of_its_own(gpu: SimpleNamespace) -> None:
    counters = split_k._Counters()
    gpu.is_capturing = True
    assert counters.take(gpu.device, 10).numel() == 10
    assert gpu.made == [10]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnGpu:
    """Who may share counters."""

    def test_launches_of_a_stream_share(self) -> None:
        counters = split_k._Counters()
        device = torch.device("cuda", torch.cuda.current_device())
        first, second = counters.take(device, 10), counters.take(device, 20)
        assert first.data_ptr() == second.data_ptr()

    def test_streams_do_not_share(self) -> None:
        counters = split_k._Counters()
        device = torch.device("cuda", torch.cuda.current_device())
        here = counters.take(device, 10)
        with torch.cuda.stream(torch.cuda.Stream()):
            there = counters.take(device, 10)
        assert here.data_ptr() != there.data_ptr()

    def test_launches_of_a_graph_share_with_nothing(self) -> None:
        counters = split_k._Counters()
        device = torch.device("cuda", torch.cuda.current_device())
        outside = counters.take(device, 10)
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            taken = [counters.take(device, 10) for _ in range(3)]
        ranges = [{t.data_ptr() + 4 * i for i in range(10)} for t in [outside, *taken]]
        assert len(set.union(*ranges)) == 40
        assert all(not bool(t.any()) for t in taken)
