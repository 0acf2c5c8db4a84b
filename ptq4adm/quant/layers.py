"""Which layers of a model can be quantized at all, and what their sizes are in numbers."""

from __future__ import annotations

from torch import nn


def quantizable_layers(module: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Every plain linear and two-dimensional convolution by its first name, in module order.

    Subclasses are left out: their forward, or the code that owns them, may use the weight in
    another way.
    """
    return {
        name: layer
        for name, layer in module.named_modules()
        if type(layer) in (nn.Linear, nn.Conv2d) and isinstance(layer, (nn.Linear, nn.Conv2d))
    }


def conv_padding(layer: nn.Conv2d) -> tuple[int, int]:
    """Rows and columns of zeros on each side, also where torch keeps a word for them."""
    if layer.padding == "valid":
        return 0, 0
    if layer.padding == "same":
        rows, columns = (
            d * (k - 1) // 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)
        )
        return rows, columns
    assert not isinstance(layer.padding, str)
    rows, columns = layer.padding
    return rows, columns
