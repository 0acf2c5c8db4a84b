"""Layers of two backends side by side: they share int8, and the result is that of one backend."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from ptq4adm.bench.gpu_emulation import emulated
from ptq4adm.errors import BackendUnavailableError
from ptq4adm.kernels import launch
from ptq4adm.nn import W4A8Linear, fusing
from ptq4adm.nn.fusing import feed_forward, layernorm_project

pytestmark = pytest.mark.skipif(
    not launch.IS_INTERPRETED, reason="runs in Triton's interpreter and the emulator"
)


@pytest.fixture
def _cuda() -> Iterator[None]:
    try:
        with emulated():
            yield
    except BackendUnavailableError as error:
        pytest.skip(f"backend cuda cannot be emulated: {error}")


def _linear(inputs: int, outputs: int, backend: str) -> W4A8Linear:
    torch.manual_seed(inputs)
    scale = torch.tensor(0.05)
    return W4A8Linear.from_float(nn.Linear(inputs, outputs), x_scale=scale, backend=backend)


def _norm() -> nn.LayerNorm:
    norm = nn.LayerNorm(64)
    nn.init.normal_(norm.weight)
    return norm


@pytest.mark.usefixtures("_cuda")
@pytest.mark.parametrize(("first", "second"), [("triton", "cuda"), ("cuda", "triton")])
def test_a_feed_forward_of_two_backends_stays_fused(
    first: str, second: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    norm, x = _norm(), torch.randn(18, 64)

    def run(gate: str, project: str) -> Tensor:
        return feed_forward(norm, _linear(64, 64, gate), _linear(32, 64, project), x)

    with torch.no_grad():
        expected = run("triton", "triton")

        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("the gate is not in the epilogue")

        monkeypatch.setattr(fusing._operators, "geglu_quantize", refuse)
        torch.testing.assert_close(run(first, second), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("_cuda")
def test_queries_and_keys_of_two_backends_quantize_once(monkeypatch: pytest.MonkeyPatch) -> None:
    norm, x = _norm(), torch.randn(18, 64)
    layers = [_linear(64, 48, "triton"), _linear(64, 48, "cuda")]
    calls = []
    quantize = fusing._operators.layernorm_quantize

    def count(*args: object, **keywords: object) -> object:
        calls.append(keywords["backend"])
        return quantize(*args, **keywords)

    monkeypatch.setattr(fusing._operators, "layernorm_quantize", count)
    with torch.no_grad():
        first, second = layernorm_project(norm, layers, x)
    assert calls == ["triton"]
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)
