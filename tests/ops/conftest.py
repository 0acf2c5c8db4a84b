"""Fixtures of operator calls (tests/shared/operator_cases.py), and poisoned output memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from operator_cases import CONVOLUTIONS, Case, build_case
from torch import Tensor

from ptq4adm.ops import compiled, cpu
from ptq4adm.ops.arguments import Conv2dGeometry

with torch.device("meta"):
    # PyTorch keeps the list of constructors that a device context redirects from the first use on:
    # it must not be the patched one of `_poisoned_outputs`
    torch.empty(1)


@pytest.fixture
def make_case() -> Callable[..., Case]:
    return build_case


@pytest.fixture(params=CONVOLUTIONS)
def convolution(request: pytest.FixtureRequest) -> tuple[tuple[int, ...], int, Conv2dGeometry]:
    """Image size, channels and geometry of each kind of convolution."""
    return CONVOLUTIONS[request.param]


def _isas() -> list[str]:
    """Every instruction set, and those that the compiled module emulates (test_emulated.py)."""
    emulated = ["emulated_avx_vnni", "emulated_avx512_vnni"]
    if cpu.unavailable_reason() is not None or cpu.isa_unavailable_reason(emulated[0]) is not None:
        return list(cpu.ISAS)
    return [*cpu.ISAS, *emulated]


@pytest.fixture(params=_isas())
def isa(request: pytest.FixtureRequest) -> str:
    """Every instruction set that this machine runs, and those that this build emulates."""
    name = str(request.param)
    reason = cpu.unavailable_reason() or cpu.isa_unavailable_reason(name)
    if reason is not None:
        pytest.skip(reason)
    return name


@pytest.fixture(params=["scalar", "avx2", "avx512_vnni"])
def activation_isa(request: pytest.FixtureRequest) -> str:
    """Every instruction set of the loops over activations that this machine runs."""
    reason = cpu.unavailable_reason()
    if reason is not None:
        pytest.skip(reason)
    try:
        compiled.module.activation_isa(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    return str(request.param)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny products gain nothing from threads, and waiting for one on a busy machine costs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what the cpu backend allocates, so that an element nobody wrote shows."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        tensor = empty(*args, **kwargs)  # type: ignore[call-overload]
        return tensor.fill_(float("nan") if tensor.is_floating_point() else -77)

    monkeypatch.setattr(cpu.torch, "empty", poisoned)
