"""The same products on a real GPU: what test_matmul.py shows on the emulator, by instructions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from emulated_backend import BOX_CONVOLUTIONS, MODES, SAME, SM90A_TILES, sm90a_tile
from operator_cases import CONVOLUTIONS, build_case, call_on

from ptq4adm.ops import cuda_backend, cuda_matmul, reference
from ptq4adm.ops.arguments import Matmul
from ptq4adm.ops.cuda_tiles import CudaTile
from ptq4adm.ops.prepack import prepack

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


TILES = pytest.mark.parametrize(
    "tile",
    [None, CudaTile(128, 128), CudaTile(128, 64), CudaTile(64, 64, 2), CudaTile(64, 32, 3)],
    ids=str,
)
TILES_SM90A = pytest.mark.parametrize(
    "tile", [sm90a_tile(*size, split) for split in (1, 2) for size in SM90A_TILES], ids=str
)


@pytest.fixture(autouse=True)
def _available() -> None:
    reason = cuda_backend.unavailable_reason("cuda")
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def _sm90a() -> None:
    reason = cuda_backend.sm90a_reason(torch.cuda.current_device())
    if reason is not None:
        pytest.skip(reason)


def _on_gpu(case) -> Matmul:
    """The call with its weight in order ``cuda`` and its tensors on the GPU."""

    call = case.call
    qweight = prepack(call.qweight, bits=call.bits, layout=case.layout, backend="cuda")
    return call_on(replace(call, qweight=qweight), "cuda")


@MODES
@TILES
@pytest.mark.parametrize(
    "size", [(67, (330,), 37), (300, (448,), 320), (66, (330, 256), 35)], ids=str
)
def test_linear_equals_the_oracle(bits, is_grouped, tile, size) -> None:
    M, segments, N = size
    case = build_case(bits, (M,), segments, N, is_grouped=is_grouped)
    got = cuda_matmul.accumulate_linear(_on_gpu(case), tile)
    for mine, expected in zip(got, case.oracle(), strict=True):
        assert torch.equal(mine.cpu(), expected)


@MODES
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_conv2d_equals_the_oracle(bits, is_grouped, name) -> None:
    shape, channels, geometry = CONVOLUTIONS[name]
    case = build_case(bits, shape, (channels,), 19, geometry, is_grouped=is_grouped)
    got = cuda_matmul.accumulate_conv2d(_on_gpu(case), geometry)
    assert torch.equal(got[0].cpu(), case.oracle()[0])


@MODES
@TILES_SM90A
@pytest.mark.parametrize(
    "size", [(67, (336,), 37), (300, (1088,), 320), (66, (336, 256), 35)], ids=str
)
@pytest.mark.usefixtures("_sm90a")
def test_linear_of_sm90a_equals_the_oracle(bits, is_grouped, tile, size) -> None:
    test_linear_equals_the_oracle(bits, is_grouped, tile, size)


@TILES_SM90A
@pytest.mark.parametrize("name", BOX_CONVOLUTIONS)
@pytest.mark.usefixtures("_sm90a")
def test_conv2d_of_sm90a_equals_the_oracle(tile, name) -> None:
    shape, segments, geometry = BOX_CONVOLUTIONS[name]
    case = build_case(4, shape, segments, 83, geometry)
    got = cuda_matmul.accumulate_conv2d(_on_gpu(case), geometry, tile)
    for mine, expected in zip(got, case.oracle(), strict=True):
        assert torch.equal(mine.cpu(), expected)


@TILES_SM90A
@pytest.mark.parametrize("out", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.usefixtures("_sm90a")
def test_epilogue_of_sm90a_equals_the_reference(tile, out) -> None:
    test_epilogue_equals_the_reference(tile, out)


@TILES
@pytest.mark.parametrize("out", ["float32", "float16", "bfloat16", "int8"])
def test_epilogue_equals_the_reference(tile, out) -> None:
    case = build_case(4, (3, 8, 8), (320,), 40, SAME)
    case = case.with_scales(torch.rand(10) * 0.01, torch.rand(40)).with_options(
        step=torch.tensor([7]),
        bias=torch.randn(40),
        temb=torch.randn(3, 40).half(),
        residual=torch.randn(3, 8, 8, 40).bfloat16(),
    )
    case = (
        case.with_options(out_scale=torch.rand(10))
        if out == "int8"
        else case.with_options(out_dtype=getattr(torch, out))
    )
    got = cuda_matmul.conv2d(_on_gpu(case), SAME, tile)
    assert torch.equal(got.cpu(), reference.conv2d(case.call, SAME))


def test_a_captured_step_is_replayed_with_another_scale() -> None:
    """Split K in a CUDA graph: counters of its own, the table's row read at every replay."""
    _check_captured_step(CudaTile(64, 32, 4))


@pytest.mark.usefixtures("_sm90a")
def test_a_captured_step_keeps_its_tensor_maps() -> None:
    _check_captured_step(sm90a_tile(64, 64, 4))


def _check_captured_step(tile: CudaTile) -> None:
    case = build_case(4, (64,), (1280,), 64)
    case = case.with_scales(torch.rand(10), torch.rand(64)).with_options(step=torch.tensor([0]))
    call = _on_gpu(case)
    cuda_matmul.linear(call, tile)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cuda_matmul.linear(call, tile)
    for row in (3, 9, 3):
        call.options.step.fill_(row)
        graph.replay()
        expected = reference.linear(case.with_options(step=torch.tensor([row])).call)
        assert torch.equal(out.cpu(), expected)
