"""UNets of the latent-diffusion code against a forward of the original in plain torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from originals import unet as original
from originals.weights import random_weights
from torch import Tensor, nn

from ptq4adm.errors import CheckpointError, CheckpointShapeError
from ptq4adm.models import audioldm_files, openai_unet
from ptq4adm.models.openai_unet import PREFIX, load_unet, read_layout

TOKENS = original.UNetConfig(4, 4, 32, (1, 2), (1, 2), num_heads=8, context_dim=24)
VECTOR = original.UNetConfig(
    8, 8, 32, (1, 2, 3, 5), (8, 4, 2), num_head_channels=32, extra_film_condition_dim=16
)
DEEP = replace(TOKENS, transformer_depth=2, num_res_blocks=1, attention_resolutions=(2,))


def _heads(config: original.UNetConfig) -> tuple[int, ...]:
    return tuple(config.heads(config.model_channels * mult) for mult in config.channel_mult)


def _load(config: original.UNetConfig, weights: dict[str, Tensor], **others: Any) -> nn.Module:
    layout = read_layout(weights, "file")
    return load_unet(weights, layout.config(_heads(config), **others), "file")


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("size", [(10, 12), (10, 14), (10, 20)], ids=str)
@pytest.mark.parametrize("config", [TOKENS, DEEP], ids=["one", "two"])
@torch.no_grad()
def test_tokens(config: original.UNetConfig, size: tuple[int, int]) -> None:
    weights = random_weights(original.shapes(config), seed=0)
    x, context = torch.randn(2, 4, *size), torch.randn(2, 5, 24)
    expected = original.forward(weights, config, x, torch.tensor([37, 37]), context=context)
    got = _load(config, weights)(x, 37, context).sample
    assert _difference(got, expected) < 1e-5


@torch.no_grad()
def test_a_text_vector() -> None:
    weights = random_weights(original.shapes(VECTOR), seed=0)
    x, vector = torch.randn(2, 8, 24, 16), torch.randn(2, 16)
    expected = original.forward(weights, VECTOR, x, torch.tensor([981, 981]), y=vector)
    unet = _load(VECTOR, weights)
    got = unet(x, 981, encoder_hidden_states=None, class_labels=vector).sample
    assert _difference(got, expected) < 1e-5
    # the number of heads is no matter of taste: the same weights give something else
    layout = read_layout(weights, "file")
    eight = load_unet(weights, layout.config(8), "file")
    other = eight(x, 981, encoder_hidden_states=None, class_labels=vector).sample
    assert _difference(other, expected) > 1e-4


@pytest.mark.parametrize("config", [TOKENS, VECTOR, DEEP], ids=["tokens", "vector", "deep"])
def test_the_layout_is_read_from_names_and_shapes(config: original.UNetConfig) -> None:
    layout = read_layout(random_weights(original.shapes(config), seed=0), "file")
    assert layout == openai_unet.UNetLayout(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        channels=tuple(config.model_channels * mult for mult in config.channel_mult),
        layers=config.num_res_blocks,
        has_attention=tuple(
            2**i in config.attention_resolutions for i in range(len(config.channel_mult))
        ),
        depth=config.transformer_depth,
        context_dim=config.context_dim,
        film_dim=config.extra_film_condition_dim,
        is_linear=False,
        model_channels=config.model_channels,
    )


@pytest.mark.parametrize("config", [TOKENS, VECTOR, DEEP], ids=["tokens", "vector", "deep"])
def test_names_in_messages_are_those_that_diffusers_converts(config: original.UNetConfig) -> None:
    weights = random_weights(original.shapes(config), seed=0)
    layout = read_layout(weights, "file")
    converted = openai_unet._convert(
        {PREFIX + name: tensor for name, tensor in weights.items()}, layout.config(1)
    )
    assert len(converted) == len(weights)
    for name, tensor in converted.items():
        in_file = openai_unet.file_name(name, layout.layers, layout.has_attention)
        assert weights[in_file] is tensor


def test_published_sizes() -> None:
    """Real names and shapes without memory: they are those of the package's real UNets."""
    from ptq4adm.models import make_an_audio_unet, real_unet

    for config, unet, heads in (
        (original.MAKE_AN_AUDIO, make_an_audio_unet(device="meta"), 8),
        (original.AUDIOLDM_S, real_unet("audioldm-s", device="meta"), 8),
    ):
        with torch.device("meta"):
            weights = {n: torch.empty(shape) for n, shape in original.shapes(config).items()}
        ours: Any = load_unet(weights, read_layout(weights, "file").config(heads), "file")
        shapes = {name: tensor.shape for name, tensor in unet.state_dict().items()}
        assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == shapes
        for name in ("down_block_types", "up_block_types", "block_out_channels", "in_channels"):
            assert ours.config[name] == unet.config[name]


def test_original_heads() -> None:
    for channels, heads in ((128, (4, 8, 12, 20)), (192, (6, 12, 18, 30)), (256, (4, 8, 12, 20))):
        config = replace(original.AUDIOLDM_S, model_channels=channels)
        with torch.device("meta"):
            weights = {n: torch.empty(shape) for n, shape in original.shapes(config).items()}
        assert audioldm_files.original_heads(read_layout(weights, "file")) == heads


def test_weights_are_not_copied() -> None:
    weights = random_weights(original.shapes(TOKENS), seed=0)
    unet = _load(TOKENS, weights)
    addresses = {tensor.data_ptr() for tensor in weights.values()}
    assert all(parameter.data_ptr() in addresses for parameter in unet.parameters())


@pytest.mark.parametrize(
    "name",
    [
        "time_embed.2.weight",
        "input_blocks.1.1.transformer_blocks.0.attn2.to_v.weight",
        "input_blocks.3.0.op.bias",
        "middle_block.2.emb_layers.1.bias",
        "output_blocks.2.2.conv.bias",
        "output_blocks.5.0.skip_connection.weight",
        "out.0.bias",
    ],
)
def test_a_missing_tensor_is_named(name: str) -> None:
    weights = random_weights(original.shapes(TOKENS), seed=0)
    config = read_layout(weights, "file").config(8)
    del weights[name]
    with pytest.raises(CheckpointError, match=rf"file: lacks 1 tensors \('{PREFIX}{name}'\)"):
        load_unet(weights, config, "file")


def test_what_makes_up_the_layout_is_missed_by_name() -> None:
    weights = random_weights(original.shapes(TOKENS), seed=0)
    for name in ("input_blocks.0.0.weight", "input_blocks.2.0.in_layers.2.weight", "out.2.weight"):
        lacking = {n: tensor for n, tensor in weights.items() if n != name}
        with pytest.raises(CheckpointError, match=f"lacks {PREFIX}{name}"):
            read_layout(lacking, "file")
    with pytest.raises(CheckpointError, match="do not form levels of equal blocks"):
        read_layout({n: t for n, t in weights.items() if "input_blocks.2." not in n}, "file")


def test_unknown_tensors_are_named_and_counted() -> None:
    weights = random_weights(original.shapes(TOKENS), seed=0)
    config = read_layout(weights, "file").config(8)
    more = {f"label_emb.{i}.weight": torch.ones(1) for i in range(5)}
    with pytest.raises(CheckpointError, match=r"holds 5 unknown .*label_emb\.0.* and 2 more"):
        load_unet({**weights, **more}, config, "file")


def test_a_shape_that_contradicts_the_rest_is_named() -> None:
    weights = random_weights(original.shapes(TOKENS), seed=0)
    config = read_layout(weights, "file").config(8)
    name = "output_blocks.0.0.out_layers.3.weight"
    weights[name] = weights[name][:-1]
    with pytest.raises(CheckpointShapeError, match=rf"{PREFIX}{name} is \[63, 64, 3, 3\], needs"):
        load_unet(weights, config, "file")


def test_averaged_weights() -> None:
    weights = {PREFIX + "time_embed.0.weight": torch.ones(2)}
    averages = {"model_ema.diffusion_modeltime_embed0weight": torch.zeros(2)}
    assert openai_unet.has_averaged({**weights, **averages})
    assert not openai_unet.has_averaged(weights)
    found = openai_unet.averaged({**weights, **averages}, "file")
    assert list(found) == ["time_embed.0.weight"]
    assert not found["time_embed.0.weight"].any()
    with pytest.raises(CheckpointError, match="1 are missing, such as 'model_ema"):
        openai_unet.averaged(weights, "file")
