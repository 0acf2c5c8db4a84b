"""What the quantizing operators of the cpu backend accept and refuse, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ptq4adm.errors import (
    BackendUnavailableError,
    DtypeError,
    NonFiniteError,
    ShapeError,
    UncalibratedStepError,
)
from ptq4adm.ops import compiled, cpu_activation

EPS = 1e-5
STATIC = {
    "measured": {},
    "static": {"x_scale": torch.tensor(0.021)},
    "table": {"x_scale": torch.tensor([9.0, 0.017, 7.0]), "step": torch.tensor([1])},
}


def _calls(x: Tensor, isa: str) -> dict:
    """Each operator on x [6, 40], as a function of the scale's keywords."""
    image = x.reshape(2, 8, 3, 5).contiguous(memory_format=torch.channels_last)
    rows = (x, torch.ones(40), torch.zeros(40), EPS)
    return {
        "quantize_int8": lambda **k: cpu_activation.quantize_int8(x, **k, isa=isa),
        "groupnorm_silu_quantize": lambda **k: cpu_activation.groupnorm_silu_quantize(
            image, 4, torch.ones(8), torch.zeros(8), EPS, **k, isa=isa
        ),
        "layernorm_quantize": lambda **k: cpu_activation.layernorm_quantize(*rows, **k, isa=isa),
        "geglu_quantize": lambda **k: cpu_activation.geglu_quantize(x, **k, isa=isa),
    }


OPERATORS = tuple(_calls(torch.zeros(6, 40), "auto"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", [0, 33, 100, 239])
@pytest.mark.parametrize("scale", STATIC)
@pytest.mark.parametrize("operator", OPERATORS)
def test_non_finite_is_refused(activation_isa, operator, scale, position, bad) -> None:
    x = torch.randn(6, 40)
    x.view(-1)[position] = bad
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        _calls(x, activation_isa)[operator](**STATIC[scale])


@pytest.mark.parametrize("bad", ["weight", "bias"])
@pytest.mark.parametrize("scale", STATIC)
def test_non_finite_parameters_are_refused(activation_isa, scale, bad) -> None:
    parameters = {"weight": torch.ones(40), "bias": torch.zeros(40)}
    parameters[bad][39] = float("nan")
    keywords = {**parameters, "eps": EPS, **STATIC[scale], "isa": activation_isa}
    with pytest.raises(NonFiniteError):
        cpu_activation.layernorm_quantize(torch.randn(3, 40), **keywords)
    with pytest.raises(NonFiniteError):
        cpu_activation.groupnorm_silu_quantize(torch.randn(2, 40, 3, 3), 4, **keywords)


@pytest.mark.parametrize("operator", OPERATORS)
def test_step_outside_the_table_is_refused(activation_isa, operator) -> None:
    call = _calls(torch.randn(6, 40), activation_isa)[operator]
    table = torch.tensor([0.1, 0.2, 0.3])
    for step in (3, -1):
        with pytest.raises(UncalibratedStepError, match=rf"step = {step}: .* has rows 0\.\.2"):
            call(x_scale=table, step=torch.tensor(step))
    _, scale = call(x_scale=table, step=torch.tensor(2))
    assert scale == table[2]
    _, scale = call(x_scale=table[:1], step=torch.tensor(99))  # one scale serves every step
    assert scale == table[0]
    strided = torch.stack([table, table + 9], dim=1)[:, 0]
    assert call(x_scale=strided, step=torch.tensor(1))[1] == table[1]


@pytest.mark.parametrize("operator", OPERATORS)
def test_scale_of_another_dtype_is_refused(operator) -> None:
    call = _calls(torch.randn(6, 40), "auto")[operator]
    with pytest.raises(DtypeError, match=r"x_scale: expected torch\.float32, got torch\.float64"):
        call(x_scale=torch.tensor(0.1, dtype=torch.float64))
    with pytest.raises(ShapeError, match=r"x_scale \[2\]: expected one scale"):
        call(x_scale=torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("operator", OPERATORS)
def test_half_precision_is_converted_first(activation_isa, operator, dtype) -> None:
    x = torch.randn(6, 40).to(dtype)
    got = _calls(x, activation_isa)[operator]()
    expected = _calls(x.float(), activation_isa)[operator]()
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("scale", STATIC)
def test_empty_batch_gives_an_empty_result(activation_isa, scale) -> None:
    one = torch.ones(8)
    results = {
        (0, 3, 5, 8): cpu_activation.groupnorm_silu_quantize(
            torch.zeros(0, 8, 3, 5), 4, one, one, EPS, **STATIC[scale], isa=activation_isa
        ),
        (0, 8): cpu_activation.layernorm_quantize(
            torch.zeros(0, 8), one, one, EPS, **STATIC[scale], isa=activation_isa
        ),
        (0, 4): cpu_activation.geglu_quantize(
            torch.zeros(0, 8), **STATIC[scale], isa=activation_isa
        ),
    }
    for shape, (x_q, step) in results.items():
        assert x_q.shape == shape
        assert step.shape == (() if scale != "measured" or len(shape) == 4 else (0,))
        assert not bool(step.isnan().any())


def test_bad_parameters_are_refused() -> None:
    x = torch.randn(2, 8, 3, 5)
    with pytest.raises(ShapeError, match=r"weight \[7\]: expected \[8\]"):
        cpu_activation.groupnorm_silu_quantize(x, 4, torch.ones(7), torch.ones(8), EPS)
    with pytest.raises(ShapeError, match=r"bias \[9\]: expected \[5\]"):
        cpu_activation.layernorm_quantize(x, torch.ones(5), torch.ones(9), EPS)
    with pytest.raises(BackendUnavailableError, match="was given tensors on meta"):
        cpu_activation.layernorm_quantize(x, torch.ones(5, device="meta"), torch.ones(5), EPS)
    with pytest.raises(BackendUnavailableError, match="was given tensors on meta"):
        cpu_activation.quantize_int8(x, x_scale=torch.ones(3), step=torch.tensor(1, device="meta"))


def test_names_of_the_matrix_products_choose_loops() -> None:
    names = {"scalar": "scalar", "avx2": "avx2", "avx_vnni": "avx2", "avx512_vnni": "avx512"}
    runs = ["scalar"]
    for name, loops in names.items():
        try:
            assert compiled.module.activation_isa(name) == loops
        except RuntimeError as error:
            assert f"isa '{name}' is not available on this processor" in str(error)  # noqa: PT017
        else:
            runs.append(loops)
    assert compiled.module.activation_isa("auto") == runs[-1]
    with pytest.raises(ValueError, match="isa 'sse9' is unknown; use auto, avx512_vnni"):
        cpu_activation.quantize_int8(torch.zeros(2, 2), isa="sse9")
