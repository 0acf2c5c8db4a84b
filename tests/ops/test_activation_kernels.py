"""Norms and gates fused with quantization, on every instruction set, against float64.

The promise: the scale within 1e-5, the integers within one step and equal on 99.9 % of elements.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ptq4adm.errors import (
    NonFiniteError,
)
from ptq4adm.ops import compiled, cpu_activation, reference

EPS = 1e-5
STATIC = {
    "measured": {},
    "static": {"x_scale": torch.tensor(0.021)},
    "table": {"x_scale": torch.tensor([9.0, 0.017, 7.0]), "step": torch.tensor([1])},
}
# B, C, H, W, groups
IMAGES = {
    "model": (2, 320, 16, 4, 32),
    "wide": (2, 1280, 5, 3, 32),
    "one channel a group": (3, 20, 5, 7, 20),
    "one group": (1, 33, 3, 3, 1),
    "fewer channels than lanes": (2, 6, 1, 5, 2),
    "two parts, the last ragged": (2, 36, 41, 41, 4),
    "many parts of whole rows": (1, 300, 31, 17, 3),
    "one channel": (2, 1, 9, 4, 1),
    "one pixel": (2, 64, 1, 1, 8),
    "one column": (2, 24, 7, 1, 8),
}
ROWS = [(1, 1), (5, 3), (7, 61), (9, 320), (64, 1280), (2, 4099), (700, 96)]


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _image(name: str) -> tuple[Tensor, int, Tensor, Tensor]:
    """x in channels-last memory, groups, weight and bias; some weights are negative."""
    batch, channels, height, width, groups = IMAGES[name]
    x = _channels_last(torch.randn(batch, channels, height, width) * 2 + 0.3)
    return x, groups, torch.randn(channels), torch.randn(channels)


def _group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, *, silu: bool) -> Tensor:
    """NHWC float64, from the definition."""
    batch, channels, height, width = x.shape
    grouped = x.double().reshape(batch, groups, -1)
    centered = grouped - grouped.mean(-1, keepdim=True)
    y = centered / (centered.square().mean(-1, keepdim=True) + EPS).sqrt()
    y = y.reshape(batch, channels, height * width) * weight.double()[:, None]
    y = (y + bias.double()[:, None]).reshape(x.shape)
    y = y * torch.sigmoid(y) if silu else y
    return y.permute(0, 2, 3, 1)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centered = x.double() - x.double().mean(-1, keepdim=True)
    y = centered / (centered.square().mean(-1, keepdim=True) + EPS).sqrt()
    return y * weight.double() + bias.double()


def _gelu(x: Tensor) -> Tensor:
    return 0.5 * x.double() * torch.special.erfc(-x.double() / 2**0.5)


def _geglu(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value.double() * _gelu(gate)


def _check(got: tuple[Tensor, Tensor], y: Tensor, keywords: dict, *, is_per_row: bool) -> None:
    """Compare with ``y`` in float64: the promise of the module's docstring."""
    x_q, scale = got
    assert x_q.dtype == torch.int8
    assert x_q.shape == y.shape
    assert x_q.is_contiguous()
    if keywords:
        assert scale.shape == ()
        table = keywords["x_scale"].reshape(-1)
        assert scale == table[1 if "step" in keywords else 0]
    else:
        expected = y.abs().amax(-1) if is_per_row else y.abs().amax()
        expected = expected.clamp(min=1e-8) / 127
        torch.testing.assert_close(scale.double(), expected, rtol=1e-5, atol=0)
    step = scale.double().unsqueeze(-1) if scale.dim() else scale.double()
    exact = (y / step).round().clamp(-127, 127)
    difference = (x_q - exact).abs()
    assert float(difference.max()) <= 1, f"x_q: {float(difference.max())} steps from float64"
    share = float((difference > 0).double().mean())
    assert share <= 1e-3, f"x_q: {share:.2%} of elements differ from float64"


# --- group norm -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", STATIC)
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("name", IMAGES)
def test_groupnorm_silu_quantize(activation_isa, name, silu, scale) -> None:
    x, groups, weight, bias = _image(name)
    got = cpu_activation.groupnorm_silu_quantize(
        x, groups, weight, bias, EPS, silu=silu, **STATIC[scale], isa=activation_isa
    )
    y = _group_norm(x, groups, weight, bias, silu=silu)
    _check(got, y, STATIC[scale], is_per_row=False)


@pytest.mark.parametrize("scale", STATIC)
def test_groupnorm_is_within_a_step_of_the_reference(activation_isa, scale) -> None:
    x, groups, weight, bias = _image("model")
    arguments, keywords = (x, groups, weight, bias, EPS), STATIC[scale]
    x_q, step = cpu_activation.groupnorm_silu_quantize(*arguments, **keywords, isa=activation_isa)
    expected, expected_step = reference.groupnorm_silu_quantize(*arguments, **keywords)
    torch.testing.assert_close(step, expected_step, rtol=1e-5, atol=0)
    difference = (x_q.int() - expected.int()).abs()
    assert int(difference.max()) <= 1
    assert float((difference > 0).double().mean()) <= 1e-3


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("name", ["model", "two parts, the last ragged", "wide"])
def test_groupnorm_of_a_mean_far_above_the_deviation(activation_isa, name, silu) -> None:
    x, groups, weight, bias = _image(name)
    x = _channels_last(torch.randn_like(x) + 1000)
    got = cpu_activation.groupnorm_silu_quantize(
        x, groups, weight, bias, EPS, silu=silu, isa=activation_isa
    )
    _check(got, _group_norm(x, groups, weight, bias, silu=silu), {}, is_per_row=False)


def test_groupnorm_of_an_outlier_in_the_first_pixel(activation_isa) -> None:
    """The number that sums are taken relative to is then far from all others."""
    x, groups, weight, bias = _image("two parts, the last ragged")
    x[:, :, 0, 0] = 1e4
    keywords = {"x_scale": torch.tensor(0.004)}
    got = cpu_activation.groupnorm_silu_quantize(
        x, groups, weight, bias, EPS, **keywords, isa=activation_isa
    )
    _check(got, _group_norm(x, groups, weight, bias, silu=True), keywords, is_per_row=False)


@pytest.mark.parametrize("name", ["fewer channels than lanes", "two parts, the last ragged"])
@pytest.mark.parametrize(("gain", "offset"), [(0.3, -1.1), (0.01, 0.0), (0.3, -8.0), (0.0, 0.0)])
def test_measured_scale_where_silu_falls(activation_isa, name, gain, offset) -> None:
    """Around -1.278 its largest magnitude is at neither end of a channel's range."""
    x, groups, weight, bias = _image(name)
    weight.fill_(gain)
    bias.fill_(offset)
    got = cpu_activation.groupnorm_silu_quantize(x, groups, weight, bias, EPS, isa=activation_isa)
    _check(got, _group_norm(x, groups, weight, bias, silu=True), {}, is_per_row=False)


@pytest.mark.parametrize("value", [0.0, 3.25, 1e6])
def test_groupnorm_of_a_constant_is_the_bias(activation_isa, value) -> None:
    x = _channels_last(torch.full((2, 40, 6, 7), value))
    weight, bias = torch.randn(40), torch.randn(40)
    got = cpu_activation.groupnorm_silu_quantize(
        x, 8, weight, bias, EPS, silu=False, isa=activation_isa
    )
    _check(got, bias.double().expand(2, 6, 7, 40), {}, is_per_row=False)


LAYOUTS = {
    "NCHW": lambda x: x.contiguous(),
    "channels last": _channels_last,
    "slice of channels": lambda x: torch.cat(
        [_channels_last(torch.randn(2, 5, 6, 7)), x, x], dim=1
    ).contiguous(memory_format=torch.channels_last)[:, 5:25],
    "slice of rows": lambda x: _channels_last(functional.pad(x, (0, 0, 1, 2)))[:, :, 1:-2],
    "slice of columns": lambda x: _channels_last(functional.pad(x, (1, 2)))[..., 1:-2],
    "every other sample": lambda x: _channels_last(x.repeat_interleave(2, dim=0))[::2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "odd address": lambda x: torch.cat([torch.zeros(1), x.permute(0, 2, 3, 1).reshape(-1)])[
        1:
    ].reshape(2, 6, 7, 20).permute(0, 3, 1, 2),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_groupnorm_of_every_memory_order_is_the_same(activation_isa, layout) -> None:
    plain = torch.randn(2, 20, 6, 7)
    weight, bias = torch.randn(20), torch.randn(20)
    x = LAYOUTS[layout](plain)
    assert torch.equal(x, plain)
    expected = cpu_activation.groupnorm_silu_quantize(
        _channels_last(plain), 4, weight, bias, EPS, x_scale=torch.tensor(0.02), isa="scalar"
    )
    got = cpu_activation.groupnorm_silu_quantize(
        x, 4, weight, bias, EPS, x_scale=torch.tensor(0.02), isa=activation_isa
    )
    assert torch.equal(got[0], expected[0])


@pytest.mark.parametrize("layout", ["slice of channels", "slice of rows", "odd address"])
def test_slices_of_channels_last_memory_are_not_copied(layout) -> None:
    x = LAYOUTS[layout](torch.randn(2, 20, 6, 7))
    assert cpu_activation._as_channels_last(x)[0].data_ptr() == x.data_ptr()


def test_slices_of_rows_are_not_copied() -> None:
    x = torch.randn(2, 5, 6, 20)[..., 3:14]
    values, rows, columns, row_stride = cpu_activation._as_rows(x)
    assert values.data_ptr() == x.data_ptr()
    assert (rows, columns, row_stride) == (60, 11, 20)


# --- layer norm and gate --------------------------------------------------------------------------


@pytest.mark.parametrize("scale", STATIC)
@pytest.mark.parametrize("shape", ROWS)
def test_layernorm_quantize(activation_isa, shape, scale) -> None:
    x, weight, bias = torch.randn(shape) * 3 - 1, torch.randn(shape[1]), torch.randn(shape[1])
    got = cpu_activation.layernorm_quantize(
        x, weight, bias, EPS, **STATIC[scale], isa=activation_isa
    )
    _check(got, _layer_norm(x, weight, bias), STATIC[scale], is_per_row=True)


@pytest.mark.parametrize("shape", [(9, 320), (2, 4099)])
def test_layernorm_of_a_mean_far_above_the_deviation(activation_isa, shape) -> None:
    x, weight, bias = torch.randn(shape) + 1000, torch.randn(shape[1]), torch.randn(shape[1])
    got = cpu_activation.layernorm_quantize(x, weight, bias, EPS, isa=activation_isa)
    _check(got, _layer_norm(x, weight, bias), {}, is_per_row=True)


@pytest.mark.parametrize("scale", STATIC)
@pytest.mark.parametrize("shape", ROWS)
def test_geglu_quantize(activation_isa, shape, scale) -> None:
    x = torch.randn(shape[0], 2 * shape[1]) * 3
    got = cpu_activation.geglu_quantize(x, **STATIC[scale], isa=activation_isa)
    _check(got, _geglu(x), STATIC[scale], is_per_row=True)


@pytest.mark.parametrize("gate", [-1e30, -30.0, -5.7, 0.0, 5.7, 30.0, 1e30])
def test_geglu_of_extreme_gates(activation_isa, gate) -> None:
    x = torch.cat([torch.randn(3, 40), torch.full((3, 40), gate)], dim=1)
    keywords = {"x_scale": torch.tensor(0.01)}
    got = cpu_activation.geglu_quantize(x, **keywords, isa=activation_isa)
    _check(got, _geglu(x), keywords, is_per_row=True)


def test_rows_apart_are_read_in_place(activation_isa) -> None:
    wide, weight, bias = torch.randn(9, 100), torch.randn(40), torch.randn(40)
    x = wide[:, 7:47]
    for function, arguments in (
        (cpu_activation.layernorm_quantize, (weight, bias, EPS)),
        (cpu_activation.geglu_quantize, ()),
    ):
        got = function(x, *arguments, isa=activation_isa)
        expected = function(x.contiguous(), *arguments, isa=activation_isa)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


def test_half_precision_parameters_are_converted(activation_isa) -> None:
    x, weight, bias = torch.randn(6, 40), torch.randn(40).half(), torch.randn(40).bfloat16()
    got = cpu_activation.layernorm_quantize(x, weight, bias, EPS, isa=activation_isa)
    _check(got, _layer_norm(x, weight, bias), {}, is_per_row=True)


def test_squares_beyond_float32_are_refused_not_flattened(activation_isa) -> None:
    """A variance of infinity would turn every number into the bias."""
    x, groups, weight, bias = _image("two parts, the last ragged")
    with pytest.raises(NonFiniteError):
        cpu_activation.groupnorm_silu_quantize(
            x * 1e25, groups, weight, bias, EPS, isa=activation_isa
        )
    with pytest.raises(NonFiniteError):
        cpu_activation.layernorm_quantize(
            torch.randn(3, 36) * 1e25, weight, bias, EPS, isa=activation_isa
        )


def test_threads_change_nothing(activation_isa) -> None:
    x, groups, weight, bias = _image("two parts, the last ragged")
    rows = torch.randn(700, 96)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(
            [
                *cpu_activation.groupnorm_silu_quantize(
                    x, groups, weight, bias, EPS, isa=activation_isa
                ),
                *cpu_activation.geglu_quantize(rows, isa=activation_isa),
                *cpu_activation.layernorm_quantize(
                    rows, torch.ones(96), torch.ones(96), EPS, isa=activation_isa
                ),
                *cpu_activation.quantize_int8(rows, isa=activation_isa),
            ]
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


# --- functions ------------------------------------------------------------------------------------


def _activate(function: str, x: Tensor, isa: str) -> Tensor:
    y = torch.empty_like(x).fill_(float("nan"))
    compiled.module.activate(function, x.data_ptr(), x.numel(), y.data_ptr(), isa)
    return y


def _dense(limit: float) -> Tensor:
    magnitudes = torch.logspace(-30, 0, 20011).mul(limit)
    return torch.cat([magnitudes, -magnitudes, torch.linspace(-limit, limit, 400009)])


def test_silu_is_accurate(activation_isa) -> None:
    """Relative error; where products are not fused, the exponent's rounding counts five times."""
    x = _dense(85.0)
    exact = x.double() * torch.sigmoid(x.double())
    error = (_activate("silu", x, activation_isa) - exact).abs() / exact.abs().clamp(min=1e-38)
    bound = 4e-7 + (1e-7 if activation_isa == "scalar" else 2e-8) * x.double().abs()
    assert bool((error <= bound).all()), f"relative error {float((error / bound).max())} of bound"


def test_gelu_is_accurate(activation_isa) -> None:
    """Error over |x|, that is of the cumulative distribution, which is at most 1."""
    x = _dense(40.0)
    error = (_activate("gelu", x, activation_isa) - _gelu(x)).abs() / x.double().abs().clamp(
        min=1e-38
    )
    assert float(error.max()) < 3e-7


@pytest.mark.parametrize("function", ["silu", "gelu"])
def test_activation_of_large_arguments(activation_isa, function) -> None:
    x = torch.tensor([-1e30, -1e4, -200.0, 200.0, 1e4, 1e30])
    expected = x.clamp(min=0)
    assert torch.allclose(_activate(function, x, activation_isa), expected, rtol=1e-6, atol=1e-5)
