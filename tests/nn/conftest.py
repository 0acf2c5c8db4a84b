"""Blocks of diffusers with quantized layers, and what they should compute, in float64.

The oracle is the diffusers block itself: its layers are replaced by the formula of
docs/numerics.md in float64, on the weights that the integers stand for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ptq4adm.config import Scheme
from ptq4adm.nn import QuantizedLayer, StepIndex, StorageLayer
from ptq4adm.nn.conv import QuantizedConv2d
from ptq4adm.nn.fuse import fuse_blocks, unfuse_blocks
from ptq4adm.nn.fusing import missing_operator
from ptq4adm.nn.replace import quantized_layer, replace_layers
from ptq4adm.quant.buckets import TimestepBuckets
from ptq4adm.quant.layers import quantizable_layers

BUCKETS = 3
# A fused quantizer may differ by one step in at most 0.1 % of the elements. With a root mean
# square of 32 steps (absmax scales, activations four times smaller in the mean) that is
# sqrt(1e-3) / 32 = 1e-3 of the norm for each quantized tensor; a block passes two or three on.
FUSED_TOLERANCE = 3e-3
OPERATORS = ("groupnorm_silu_quantize", "layernorm_quantize", "geglu_quantize", "quantize_int8")


@dataclass(frozen=True)
class Recipe:
    """How the layers of a block are quantized."""

    scheme: Scheme = Scheme.W4A8
    group_size: int | None = None
    is_static: bool = True
    backend: str = "reference"
    overrides: Mapping[str, Scheme] | None = None


RECIPES = {
    "static": Recipe(),
    "dynamic": Recipe(is_static=False),
    "groups": Recipe(group_size=64),
    "w8a8": Recipe(scheme=Scheme.W8A8),
}


class OracleLayer(nn.Module):
    """One quantized layer by its formula in float64."""

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        self.layer = [layer]

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer[0]
        is_conv = isinstance(layer, QuantizedConv2d)
        dim = 1 if is_conv else -1
        parts = []
        for i, part in enumerate(x.split(layer.layout.segments, dim=dim)):
            if layer.x_scale is not None:
                row = 0 if layer.step is None else int(layer.step.index)
                scale = layer.x_scale[i, row].double()
            else:
                absmax = part.abs().amax() if is_conv else part.abs().amax(-1, keepdim=True)
                scale = absmax.clamp_min(1e-8) / 127
            parts.append((part / scale).round().clamp(-127, 127) * scale)
        x, weight = torch.cat(parts, dim=dim), layer.float_weight().double()
        bias = None if layer.bias is None else layer.bias.double()
        if is_conv:
            s = layer.shape
            return functional.conv2d(x, weight, bias, s.stride, s.padding, s.dilation)
        return functional.linear(x, weight.flatten(1), bias)


class QuantizedPair:
    """One float block as a fused, an unfused and a float64 block of the same integers."""

    def __init__(self, fused: nn.Module, step: StepIndex | None) -> None:
        self.fused, self.step = fused, step
        self.report = fuse_blocks(fused)
        self.unfused = copy.deepcopy(fused)
        unfuse_blocks(self.unfused)
        self.oracle = _oracle(self.unfused)

    def set_bucket(self, bucket: int) -> None:
        """Choose the scales of a bucket, in all three."""
        for module in (self.fused, self.unfused):
            for layer in module.modules():
                if isinstance(layer, QuantizedLayer) and layer.step is not None:
                    layer.step.index.fill_(bucket)

    @torch.no_grad()
    def check(self, *args: Any, call: Callable[[nn.Module, Any], Tensor] | None = None) -> Tensor:
        """Run all three on the same arguments; the fused result is compared with the others."""
        run = call or (lambda module, given: module(*given))
        fused, unfused = run(self.fused, args), run(self.unfused, args)
        expected = run(self.oracle, [_double(a) for a in args])
        assert fused.shape == unfused.shape
        assert fused.dtype == unfused.dtype
        assert relative_error(fused, unfused) <= FUSED_TOLERANCE
        # the unfused block rounds between its layers in float32: the same bound, for the same flips
        assert relative_error(fused, expected) <= FUSED_TOLERANCE
        return fused


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((value.double() - expected.double()).norm() / expected.double().norm())


def make_pair(
    block: nn.Module,
    run: Callable[[nn.Module, float], Any],
    recipe: Recipe,
    segments: Mapping[str, tuple[int, int]] | None = None,
) -> QuantizedPair:
    """Quantize a float block; `run(block, gain)` calibrates it with inputs of that gain."""
    step = StepIndex(TimestepBuckets(BUCKETS, (True,) * BUCKETS))
    block = copy.deepcopy(block).eval().requires_grad_(False)
    segments, layers = segments or {}, quantizable_layers(block)
    tables = _record(block, layers, run, segments) if recipe.is_static else {}
    replacements: dict[str, nn.Module] = {}
    for name, layer in layers.items():
        scheme = (recipe.overrides or {}).get(name, recipe.scheme)
        if name.endswith("time_emb_proj"):
            scheme = Scheme.W8
        replacements[name] = quantized_layer(
            layer,
            scheme,
            x_scale=tables.get(name),
            step=step,
            segments=segments.get(name),
            group_size=recipe.group_size,
            weight_observer="absmax",
            backend=recipe.backend,
        )
    replace_layers(block, replacements)
    return QuantizedPair(block, step)


def _record(
    block: nn.Module,
    layers: Mapping[str, nn.Module],
    run: Callable[[nn.Module, float], Any],
    segments: Mapping[str, tuple[int, int]],
) -> dict[str, Tensor]:
    columns: dict[str, list[Tensor]] = {name: [] for name in layers}

    def watch(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            dim = 1 if isinstance(layer, nn.Conv2d) else -1
            parts = args[0].split(segments.get(name, args[0].shape[dim]), dim=dim)
            absmax = torch.stack([part.abs().max() for part in parts])
            columns[name].append((absmax / 127).clamp_min(1e-8))

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    with torch.no_grad():
        for bucket in range(BUCKETS):
            run(block, 0.5 + bucket)
    for handle in handles:
        handle.remove()
    return {name: torch.stack(parts, dim=1) for name, parts in columns.items() if parts}


def _oracle(unfused: nn.Module) -> nn.Module:
    oracle = copy.deepcopy(unfused)
    replacements: dict[str, nn.Module] = {}
    for (name, layer), kept in zip(oracle.named_modules(), list(unfused.modules()), strict=True):
        if isinstance(layer, QuantizedLayer):
            assert isinstance(kept, QuantizedLayer)
            replacements[name] = OracleLayer(kept)
        elif isinstance(layer, StorageLayer):
            replacements[name] = layer.dequantize()  # type: ignore[operator]
    replace_layers(oracle, replacements)
    return oracle.double()


def _double(value: Any) -> Any:
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if is_float else value


BACKENDS = ("reference", "cpu", "triton")
# Triton's interpreter takes seconds a block: two recipes reach every kernel
INTERPRETED_RECIPES = ("static", "dynamic")
RECIPES_OF_BACKENDS = [
    (name, backend)
    for backend in BACKENDS
    for name in RECIPES
    if backend != "triton" or name in INTERPRETED_RECIPES
]


def _require(backend: str) -> None:
    missing = [reason for op in OPERATORS if (reason := missing_operator(op, backend, "cpu"))]
    if missing:
        pytest.skip(missing[0])


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that has the fused quantizers."""
    _require(request.param)
    return str(request.param)


@pytest.fixture(params=RECIPES_OF_BACKENDS, ids="-".join)
def recipe(request: pytest.FixtureRequest) -> Recipe:
    """Every way to quantize, on every backend."""
    name, backend = request.param
    _require(backend)
    return Recipe(**{**vars(RECIPES[name]), "backend": backend})


@pytest.fixture(params=[case for case in RECIPES_OF_BACKENDS if case[1] != "triton"], ids="-".join)
def compiled_recipe(request: pytest.FixtureRequest) -> Recipe:
    """Without the interpreter, for whole models."""
    name, backend = request.param
    _require(backend)
    return Recipe(**{**vars(RECIPES[name]), "backend": backend})


@pytest.fixture
def quantize_block() -> Callable[..., QuantizedPair]:
    """`make_pair`."""
    return make_pair


@pytest.fixture
def make_recipe() -> type[Recipe]:
    """The class, for recipes of one test."""
    return Recipe
