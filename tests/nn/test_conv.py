"""W4A8Conv2d and W8A8Conv2d against float64 convolution of the dequantized layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ptq4adm.errors import DtypeError, ShapeError, UnsupportedLayerError
from ptq4adm.nn import StepIndex, W4A8Conv2d, W8A8Conv2d
from ptq4adm.nn.conv import ConvShape
from ptq4adm.quant.buckets import TimestepBuckets

BOTH = pytest.mark.parametrize("cls", [W4A8Conv2d, W8A8Conv2d], ids=["w4a8", "w8a8"])

GEOMETRIES = {
    "1x1": {"kernel_size": 1},
    "3x3": {"kernel_size": 3, "padding": 1},
    "stride 2": {"kernel_size": 3, "padding": 1, "stride": 2},
    "uneven": {"kernel_size": (3, 1), "padding": (2, 0), "stride": (1, 2)},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "same": {"kernel_size": (3, 5), "padding": "same"},
    "valid": {"kernel_size": 2, "padding": "valid"},
}


def _expected(x: Tensor, layer: nn.Conv2d, scale: Tensor) -> Tensor:
    x_q = (x.float() * (1 / scale)).round().clamp(-127, 127)
    return layer.double()(x_q.double() * scale.double()).float()


def _dynamic(x: Tensor) -> Tensor:
    return x.abs().max().clamp_min(1e-8) / 127


@BOTH
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_every_geometry_equals_the_float_convolution_of_the_integers(
    cls: type[W4A8Conv2d], geometry: dict[str, object]
) -> None:
    float_layer = nn.Conv2d(40, 24, **geometry)  # type: ignore[arg-type]
    layer = cls.from_float(float_layer)
    x = torch.randn(2, 40, 9, 7)
    y = layer(x)
    expected = _expected(x, layer.dequantize(), _dynamic(x))
    assert y.shape == float_layer(x).shape
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


@BOTH
def test_memory_formats_give_equal_results_and_channels_last_comes_out(
    cls: type[W4A8Conv2d],
) -> None:
    layer = cls.from_float(nn.Conv2d(40, 24, 3, padding=1))
    x = torch.randn(2, 40, 6, 5)
    y = layer(x)
    assert torch.equal(y, layer(x.contiguous(memory_format=torch.channels_last)))
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_an_image_without_a_batch_is_taken() -> None:
    layer = W4A8Conv2d.from_float(nn.Conv2d(40, 24, 3, padding=1), x_scale=torch.tensor(0.02))
    x = torch.randn(2, 40, 6, 5)
    assert torch.equal(layer(x[1]), layer(x)[1])


def test_segments_of_a_concatenation_have_their_own_scales() -> None:
    scales = torch.tensor([[0.001, 0.002], [1.0, 2.0]])
    step = StepIndex(TimestepBuckets(10, (True, True)))
    layer = W4A8Conv2d.from_float(
        nn.Conv2d(100, 24, 1), x_scale=scales, step=step, segments=(30, 70)
    )
    x = torch.cat([torch.randn(2, 30, 4, 5) * 0.05, torch.randn(2, 70, 4, 5) * 60], dim=1)
    for timestep, bucket in ((0, 0), (9, 1)):
        step.set_timestep(timestep)
        scale = torch.cat([scales[0, bucket].expand(30), scales[1, bucket].expand(70)])
        expected = _expected(x, layer.dequantize(), scale[:, None, None])
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-3)


def test_group_mode_of_a_padded_3x3() -> None:
    layer = W4A8Conv2d.from_float(nn.Conv2d(72, 24, 3, padding=1), group_size=64)
    assert layer.w_mult is not None
    assert layer.w_mult.shape == (24, 9 * 2)  # 72 channels are padded to 128 in each tap
    x = torch.randn(1, 72, 5, 5)
    expected = _expected(x, layer.dequantize(), _dynamic(x))
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_output_has_the_inputs_dtype(dtype: torch.dtype) -> None:
    layer = W4A8Conv2d.from_float(nn.Conv2d(40, 24, 3))
    x = torch.randn(1, 40, 5, 5).to(dtype)
    assert layer(x).dtype == dtype
    torch.testing.assert_close(layer(x), layer(x.float()).to(dtype))


def test_repr_names_geometry_bits_and_activation() -> None:
    layer = W8A8Conv2d.from_float(nn.Conv2d(40, 24, 3, stride=2, padding=1))
    for word in ("40, 24", "kernel_size=(3, 3)", "stride=(2, 2)", "int8", "dynamic", "backend="):
        assert word in repr(layer)
    assert "dilation" not in repr(layer)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Conv2d(8, 8, 3, groups=2), r"grouped convolution \(2 groups\)"),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), "'reflect'"),
        (nn.Conv2d(8, 8, 2, padding="same"), "even kernel"),
        (nn.Linear(8, 8), r"needs a torch\.nn\.Conv2d"),
    ],
)
def test_what_has_no_packed_form_is_refused(layer: nn.Module, message: str) -> None:
    with pytest.raises(UnsupportedLayerError, match=message):
        W4A8Conv2d.from_float(layer)


def test_wrong_inputs_are_refused() -> None:
    layer = W4A8Conv2d.from_float(nn.Conv2d(8, 8, 3))
    with pytest.raises(ShapeError, match="7 channels, needs 8"):
        layer(torch.randn(1, 7, 5, 5))
    with pytest.raises(ShapeError, match=r"needs \[B, C, H, W\]"):
        layer(torch.randn(8, 5))
    with pytest.raises(DtypeError, match="int8"):
        layer(torch.zeros(1, 8, 5, 5, dtype=torch.int8))


def test_sizes_print_without_their_defaults() -> None:
    assert str(ConvShape(8, 16, (1, 1))) == "8, 16, kernel_size=(1, 1)"
