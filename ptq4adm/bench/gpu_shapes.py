"""What one step of the real UNets runs on a GPU: products, norms and gates, as a stored table.

``gpu_shapes.csv`` is read off the models by `read_models`, and a test compares the two. It is
stored because a GPU machine that is borrowed for minutes often has no diffusers.

    python -m ptq4adm.bench.gpu_shapes        # writes the table anew
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ptq4adm.bench.rows import read_rows, write_rows
from ptq4adm.bench.shapes import (
    CONV1X1,
    CONV3X3,
    CONV3X3_DOWN,
    CONV3X3_UP,
    KINDS,
    LINEAR,
    MODELS,
    TIMESTEP,
    LayerShape,
    model_layers,
    model_spec,
    step_inputs,
)
from ptq4adm.errors import ConfigError

TABLE = Path(__file__).with_suffix(".csv")
GROUP_NORM_SILU, GROUP_NORM, LAYER_NORM, GEGLU = (
    "groupnorm-silu",
    "groupnorm",
    "layernorm",
    "geglu",
)
ACTIVATION_KINDS = (GROUP_NORM_SILU, GROUP_NORM, LAYER_NORM, GEGLU)
GPU_KINDS = (*KINDS, *ACTIVATION_KINDS)
# toy sizes of every kind, ragged where a kernel has an edge: for runs in Triton's interpreter
TOY_MODEL = "toy"


@dataclass(frozen=True)
class GpuLayer:
    """One distinct call of a model's step.

    Attributes:
        model: a name of `shapes.MODELS`, or `TOY_MODEL`.
        shape: the sizes. Norms: `in_channels` = C. GEGLU: `in_channels` = 2 K, `out_channels` = K.
        count: calls a step.
        is_gated: a linear layer whose output a GEGLU halves.
    """

    model: str
    shape: LayerShape
    count: int
    is_gated: bool = False

    @property
    def is_product(self) -> bool:
        """Whether it is a matrix product, not a norm or a gate."""
        return self.shape.kind in KINDS

    @property
    def weight(self) -> float:
        """How much of a step it is, roughly: operations of all calls, bytes for the rest."""
        if self.is_product:
            return float(self.count * self.shape.operations)
        return float(self.count * self.shape.M * self.shape.in_channels)


TOY_LAYERS = (
    GpuLayer(TOY_MODEL, LayerShape(CONV3X3, 1, 5, 3, 64, 32), 1),
    GpuLayer(TOY_MODEL, LayerShape(CONV3X3_DOWN, 1, 4, 6, 64, 32), 1),
    GpuLayer(TOY_MODEL, LayerShape(CONV3X3_UP, 1, 3, 2, 64, 32), 1),
    GpuLayer(TOY_MODEL, LayerShape(CONV1X1, 1, 5, 3, 64, 32), 1),
    GpuLayer(TOY_MODEL, LayerShape(LINEAR, 1, 18, 1, 64, 48), 1),
    GpuLayer(TOY_MODEL, LayerShape(LINEAR, 1, 18, 1, 64, 64), 1, is_gated=True),
    GpuLayer(TOY_MODEL, LayerShape(GROUP_NORM_SILU, 1, 4, 3, 64, 64), 1),
    GpuLayer(TOY_MODEL, LayerShape(GROUP_NORM, 1, 4, 3, 64, 64), 1),
    GpuLayer(TOY_MODEL, LayerShape(LAYER_NORM, 1, 6, 1, 40, 40), 1),
    GpuLayer(TOY_MODEL, LayerShape(GEGLU, 1, 6, 1, 80, 40), 1),
)


def gpu_layers(models: Sequence[str], kinds: Sequence[str] = GPU_KINDS) -> list[GpuLayer]:
    """The calls of models, from the stored table.

    Args:
        models: names of `shapes.MODELS`, or `TOY_MODEL`.
        kinds: names of `GPU_KINDS`.

    Raises:
        ConfigError: if a name is unknown.
    """
    for name, value, known in (
        *(("model", model, (*MODELS, TOY_MODEL)) for model in models),
        *(("kind", kind, GPU_KINDS) for kind in kinds),
    ):
        if value not in known:
            raise ConfigError(f"{name} {value!r} is unknown: expected one of {', '.join(known)}")
    layers = [layer for layer in (*_stored(), *TOY_LAYERS) if layer.model in models]
    return [layer for layer in layers if layer.shape.kind in kinds]


@cache
def _stored() -> tuple[GpuLayer, ...]:
    return tuple(
        GpuLayer(
            row["model"],
            LayerShape(row["kind"], *(int(row[name]) for name in _SIZES)),
            int(row["count"]),
            row["gated"] == "1",
        )
        for row in read_rows(TABLE)
    )


_SIZES = ("batch", "height", "width", "in_channels", "out_channels")


# --- the table, from the models -----------------------------------------------------------------


def read_models() -> list[GpuLayer]:
    """Run every UNet once on the meta device; needs diffusers."""
    return [layer for model in MODELS for layer in _read_model(model)]


def _read_model(model: str) -> list[GpuLayer]:
    from diffusers.models.activations import GEGLU as GATED
    from diffusers.models.resnet import ResnetBlock2D

    unet = model_spec(model).build("meta")
    gated: Counter[LayerShape] = Counter()
    others: Counter[LayerShape] = Counter()
    of_resnets = {
        id(norm)
        for block in unet.modules()
        if isinstance(block, ResnetBlock2D)
        for norm in (block.norm1, block.norm2)
    }
    for module in unet.modules():
        if isinstance(module, nn.GroupNorm):
            kind = GROUP_NORM_SILU if id(module) in of_resnets else GROUP_NORM
            _count(module, others, lambda x, _, kind=kind: _image(kind, x))
        elif isinstance(module, nn.LayerNorm):
            _count(module, others, lambda x, _: _rows(LAYER_NORM, x, x.shape[-1]))
        elif isinstance(module, GATED):
            _count(module.proj, gated, lambda x, layer: _rows(LINEAR, x, layer.out_features))
    latents, conditioning = step_inputs(model, device="meta")
    with torch.inference_mode():
        unet(latents, torch.tensor(TIMESTEP, device="meta"), **conditioning)
    layers = [
        GpuLayer(model, layer.shape, layer.count, layer.shape in gated)
        for layer in model_layers(model)
    ]
    layers += [GpuLayer(model, shape, count) for shape, count in others.items()]
    for shape, count in gated.items():
        size = LayerShape(GEGLU, 1, shape.M, 1, shape.N, shape.N // 2)
        layers.append(GpuLayer(model, size, count))
    return layers


def _count(
    module: nn.Module, counts: Counter[LayerShape], shape_of: Callable[..., LayerShape]
) -> None:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        counts[shape_of(args[0], module)] += 1

    module.register_forward_pre_hook(hook)


def _image(kind: str, x: torch.Tensor) -> LayerShape:
    # a norm before attention sees [B, C, H, W] as well, or [B, C, T]
    batch, channels, *size = x.shape
    height, width = (*size, 1)[:2]
    return LayerShape(kind, batch, height, width, channels, channels)


def _rows(kind: str, x: torch.Tensor, out: int) -> LayerShape:
    return LayerShape(kind, 1, x.numel() // x.shape[-1], 1, x.shape[-1], out)


def write_table() -> None:
    """Write the table anew."""
    write_rows(
        TABLE,
        [
            {
                "model": layer.model,
                "kind": layer.shape.kind,
                **{name: getattr(layer.shape, name) for name in _SIZES},
                "count": layer.count,
                "gated": int(layer.is_gated),
            }
            for layer in read_models()
        ],
    )


if __name__ == "__main__":
    write_table()
