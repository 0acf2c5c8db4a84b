"""Layers in float16: their numbers, their one copy, their unchanged state."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ptq4adm.errors import RangeError
from ptq4adm.nn import (
    QuantizedLayer,
    W4A8Conv2d,
    W4A8Linear,
    W8A8Conv2d,
    W8A8Linear,
    resident_bytes,
)
from ptq4adm.nn.half_weights import decode_half, encode_half
from ptq4adm.packing.layout import KLayout, pack_int4
from ptq4adm.quant.affine import QuantizedRows

MAKERS: dict[str, Callable[[], QuantizedLayer]] = {
    "w4a8 linear": lambda: W4A8Linear.from_float(nn.Linear(72, 20)),
    "w4a8 linear, groups": lambda: W4A8Linear.from_float(nn.Linear(72, 20), group_size=64),
    "w8a8 linear, no bias": lambda: W8A8Linear.from_float(nn.Linear(72, 20, bias=False)),
    "w4a8 conv, segments": lambda: W4A8Conv2d.from_float(
        nn.Conv2d(72, 20, 3, padding=1), segments=(40, 32)
    ),
    "w8a8 conv, stride": lambda: W8A8Conv2d.from_float(nn.Conv2d(72, 20, 3, stride=2)),
    "w4a8 conv, dilation": lambda: W4A8Conv2d.from_float(nn.Conv2d(9, 5, (3, 1), dilation=2)),
}
EVERY = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def _input(layer: QuantizedLayer) -> Tensor:
    channels = layer.layout.in_channels
    is_conv = isinstance(layer, W4A8Conv2d | W8A8Conv2d)
    return torch.randn(2, channels, 7, 5) if is_conv else torch.randn(3, 4, channels)


def _exact(layer: QuantizedLayer, x: Tensor) -> Tensor:
    """The float layer with the quantized weight in float16, in float64."""
    weight = layer.float_weight().half().double()
    bias = None if layer.bias is None else layer.bias.double()
    if isinstance(layer, W4A8Conv2d | W8A8Conv2d):
        s = layer.shape
        return functional.conv2d(x.double(), weight, bias, s.stride, s.padding, s.dilation)
    return functional.linear(x.double(), weight.flatten(1), bias)


@EVERY
def test_activations_are_float_and_the_weight_is_the_quantized_one(
    make: Callable[[], QuantizedLayer],
) -> None:
    layer = make()
    x = _input(layer)
    expected = _exact(layer, x)
    packed = layer(x)
    layer.use_float("a test")
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        y = layer(x.to(dtype))
        assert y.dtype == dtype
        assert y.shape == expected.shape
        error = (y.double() - expected).norm() / expected.norm()
        assert error < tolerance
    # and not what int8 activations give
    assert (packed.double() - expected).norm() / expected.norm() > 1e-4


@EVERY
def test_the_state_is_the_packed_one_bit_for_bit(make: Callable[[], QuantizedLayer]) -> None:
    layer = make()
    state, x = copy.deepcopy(layer.state_dict()), _input(layer)
    specs, y = layer.stored_tensors(), layer(x)
    layer.use_float("a test")
    for _ in range(2):
        now = layer.state_dict()
        assert list(now) == list(state)
        for name, tensor in state.items():
            assert now[name].dtype == tensor.dtype
            assert torch.equal(now[name], tensor), name
        assert layer.stored_tensors() == specs
        layer = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
        assert layer.is_float
    layer.use_packed()
    assert not layer.is_float
    assert layer.backend_reason == ""
    assert torch.equal(layer(x), y)
    assert set(dict(layer.named_buffers())) == set(state)


@EVERY
def test_memory_is_that_of_one_float16_copy(make: Callable[[], QuantizedLayer]) -> None:
    layer = make()
    numbers = layer.float_weight().numel() + (0 if layer.bias is None else layer.bias.numel())
    others = resident_bytes(layer) - layer.qweight.nbytes
    layer.use_float("a test")
    assert resident_bytes(layer) == others + 2 * numbers
    layer.use_packed()
    assert resident_bytes(layer) == others + layer.qweight.nbytes


def test_repr_says_float_and_why() -> None:
    layer = W4A8Linear.from_float(nn.Linear(72, 20))
    layer.use_float("float16 3 us, triton 4 us at M 18")
    text = repr(layer)
    assert "activation=float, weights in float16, backend=float (float16 3 us, triton 4 us" in text


@EVERY
def test_a_state_is_loaded_and_a_dtype_changes_nothing(make: Callable[[], QuantizedLayer]) -> None:
    layer, other = make(), make()
    layer.use_float("a test")
    layer.load_state_dict(other.state_dict())
    x = _input(layer)
    expected = _exact(other, x)
    for change in (lambda: None, layer.half, layer.float, lambda: layer.to(torch.float64)):
        change()
        assert layer.is_float
        assert layer.qweight.dtype == torch.float16
        assert (layer(x).double() - expected).norm() / expected.norm() < 1e-6
    assert torch.equal(layer.state_dict()["qweight"], other.state_dict()["qweight"])


def test_another_device_packs_it_again() -> None:
    layer = W4A8Linear.from_float(nn.Linear(72, 20))
    layer.use_float("a test")
    layer.to("meta")
    assert layer.backend == "reference"
    assert layer.qweight.shape == (20, 64)


def test_integers_at_the_ends_of_the_range_come_back() -> None:
    layout = KLayout((128,))
    for bits, low, high in ((4, -8, 7), (8, -128, 127)):
        w_q = torch.randint(low, high + 1, (64, 128)).to(torch.int8)
        w_q[0], w_q[1] = low, high
        # from 2^-20 to 2: steps that float16 holds, the smallest as subnormal products
        w_scale = torch.logspace(-20, 1, 64, base=2.0) * 1.00037
        rows = QuantizedRows(w_q, w_scale)
        weight = decode_half(rows, layout, bits)
        assert weight.dtype == torch.float16
        assert weight.is_contiguous(memory_format=torch.channels_last)
        canonical = pack_int4(w_q) if bits == 4 else w_q
        assert torch.equal(encode_half(weight, w_scale, None, layout, bits), canonical)


@pytest.mark.parametrize("scale", [1e-9, 1e5, float("nan")])
def test_a_scale_out_of_range_is_refused_and_changes_nothing(scale: float) -> None:
    layer = W4A8Linear.from_float(nn.Linear(72, 20))
    layer.w_scale[3] = scale
    backend, state = layer.backend, copy.deepcopy(layer.state_dict())
    with pytest.raises(RangeError, match=r"cannot be found again from float16.*keep it packed"):
        layer.use_float("a test")
    assert layer.backend == backend
    assert torch.equal(layer.state_dict()["qweight"], state["qweight"])
    fine = W4A8Linear.from_float(nn.Linear(72, 20))
    fine.use_float("a test")
    with pytest.raises(RuntimeError, match="cannot be found again from float16"):
        fine.load_state_dict(state)


def test_what_is_not_zero_in_the_padding_is_refused() -> None:
    layer = W8A8Linear.from_float(nn.Linear(72, 20), backend="reference")
    layer.qweight[0, 100] = 5
    with pytest.raises(RangeError, match="keep it packed"):
        layer.use_float("a test")
