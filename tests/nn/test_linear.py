"""W4A8Linear and W8A8Linear against the formula of the design, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ptq4adm.errors import (
    ConfigError,
    DtypeError,
    NonFiniteError,
    ShapeError,
    UnsupportedLayerError,
)
from ptq4adm.nn import StepIndex, W4A8Linear, W8A8Linear
from ptq4adm.nn.options import LayerOptions
from ptq4adm.quant.buckets import TimestepBuckets

BOTH = pytest.mark.parametrize("cls", [W4A8Linear, W8A8Linear], ids=["w4a8", "w8a8"])


def _expected(x: Tensor, layer: nn.Linear, scale: Tensor) -> Tensor:
    """Quantize x with float32 `scale` (broadcastable), multiply in float64."""
    x_q = (x.float() * (1 / scale)).round().clamp(-127, 127)
    y = (x_q.double() * scale.double()) @ layer.weight.double().T
    return y if layer.bias is None else y + layer.bias.double()


@BOTH
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 100), (2, 3, 100), (100,), (0, 100)])
def test_dynamic_scales_are_per_row(
    cls: type[W4A8Linear], bias: bool, shape: tuple[int, ...]
) -> None:
    layer = cls.from_float(nn.Linear(100, 30, bias=bias))
    x = (
        torch.randn(shape)
        * torch.logspace(-3, 3, 100)
        .flip(0)[: max(1, shape[0])]
        .view(-1, *[1] * (len(shape) - 1))[: shape[0] if len(shape) > 1 else 1]
    )
    scale = x.abs().amax(dim=-1, keepdim=True).clamp_min(1e-8) / 127
    torch.testing.assert_close(
        layer(x), _expected(x, layer.dequantize(), scale).float(), rtol=1e-5, atol=1e-6
    )


@BOTH
def test_a_static_scale_holds_for_the_whole_tensor(cls: type[W4A8Linear]) -> None:
    layer = cls.from_float(nn.Linear(64, 32), x_scale=torch.tensor(0.02))
    x = torch.randn(7, 64)
    expected = _expected(x, layer.dequantize(), torch.tensor(0.02))
    torch.testing.assert_close(layer(x), expected.float(), rtol=1e-5, atol=1e-6)


def test_the_scale_of_the_selected_bucket_is_used() -> None:
    step = StepIndex(TimestepBuckets(100, (True, True, True)))
    table = torch.tensor([[0.01, 0.02, 0.04]])
    layer = W4A8Linear.from_float(nn.Linear(64, 32), x_scale=table, step=step)
    x = torch.randn(7, 64)
    for timestep, scale in ((0, 0.01), (50, 0.02), (99, 0.04)):
        step.set_timestep(timestep)
        expected = _expected(x, layer.dequantize(), torch.tensor(scale))
        torch.testing.assert_close(layer(x), expected.float(), rtol=1e-5, atol=1e-6)


def test_two_segments_have_their_own_scales() -> None:
    scales = torch.tensor([[0.001], [1.0]])
    layer = W4A8Linear.from_float(nn.Linear(100, 32), x_scale=scales, segments=(30, 70))
    x = torch.cat([torch.randn(5, 30) * 0.1, torch.randn(5, 70) * 100], dim=1)
    per_channel = torch.cat([scales[0].expand(30), scales[1].expand(70)])
    expected = _expected(x, layer.dequantize(), per_channel)
    torch.testing.assert_close(layer(x), expected.float(), rtol=1e-5, atol=1e-4)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_output_has_the_inputs_dtype(cls: type[W4A8Linear], dtype: torch.dtype) -> None:
    layer = cls.from_float(nn.Linear(64, 32))
    x = torch.randn(4, 64).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, layer(x.float()).to(dtype))


@BOTH
def test_quantization_is_close_to_the_float_layer(cls: type[W4A8Linear]) -> None:
    layer = nn.Linear(256, 64)
    x = torch.randn(50, 256)
    error = (cls.from_float(layer)(x) - layer(x)).norm() / layer(x).norm()
    assert error < (0.15 if cls is W4A8Linear else 0.012)


def test_group_mode_runs_what_it_stores() -> None:
    layer = W4A8Linear.from_float(nn.Linear(192, 32), group_size=64, x_scale=torch.tensor(0.02))
    assert layer.w_mult is not None
    x = torch.randn(7, 192)
    expected = _expected(x, layer.dequantize(), torch.tensor(0.02))
    torch.testing.assert_close(layer(x), expected.float(), rtol=1e-5, atol=1e-6)


def test_repr_says_what_a_person_asks() -> None:
    step = StepIndex(TimestepBuckets(1000, (True,) * 10))
    static = W4A8Linear.from_float(
        nn.Linear(128, 32), x_scale=torch.ones(1, 10), step=step, group_size=64, backend="reference"
    )
    for word in ("128, 32", "int4 in groups of 64", "static, 10 buckets", "backend=reference"):
        assert word in repr(static)
    assert "dynamic" in repr(W8A8Linear.from_float(nn.Linear(8, 8)))


def test_layers_compile_without_a_graph_break() -> None:
    step = StepIndex(TimestepBuckets(10, (True, True)))
    layer = W4A8Linear.from_float(
        nn.Linear(64, 32), x_scale=torch.tensor([[0.02, 0.03]]), step=step
    )
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = torch.randn(4, 64)
    with torch.no_grad():
        for timestep in (0, 9):
            step.set_timestep(timestep)
            assert torch.equal(compiled(x), layer(x))


class TestRefusals:
    """Bad input has its own error and a message that helps."""

    def test_only_plain_linears_are_taken(self) -> None:
        class Mine(nn.Linear):
            pass

        for layer in (nn.Conv2d(4, 4, 1), Mine(4, 4)):
            with pytest.raises(UnsupportedLayerError, match=r"needs a torch\.nn\.Linear"):
                W4A8Linear.from_float(layer)

    def test_weights_and_activations_must_be_finite(self) -> None:
        layer = nn.Linear(64, 4)
        x = torch.randn(2, 64)
        x[1, 1] = float("nan")
        with pytest.raises(NonFiniteError):
            W4A8Linear.from_float(layer, backend="reference")(x)
        with torch.no_grad():
            layer.weight[0, 0] = float("nan")
        with pytest.raises(NonFiniteError):
            W4A8Linear.from_float(layer)

    def test_wrong_inputs(self) -> None:
        layer = W4A8Linear.from_float(nn.Linear(64, 4))
        with pytest.raises(ShapeError, match="63 channels, needs 64"):
            layer(torch.randn(2, 63))
        with pytest.raises(DtypeError, match="int64"):
            layer(torch.ones(2, 64, dtype=torch.int64))

    def test_wrong_scales(self) -> None:
        layer = nn.Linear(64, 4)
        with pytest.raises(ConfigError, match="step"):
            W4A8Linear.from_float(layer, x_scale=torch.ones(1, 10))
        with pytest.raises(ShapeError, match=r"needs \[segments, buckets\] with 2"):
            W4A8Linear.from_float(layer, x_scale=torch.ones(1, 1), segments=(32, 32))
        with pytest.raises(ShapeError, match="not positive"):
            W4A8Linear.from_float(layer, x_scale=torch.zeros(1, 1))
        with pytest.raises(ShapeError):
            W4A8Linear.from_float(layer, segments=(32, 31))

    def test_groups_are_for_four_bits_and_64_wide(self) -> None:
        with pytest.raises(ConfigError, match="4-bit"):
            W8A8Linear.from_float(nn.Linear(64, 4), group_size=64)
        with pytest.raises(ConfigError, match="needs None or 64"):
            LayerOptions(group_size=32)
