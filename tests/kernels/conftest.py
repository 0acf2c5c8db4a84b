"""Matrix products launched directly, without operators: on a GPU if there is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from operator_cases import build_case, call_on, triton_devices
from torch import Tensor

from ptq4adm.kernels import split_k
from ptq4adm.kernels.epilogue import Epilogue
from ptq4adm.kernels.gemm import gemm
from ptq4adm.kernels.tuning import TileConfig
from ptq4adm.ops.arguments import Matmul, linear_shape, result_dtype, result_shape

POISON = -77


@pytest.fixture(params=triton_devices())
def device(request: pytest.FixtureRequest) -> str:
    """The GPU if there is one, else the CPU, where kernels are interpreted."""
    return str(request.param)


@pytest.fixture
def make_case() -> Callable[..., Any]:
    """Builder of a product of random integers with its exact oracle."""
    return build_case


@pytest.fixture
def counters(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The counters of every split product that was launched; slabs are poisoned."""
    taken: list[Tensor] = []
    take, empty = split_k._counters.take, torch.empty

    def recording(device: torch.device, tiles: int) -> Tensor:
        taken.append(take(device, tiles))
        return taken[-1]

    def poisoned(*args: Any, **keywords: Any) -> Tensor:
        return empty(*args, **keywords).fill_(POISON)

    monkeypatch.setattr(split_k._counters, "take", recording)
    monkeypatch.setattr(split_k.torch, "empty", poisoned)
    return taken


def _launch(call: Matmul, epilogue: Epilogue, config: TileConfig, counters: list[Tensor]) -> None:
    options = call.options
    before = len(counters)
    gemm(
        call.x_q,
        call.qweight,
        epilogue,
        config,
        bits=call.bits,
        x2_q=options.x2_q,
        w_mult=options.w_mult,
    )
    assert len(counters) - before == (config.split_k > 1)
    assert all(not bool(used.any()) for used in counters), "counters are not zero afterwards"


@pytest.fixture
def accumulate(device: str, counters: list[Tensor]) -> Callable[..., list[Tensor]]:
    """Function (call, config) -> int32 accumulators of each segment, from poisoned memory."""

    def run(call: Matmul, config: TileConfig) -> list[Tensor]:
        call = call_on(call, device)
        shape = linear_shape(call, "triton")
        segments = 1 if call.options.x2_q is None else 2
        out = [torch.full(shape, POISON, dtype=torch.int32, device=device) for _ in range(segments)]
        epilogue = Epilogue(
            call.x_scale,
            call.w_scale,
            out[0],
            out2=out[1] if segments == 2 else None,
            x2_scale=call.options.x2_scale,
        )
        _launch(call, epilogue, config, counters)
        return [acc.cpu() for acc in out]

    return run


@pytest.fixture
def finish(device: str, counters: list[Tensor]) -> Callable[..., Tensor]:
    """Function (call, config) -> output of the epilogue, from poisoned memory."""

    def run(call: Matmul, config: TileConfig) -> Tensor:
        call = call_on(call, device)
        options = call.options
        shape = result_shape(linear_shape(call, "triton"), options)
        dtype = result_dtype(options)
        poison = float("nan") if dtype.is_floating_point else POISON
        out = torch.full(shape, poison, dtype=dtype, device=device)
        epilogue = Epilogue(
            call.x_scale,
            call.w_scale,
            out,
            x2_scale=options.x2_scale,
            step=options.step,
            bias=options.bias,
            temb=options.temb,
            residual=options.residual,
            out_scale=options.out_scale,
            is_gated=options.geglu,
        )
        _launch(call, epilogue, config, counters)
        return out.cpu()

    return run
