"""Fused blocks lose no gradient: where one is asked for, diffusers' forward runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from ptq4adm.nn.replace import dequantize_layers

WIDTH, TEXT = 64, 48
Quantize = Callable[..., Any]


def _resnet() -> tuple[nn.Module, Tensor]:
    block = ResnetBlock2D(in_channels=WIDTH, temb_channels=None, groups=8)
    return block, torch.randn(2, WIDTH, 3, 5)


def _transformer_block() -> tuple[nn.Module, Tensor]:
    return BasicTransformerBlock(WIDTH, 4, 16), torch.randn(2, 7, WIDTH)


def _transformer() -> tuple[nn.Module, Tensor]:
    model = Transformer2DModel(4, 16, in_channels=WIDTH, norm_num_groups=8)
    return model, torch.randn(2, WIDTH, 3, 5)


def _run(block: nn.Module, x: Tensor) -> Tensor:
    if isinstance(block, ResnetBlock2D):
        return block(x, None)
    if isinstance(block, Transformer2DModel):
        return block(x, return_dict=False)[0]
    return block(x)


@pytest.mark.parametrize("make", [_resnet, _transformer_block, _transformer])
def test_the_gradient_is_that_of_the_unfused_block(
    quantize_block: Quantize, make_recipe: Any, backend: str, make: Callable[[], Any]
) -> None:
    block, x = make()
    pair = quantize_block(block, lambda b, gain: _run(b, gain * x), make_recipe(backend=backend))
    assert pair.report.count()["all"] == len(pair.report.blocks) > 0
    restored = copy.deepcopy(pair.unfused)
    dequantize_layers(restored, torch.float32)
    weight = torch.randn_like(x)
    gradients = []
    for module in (pair.fused, pair.unfused, restored):
        given = x.clone().requires_grad_()
        y = _run(module, given)
        (gradient,) = torch.autograd.grad((y * weight).sum(), given)
        gradients.append(gradient)
    fused, unfused, exact = gradients
    assert torch.equal(fused, unfused)
    # straight through the rounding: the gradient of the block with the same weights in float
    beside_residual = (exact - weight).norm()
    assert beside_residual > 0.1 * weight.norm()
    assert (fused - exact).norm() <= 0.1 * beside_residual


def test_without_gradients_it_stays_fused(quantize_block: Quantize, make_recipe: Any) -> None:
    block, x = _transformer_block()
    pair = quantize_block(block, lambda b, gain: _run(b, gain * x), make_recipe())
    twin = copy.deepcopy(pair.fused)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BasicTransformerBlock, "forward", lambda *_: pytest.fail("it ran unfused"))
        _run(twin, x)
        with torch.no_grad():
            _run(twin, x.clone().requires_grad_())
