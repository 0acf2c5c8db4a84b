"""Quantization of activations: the formula, cpu equal to the reference bit for bit, bad input."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from ptq4adm.errors import (
    ConfigError,
    NonFiniteError,
    ShapeError,
    UncalibratedStepError,
)
from ptq4adm.ops import cpu_activation, reference

INPUTS = {
    "one element": lambda: torch.randn(1, 1),
    "odd": lambda: torch.randn(7, 61),
    "several tasks": lambda: torch.randn(301, 333),
    "four dimensions": lambda: torch.randn(2, 3, 5, 70),
    "zeros": lambda: torch.zeros(3, 40),
    "one outlier": lambda: torch.randn(9, 50).index_put(
        (torch.tensor(4), torch.tensor(49)), torch.tensor(1e6)
    ),
    "negative only": lambda: -torch.rand(5, 33),
    "tiny": lambda: torch.randn(4, 64) * 1e-12,
    "subnormal": lambda: torch.randn(4, 64) * 1e-40,
    "huge": lambda: torch.randn(4, 64).sign() * 3e38,
    "ties": lambda: torch.arange(-128, 128).float().reshape(4, 64) * 0.5,
    "float16": lambda: torch.randn(6, 48).half(),
    "bfloat16": lambda: torch.randn(6, 48).bfloat16(),
    "rows apart": lambda: torch.randn(2, 5, 6, 20)[..., 3:14],
    "columns apart": lambda: torch.randn(9, 40)[:, ::3],
    "odd address": lambda: torch.randn(401)[1:].reshape(8, 50),
    "one column": lambda: torch.randn(7, 4)[:, 2:3],
    "a slice longer than a task": lambda: torch.randn(3, 4, 90000)[:, 1::2, 5:40000],
    "expanded": lambda: torch.randn(1, 21).expand(4, 21),
    "float64": lambda: torch.randn(5, 9).double(),
    "no columns": lambda: torch.zeros(3, 0),
    "not contiguous": lambda: torch.randn(2, 8, 5, 6).permute(0, 2, 3, 1),
    "empty": lambda: torch.zeros(0, 8),
}
KEYWORDS = {
    "tensor": {},
    "row": {"granularity": "row"},
    "static": {"x_scale": torch.tensor(0.5)},
    "static table": {"x_scale": torch.tensor([9.0, 0.031, 7.0]), "step": torch.tensor([1])},
}


@pytest.mark.parametrize("keywords", KEYWORDS)
@pytest.mark.parametrize("name", INPUTS)
def test_cpu_equals_reference_bit_for_bit(activation_isa, name, keywords) -> None:
    x = INPUTS[name]()
    expected = reference.quantize_int8(x, **KEYWORDS[keywords])
    got = cpu_activation.quantize_int8(x, **KEYWORDS[keywords], isa=activation_isa)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == theirs.dtype
        assert mine.shape == theirs.shape
        assert mine.is_contiguous()
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_formula_in_numpy(granularity) -> None:
    x = torch.randn(40, 100) * 3
    values = x.numpy()
    absmax = np.abs(values).max(axis=None if granularity == "tensor" else 1, keepdims=True)
    scale = np.maximum(absmax, np.float32(1e-8)) / np.float32(127)
    inverse = np.float32(1) / scale
    expected = np.clip(np.rint(values * inverse), -127, 127).astype(np.int8)
    x_q, x_scale = reference.quantize_int8(x, granularity=granularity)
    assert np.array_equal(x_q.numpy(), expected)
    assert np.array_equal(x_scale.numpy(), scale.reshape(x_scale.shape))


def test_ties_round_to_even_and_large_values_clamp() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, 300.0, -300.0])
    x_q, _ = reference.quantize_int8(x, x_scale=torch.tensor(1.0))
    assert x_q.tolist() == [0, 2, 2, 0, -2, 126, 127, 127, -127]


def test_error_is_at_most_half_a_step() -> None:
    x = torch.randn(50, 60)
    x_q, scale = reference.quantize_int8(x, granularity="row")
    error = (x_q.float() * scale[:, None] - x).abs() / scale[:, None]
    assert float(error.max()) <= 0.5 + 1e-4


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("keywords", ["tensor", "row", "static"])
@pytest.mark.parametrize("position", [0, 40, 499])
def test_non_finite_is_refused(activation_isa, position, keywords, bad) -> None:
    x = torch.randn(5, 100)
    x.view(-1)[position] = bad
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        reference.quantize_int8(x, **KEYWORDS[keywords])
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        cpu_activation.quantize_int8(x, **KEYWORDS[keywords], isa=activation_isa)


def test_static_scale_is_returned_as_a_new_scalar(activation_isa) -> None:
    table = torch.tensor([0.1, 0.2])
    native = partial(cpu_activation.quantize_int8, isa=activation_isa)
    for quantize in (reference.quantize_int8, native):
        _, scale = quantize(torch.randn(3, 4), x_scale=table, step=torch.tensor(1))
        assert scale.shape == ()
        assert scale == table[1]
        scale.zero_()
        assert table[1] == torch.tensor(0.2)


def test_bad_arguments_are_refused() -> None:
    x = torch.randn(3, 4)
    with pytest.raises(ConfigError, match="granularity 'channel': expected one of"):
        reference.quantize_int8(x, granularity="channel")
    with pytest.raises(ShapeError, match=r"x_scale \[3\]: expected one scale, or a table"):
        reference.quantize_int8(x, x_scale=torch.ones(3))
    with pytest.raises(UncalibratedStepError, match=r"step = 3: the scale table has rows 0\.\.2"):
        reference.quantize_int8(x, x_scale=torch.ones(3), step=torch.tensor(3))


# --- fused with the norm or gate before it ----------------------------------------------------


@pytest.mark.parametrize("silu", [True, False])
def test_groupnorm_silu_quantize_is_its_parts(silu) -> None:
    x = torch.randn(2, 16, 5, 7).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(16), torch.randn(16)
    x_q, scale = torch.ops.ptq4adm.groupnorm_silu_quantize(
        x, 4, weight, bias, 1e-5, silu=silu, backend="reference"
    )
    y = torch.nn.functional.group_norm(x.double(), 4, weight.double(), bias.double(), 1e-5)
    y = torch.nn.functional.silu(y) if silu else y
    y = y.permute(0, 2, 3, 1)
    assert x_q.shape == y.shape
    assert float(scale) == pytest.approx(float(y.abs().max()) / 127, rel=1e-5)
    assert float((x_q * scale.double() - y).abs().max()) <= 0.501 * float(scale)


def test_layernorm_quantize_is_its_parts() -> None:
    x, weight, bias = torch.randn(9, 40), torch.randn(40), torch.randn(40)
    x_q, scale = torch.ops.ptq4adm.layernorm_quantize(x, weight, bias, 1e-5, backend="reference")
    y = torch.nn.functional.layer_norm(x.double(), (40,), weight.double(), bias.double(), 1e-5)
    torch.testing.assert_close(scale.double(), y.abs().amax(1) / 127, rtol=1e-5, atol=0)
    assert bool(((x_q * scale[:, None] - y).abs() <= 0.501 * scale[:, None]).all())


def test_geglu_quantize_is_its_parts() -> None:
    x = torch.randn(9, 40)
    static = torch.tensor(0.02)
    for keywords in ({}, {"x_scale": static}):
        x_q, scale = torch.ops.ptq4adm.geglu_quantize(x, backend="reference", **keywords)
        y = x[:, :20].double() * torch.nn.functional.gelu(x[:, 20:].double())
        assert x_q.shape == (9, 20)
        if keywords:
            assert scale == static
            y = y.clamp(-127 * 0.02, 127 * 0.02)
        steps = (x_q - y / scale.reshape(-1, 1)).abs()
        assert float(steps.max()) <= 0.501


def test_fused_operators_refuse_other_shapes() -> None:
    with pytest.raises(ShapeError, match=r"x \[2, 5\]: expected \[M, 2 K\]"):
        torch.ops.ptq4adm.geglu_quantize(torch.randn(2, 5), backend="reference")
    with pytest.raises(ShapeError, match="expected NCHW with C a multiple of 4"):
        torch.ops.ptq4adm.groupnorm_silu_quantize(
            torch.randn(2, 6, 1, 1), 4, torch.ones(6), torch.ones(6), 1e-5, backend="reference"
        )
