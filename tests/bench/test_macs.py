"""Multiply-adds by backend, against the formula, and those of a real UNet."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from ptq4adm.bench.macs import count_macs, describe_shares, mac_shares
from ptq4adm.bench.shapes import TIMESTEP, model_layers, model_spec, step_inputs
from ptq4adm.nn import QuantizedLayer, W4A8Conv2d, W4A8Linear, W8A8Linear

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...], int]] = {
    "linear": (nn.Linear(70, 32), (3, 5, 70), 15 * 70 * 32),
    "linear without bias": (nn.Linear(70, 32, bias=False), (3, 5, 70), 15 * 70 * 32),
    "conv": (nn.Conv2d(8, 16, 3, padding=1), (2, 8, 5, 4), 40 * 8 * 9 * 16),
    "conv, stride": (nn.Conv2d(8, 16, 3, stride=2), (2, 8, 7, 5), 2 * 3 * 2 * 8 * 9 * 16),
    "conv, groups": (nn.Conv2d(8, 16, 3, padding=1, groups=2), (2, 8, 5, 4), 40 * 4 * 9 * 16),
    "transposed": (nn.ConvTranspose2d(8, 16, 2, stride=2), (2, 8, 5, 4), 40 * 8 * 4 * 16),
}


@pytest.mark.parametrize(("layer", "size", "macs"), LAYERS.values(), ids=LAYERS)
def test_float_layers(layer: nn.Module, size: tuple[int, ...], macs: int) -> None:
    assert count_macs(lambda: layer(torch.randn(size))) == {"float": macs}


def test_packed_layers_by_backend() -> None:
    linear = W4A8Linear.from_float(nn.Linear(70, 32), backend="reference")
    conv = W4A8Conv2d.from_float(
        nn.Conv2d(72, 16, 3, padding=1), segments=(40, 32), backend="reference"
    )
    other: QuantizedLayer = W8A8Linear.from_float(nn.Linear(70, 32), backend="cpu")

    def step() -> None:
        linear(torch.randn(7, 70))
        conv(torch.randn(2, 72, 5, 4))
        other(torch.randn(3, 70))

    expected = {"reference": 7 * 70 * 32 + 40 * 72 * 9 * 16, "cpu": 3 * 70 * 32}
    assert count_macs(step) == expected
    other.use_float("a test")
    assert count_macs(step) == {"reference": expected["reference"], "float": expected["cpu"]}


def test_a_gated_product_counts_both_halves() -> None:
    layer = W4A8Linear.from_float(nn.Linear(64, 32), backend="reference")
    after = W4A8Linear.from_float(nn.Linear(16, 8), x_scale=torch.tensor(0.1), backend="reference")

    def step() -> None:
        x_q, scale = layer.quantize_input(torch.randn(7, 64), 0, "row")
        y = layer.matmul(x_q, scale, out_dtype=torch.float32, gated_for=after)
        assert y.shape == (7, 16)

    assert count_macs(step) == {"reference": 7 * 64 * 32}


def test_attention_and_products_of_batches_are_not_counted() -> None:
    q = torch.randn(2, 3, 5, 8)

    def step() -> None:
        functional.scaled_dot_product_attention(q, q, q)
        torch.bmm(q[0], q[1].transpose(1, 2))

    assert count_macs(step) == {}


@pytest.mark.parametrize("model", ["audioldm-s", "tango"])
def test_a_real_unet_has_its_shapes_and_the_layers_that_stay_float(model: str) -> None:
    unet = model_spec(model).build("meta")
    latents, conditioning = step_inputs(model, device="meta")
    timestep = torch.tensor(TIMESTEP, device="meta")
    macs = count_macs(lambda: unet(latents, timestep, **conditioning))
    packed = sum(layer.count * layer.shape.operations // 2 for layer in model_layers(model))
    assert packed < macs["float"] < 1.003 * packed


def test_shares_are_columns_and_words() -> None:
    shares: dict[str, Any] = mac_shares({"cuda": 3, "triton": 0, "float": 1})
    names = ["macs_cuda", "macs_triton", "macs_cpu", "macs_reference", "macs_float"]
    assert list(shares) == names
    assert [shares[name] for name in names] == [0.75, 0.0, 0.0, 0.0, 0.25]
    assert describe_shares(shares) == "cuda 75.0 %, float 25.0 %"
    read = {name: str(share) for name, share in shares.items()}
    assert describe_shares(read) == "cuda 75.0 %, float 25.0 %"
    assert mac_shares(None) == dict.fromkeys(names, "")
    assert describe_shares(mac_shares(None)) == describe_shares({}) == ""
