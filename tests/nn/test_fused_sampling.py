"""FusedUpsample2D against diffusers' at every size, and Downsample2D as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from ptq4adm.nn.fused_sampling import FusedUpsample2D, _nearest

CPU = torch.device("cpu")

Quantize = Callable[..., Any]
CHANNELS = 72


def _run(block: nn.Module, gain: float) -> Tensor:
    x = torch.randn(2, CHANNELS, 6, 5, generator=torch.Generator().manual_seed(2))
    return block(gain * x)


def _block(**options: Any) -> Upsample2D:
    return Upsample2D(CHANNELS, use_conv=True, out_channels=40, **options)


SIZES = {
    "twice by default": ((4, 3), None),
    "twice by name": ((4, 3), (8, 6)),
    "one less in both": ((4, 39), (7, 77)),
    "twice in one": ((5, 39), (10, 78)),
    "rows only": ((5, 4), (9, 4)),
    "three times": ((3, 2), (9, 6)),
    "the same": ((3, 2), (3, 2)),
    "smaller": ((6, 5), (3, 2)),
    "one pixel": ((1, 1), (2, 1)),
}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_it_equals_diffusers_and_float64(
    quantize_block: Quantize, recipe: Any, size: tuple[tuple[int, int], Any]
) -> None:
    pair = quantize_block(_block(), _run, recipe)
    assert type(pair.fused) is FusedUpsample2D
    pair.set_bucket(1)
    old, new = size
    x = torch.randn(2, CHANNELS, *old)
    y = pair.check(x, torch.Size(new) if new is not None else None)
    assert y.shape == (2, 40, *(new or (2 * old[0], 2 * old[1])))
    assert y.is_contiguous(memory_format=torch.channels_last)
    # integers are enlarged, not floats: no rounding can differ
    torch.testing.assert_close(y, pair.unfused(x, new), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pixels_are_those_that_torch_takes(dtype: torch.dtype) -> None:
    """floor(i * old / new) in float32, as torch does for images, is not always that in integers."""
    differing = 0
    for old in range(1, 90):
        column = torch.arange(old).to(dtype)[None, None, :, None]
        for new in range(old, 2 * old + 3):
            expected = nn.functional.interpolate(column, size=(new, 1), mode="nearest")[0, 0, :, 0]
            row = column.transpose(2, 3).contiguous(memory_format=torch.channels_last)
            across = nn.functional.interpolate(row, size=(1, new), mode="nearest")[0, 0, 0]
            assert torch.equal(_nearest(old, new, CPU).to(dtype), expected)
            assert torch.equal(_nearest(old, new, CPU).to(dtype), across)
            exact = torch.arange(new) * old // new
            differing += not torch.equal(_nearest(old, new, CPU), exact)
    assert differing > 0


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (lambda: Upsample2D(CHANNELS, use_conv_transpose=True), "transposed"),
        (lambda: _block(name="Conv2d_0"), "no convolution 'conv'"),
        (lambda: Upsample2D(CHANNELS), "no convolution 'conv'"),
        (lambda: _block(interpolate=False), "does not enlarge"),
        (
            lambda: _block(norm_type="ln_norm", eps=1e-5, elementwise_affine=True),
            "normalizes",
        ),
    ],
)
def test_other_kinds_stay_and_say_why(
    quantize_block: Quantize, make_recipe: Any, block: Callable[[], Upsample2D], reason: str
) -> None:
    pair = quantize_block(block(), _run, make_recipe())
    assert type(pair.fused) is Upsample2D
    assert reason in pair.report.blocks[0].reasons["conv"]
    x = torch.randn(1, CHANNELS, 4, 3)
    assert torch.equal(pair.fused(x), pair.unfused(x))


def test_a_hooked_convolution_runs_unfused(
    quantize_block: Quantize, make_recipe: Any, caplog: pytest.LogCaptureFixture
) -> None:
    pair = quantize_block(_block(), _run, make_recipe())
    x = torch.randn(1, CHANNELS, 4, 3)
    expected = 2 * pair.fused(x)
    pair.fused.conv.register_forward_hook(lambda *a: 2 * a[2])
    torch.testing.assert_close(pair.fused(x), expected)
    pair.fused(x)
    assert caplog.text.count("child 'conv' has hooks") == 1


@pytest.mark.parametrize("padding", [0, 1])
def test_a_downsampler_needs_no_fusion(quantize_block: Quantize, recipe: Any, padding: int) -> None:
    """Its convolution quantizes its input; padding 0 pads below and right, with exact zeros."""
    block = Downsample2D(CHANNELS, use_conv=True, out_channels=40, padding=padding, name="op")
    pair = quantize_block(block, _run, recipe)
    assert type(pair.fused) is Downsample2D
    assert pair.report.blocks == ()
    x = torch.randn(2, CHANNELS, 9, 78).contiguous(memory_format=torch.channels_last)
    y = pair.check(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
