"""FusedTransformer2DModel: the norm and the projections around the blocks, tokens as NHWC rows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from ptq4adm.config import Scheme
from ptq4adm.nn import QuantizedLayer
from ptq4adm.nn.fused_transformer import FusedTransformer2DModel

Quantize = Callable[..., Any]
WIDTH, TEXT = 80, 48  # 80 is no multiple of 64: K is padded


def _vary_norms(module: nn.Module) -> Any:
    for norm in module.modules():
        if isinstance(norm, (nn.LayerNorm, nn.GroupNorm)) and norm.weight is not None:
            nn.init.normal_(norm.weight, 1.0, 0.3)
            nn.init.normal_(norm.bias, 0.0, 0.3)
    return module


def _model(*, linear: bool, **options: Any) -> Transformer2DModel:
    settings = {
        "num_attention_heads": 5,
        "attention_head_dim": 16,
        "in_channels": WIDTH,
        "norm_num_groups": 8,
        "cross_attention_dim": TEXT,
        "use_linear_projection": linear,
        **options,
    }
    return _vary_norms(Transformer2DModel(**settings))


def _image_run(block: nn.Module, gain: float) -> Any:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(2, WIDTH, 3, 5, generator=generator)
    text = torch.randn(2, 9, TEXT, generator=generator)
    return block(gain * x, encoder_hidden_states=gain * text)


def _sample(module: nn.Module, given: Any) -> Tensor:
    x, text, mask = given
    return module(x, encoder_hidden_states=text, encoder_attention_mask=mask).sample


@pytest.mark.parametrize("linear", [False, True], ids=["convolution", "linear"])
def test_the_whole_transformer(
    quantize_block: Quantize, compiled_recipe: Any, linear: bool
) -> None:
    pair = quantize_block(_model(linear=linear), _image_run, compiled_recipe)
    assert type(pair.fused) is FusedTransformer2DModel
    assert pair.report.count() == {"all": 2, "some": 0, "none": 0}
    for bucket, size in enumerate([(3, 5), (1, 1), (2, 78)]):
        pair.set_bucket(bucket)
        keep = torch.tensor([[1.0] * 9, [1.0] * 4 + [0.0] * 5])
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(2, WIDTH, *size).contiguous(memory_format=memory_format)
            y = pair.check(x, torch.randn(2, 9, TEXT), keep, call=_sample)
            assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("linear", [False, True], ids=["convolution", "linear"])
@pytest.mark.parametrize("name", ["proj_in", "proj_out"])
def test_a_float_projection_stays(
    quantize_block: Quantize, make_recipe: Any, backend: str, name: str, linear: bool
) -> None:
    recipe = make_recipe(backend=backend, overrides={name: Scheme.FLOAT})
    pair = quantize_block(_model(linear=linear), _image_run, recipe)
    assert "it is float" in pair.report.blocks[0].reasons[name]
    pair.check(torch.randn(2, WIDTH, 3, 5), torch.randn(2, 9, TEXT), None, call=_sample)


def test_a_hooked_projection_runs_unfused(
    quantize_block: Quantize, make_recipe: Any, caplog: pytest.LogCaptureFixture
) -> None:
    pair = quantize_block(_model(linear=True), _image_run, make_recipe())
    for module in (pair.fused, pair.unfused):
        module.proj_out.register_forward_hook(lambda *a: 3 * a[2])
    given = (torch.randn(2, WIDTH, 3, 5), torch.randn(2, 9, TEXT), None)
    y, expected = _sample(pair.fused, given), _sample(pair.unfused, given)
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-2)
    assert "child 'proj_out' has hooks" in caplog.text


def test_it_returns_what_diffusers_returns(quantize_block: Quantize, make_recipe: Any) -> None:
    pair = quantize_block(_model(linear=True), _image_run, make_recipe())
    x, text = torch.randn(2, WIDTH, 3, 5), torch.randn(2, 9, TEXT)
    (as_tuple,) = pair.fused(x, encoder_hidden_states=text, return_dict=False)
    assert torch.equal(as_tuple, pair.fused(x, encoder_hidden_states=text).sample)
    assert pair.fused.config == pair.unfused.config
    twin = copy.deepcopy(pair.fused)
    assert torch.equal(as_tuple, twin(x, encoder_hidden_states=text).sample)
    assert list(twin.state_dict()) == list(pair.unfused.state_dict())


def test_patches_are_not_fused(quantize_block: Quantize, make_recipe: Any) -> None:
    model = _model(
        linear=False,
        patch_size=1,
        sample_size=4,
        in_channels=16,
        norm_type="ada_norm",
        num_embeds_ada_norm=10,
    )
    pair = quantize_block(model, lambda *_: None, make_recipe(is_static=False))
    assert type(pair.fused) is Transformer2DModel
    assert "not an image" in pair.report.blocks[0].reasons["proj_in"]


def test_every_layer_of_the_blocks_takes_part(quantize_block: Quantize, make_recipe: Any) -> None:
    """No forward of a quantized layer is called: all their work is in the fused blocks."""
    pair = quantize_block(_model(linear=False), _image_run, make_recipe())
    layers = [m for m in pair.fused.modules() if isinstance(m, QuantizedLayer)]
    assert len(layers) == 12
    with pytest.MonkeyPatch.context() as patch:
        for cls in {type(layer) for layer in layers}:
            patch.setattr(cls, "forward", lambda *_: pytest.fail("a layer ran by itself"))
        _sample(pair.fused, (torch.randn(1, WIDTH, 3, 5), torch.randn(1, 9, TEXT), None))
