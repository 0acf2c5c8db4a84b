from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
from torch import nn

from ptq4adm.bench.shapes import KINDS, MODELS, LayerShape, model_layers, step_inputs
from ptq4adm.errors import ConfigError

# the layers that the family's rules keep out of the packed ones
KEPT = ("conv_in", "conv_out", "time_embedding.*", "class_embedding", "*.time_emb_proj")


@pytest.mark.parametrize("model", MODELS)
def test_counts_times_sizes_are_the_weights_of_the_model(model: str) -> None:
    # no layer of these UNets runs twice in a step
    unet = MODELS[model].build("meta")
    expected = sum(
        module.weight.numel()
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and not any(fnmatchcase(name, pattern) for pattern in KEPT)
    )
    layers = model_layers(model)
    assert sum(layer.count * layer.shape.N * layer.shape.K for layer in layers) == expected
    assert len({layer.shape for layer in layers}) == len(layers)


@pytest.mark.parametrize(
    ("model", "giga_macs"),
    # computed from the published configurations, batch 2, with the layers kept out: 91.5, 90.5
    [("audioldm-s", 91.5), ("make-an-audio", 90.5)],
)
def test_multiplications_of_a_step(model: str, giga_macs: float) -> None:
    macs = sum(layer.count * layer.shape.operations // 2 for layer in model_layers(model))
    assert macs / 1e9 == pytest.approx(giga_macs, rel=0.01)


@pytest.mark.parametrize(
    ("model", "shape", "count"),
    [
        ("audioldm-s", LayerShape("conv3x3", 2, 256, 16, 128, 128), 7),
        ("audioldm-s", LayerShape("conv3x3-stride2", 2, 64, 4, 384, 384), 1),
        ("audioldm-s", LayerShape("conv3x3-upsample", 2, 128, 8, 256, 256), 1),
        ("audioldm-s", LayerShape("conv1x1", 2, 128, 8, 256, 256), 10),
        ("audioldm-l", LayerShape("linear", 1, 2048, 1, 512, 512), 40),
        ("tango", LayerShape("linear", 1, 8192, 1, 320, 2560), 5),
        ("tango", LayerShape("linear", 1, 64, 1, 1024, 640), 10),
        ("make-an-audio", LayerShape("linear", 1, 154, 1, 1024, 640), 12),
    ],
    ids=str,
)
def test_known_layers(model: str, shape: LayerShape, count: int) -> None:
    found = {layer.shape: layer.count for layer in model_layers(model)}
    assert found[shape] == count


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        (LayerShape("conv3x3", 2, 5, 40, 640, 320), (400, 320, 5760)),
        (LayerShape("conv3x3-stride2", 2, 5, 7, 16, 8), (2 * 3 * 4, 8, 144)),
        (LayerShape("conv3x3-upsample", 2, 5, 7, 16, 8), (2 * 10 * 14, 8, 144)),
        (LayerShape("conv1x1", 2, 5, 7, 16, 8), (70, 8, 16)),
        (LayerShape("linear", 1, 77, 1, 16, 8), (77, 8, 16)),
    ],
    ids=str,
)
def test_sizes_of_the_product(shape: LayerShape, size: tuple[int, int, int]) -> None:
    assert (shape.M, shape.N, shape.K) == size
    assert shape.kind in KINDS


def test_an_unknown_model_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'audioldm-x' is unknown.*tango"):
        model_layers("audioldm-x")


def test_inputs_are_the_same_for_one_seed() -> None:
    first, conditioning = step_inputs("tango", seed=3)
    again, _ = step_inputs("tango", seed=3)
    other, _ = step_inputs("tango", seed=4)
    assert first.equal(again)
    assert not first.equal(other)
    assert conditioning["encoder_hidden_states"].shape == (2, 32, 1024)
