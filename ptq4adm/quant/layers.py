"""Which layers of a model can be quantized at all."""

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
