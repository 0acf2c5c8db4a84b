"""Gradients straight through the integers, against the float layer of the same weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ptq4adm.nn import StepIndex, W4A8Conv2d, W4A8Linear, W8A8Linear
from ptq4adm.nn.timestep import TimestepBuckets


def _gradients(layer: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    given = x.clone().requires_grad_()
    y = layer(given)
    (gradient,) = torch.autograd.grad(y, given, dy)
    return y.detach(), gradient


@pytest.mark.parametrize("cls", [W4A8Linear, W8A8Linear])
def test_a_linear_passes_the_gradient_of_its_decoded_weight(cls: type, backend: str) -> None:
    layer = cls.from_float(nn.Linear(70, 33), backend=backend)
    x, dy = torch.randn(2, 5, 70), torch.randn(2, 5, 33)
    y, gradient = _gradients(layer, x, dy)
    assert torch.equal(y, layer(x))
    weight = layer.dequantize().weight.double()
    torch.testing.assert_close(gradient, (dy.double() @ weight).float())


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_does_too(stride: int, backend: str) -> None:
    conv = nn.Conv2d(20, 17, 3, stride=stride, padding=1)
    layer = W4A8Conv2d.from_float(conv, backend=backend)
    x = torch.randn(2, 20, 7, 5)
    dy = torch.randn_like(conv(x))
    y, gradient = _gradients(layer, x, dy)
    assert torch.equal(y, layer(x))
    _, expected = _gradients(layer.dequantize(), x, dy)
    torch.testing.assert_close(gradient, expected)


def test_a_clipped_input_has_no_gradient(backend: str) -> None:
    # two segments and two buckets, each with a limit of its own: 127.5 scales
    scales = torch.tensor([[1.0, 0.01], [1.0, 0.02]])
    step = StepIndex(TimestepBuckets(10, (True, True)))
    step.set_timestep(7)
    layer = W8A8Linear.from_float(
        nn.Linear(128, 8), x_scale=scales, step=step, segments=(64, 64), backend=backend
    )
    x = torch.full((1, 128), 1.3)
    x[0, 1], x[0, 127], x[0, 126] = -1.26, 2.6, -2.54
    _, gradient = _gradients(layer, x, torch.ones(1, 8))
    weight = layer.dequantize().weight.sum(0)
    is_inside = torch.cat([torch.zeros(64), torch.ones(64)])
    is_inside[1], is_inside[127] = 1, 0
    torch.testing.assert_close(gradient[0], weight * is_inside)


def test_half_precision_gives_a_gradient_of_its_own_dtype(backend: str) -> None:
    layer = W4A8Linear.from_float(nn.Linear(64, 16), backend=backend)
    x, dy = torch.randn(3, 64).bfloat16(), torch.randn(3, 16).bfloat16()
    _, gradient = _gradients(layer, x, dy)
    assert gradient.dtype == torch.bfloat16
    expected = dy.double() @ layer.dequantize().weight.double()
    assert (gradient.double() - expected).norm() <= 0.01 * expected.norm()


def test_no_gradient_is_kept_where_none_is_asked_for(backend: str) -> None:
    layer = W4A8Linear.from_float(nn.Linear(64, 16), backend=backend)
    assert layer(torch.randn(3, 64)).grad_fn is None
    with torch.no_grad():
        assert layer(torch.randn(3, 64).requires_grad_()).grad_fn is None
