"""Fused blocks in a CUDA graph: one capture serves every timestep, and equals eager calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D

from ptq4adm.config import Scheme
from ptq4adm.errors import BackendUnavailableError
from ptq4adm.nn import StepIndex, W4A8Linear
from ptq4adm.nn.fuse import fuse_blocks
from ptq4adm.nn.replace import quantized_layer, replace_layers
from ptq4adm.ops import resolve_backend
from ptq4adm.quant.buckets import TimestepBuckets
from ptq4adm.quant.layers import quantizable_layers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BUCKETS = 3
BACKENDS = pytest.mark.parametrize("backend", ["triton", "cuda"])


def _step() -> StepIndex:
    return StepIndex(TimestepBuckets(BUCKETS, (True,) * BUCKETS), "cuda")


def _replayed(run: Any) -> tuple[Any, torch.Tensor]:
    """A call captured after a warm-up on another stream, and its output."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out


def _require(backend: str) -> None:
    try:
        resolve_backend(backend, "cuda")
    except BackendUnavailableError as error:
        pytest.skip(str(error))


@BACKENDS
def test_linear_layer_of_few_rows(backend: str) -> None:
    """128 rows: K is split, and the counters belong to the graph."""
    _require(backend)
    step = _step()
    layer = W4A8Linear.from_float(
        torch.nn.Linear(1280, 320).cuda(),
        x_scale=torch.rand(1, BUCKETS) * 0.02 + 0.01,
        step=step,
        weight_observer="absmax",
        backend=backend,
    )
    x = torch.randn(128, 1280, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        graph, out = _replayed(lambda: layer(x))
        for bucket in (2, 0, 1, 2):
            step.index.fill_(bucket)
            expected = layer(x)
            graph.replay()
            assert torch.equal(out, expected)


def test_fused_resnet_block() -> None:
    """Made on the CPU and moved: `auto` takes the GPU's kernels."""
    _require("triton")
    step = _step()
    block = ResnetBlock2D(in_channels=64, out_channels=128, temb_channels=48, groups=32)
    block = block.eval().requires_grad_(False)
    layers = {
        name: quantized_layer(
            layer,
            Scheme.W8 if name.endswith("time_emb_proj") else Scheme.W4A8,
            x_scale=None
            if name.endswith("time_emb_proj")
            else torch.rand(1, BUCKETS) * 0.02 + 0.02,
            step=step,
            segments=None,
            group_size=None,
            weight_observer="absmax",
            backend="auto",
        )
        for name, layer in quantizable_layers(block).items()
    }
    replace_layers(block, layers)
    fuse_blocks(block)
    block = block.cuda().half()
    x = torch.randn(2, 64, 32, 8, device="cuda", dtype=torch.float16)
    x = x.contiguous(memory_format=torch.channels_last)
    temb = torch.randn(2, 48, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        graph, out = _replayed(lambda: block(x, temb))
        for bucket in (2, 0, 1):
            step.index.fill_(bucket)
            expected = block(x, temb)
            graph.replay()
            assert torch.equal(out, expected)
