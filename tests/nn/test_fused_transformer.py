"""Fused transformer blocks against diffusers' forward of the same integers, and against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

from ptq4adm.config import Scheme
from ptq4adm.nn.fused_transformer import FusedBasicTransformerBlock

Quantize = Callable[..., Any]
WIDTH, TOKENS, TEXT = 80, 7, 48  # 80 is no multiple of 64: K is padded


def _vary_norms(module: nn.Module) -> Any:
    for norm in module.modules():
        if isinstance(norm, (nn.LayerNorm, nn.GroupNorm)) and norm.weight is not None:
            nn.init.normal_(norm.weight, 1.0, 0.3)
            nn.init.normal_(norm.bias, 0.0, 0.3)
    return module


def _block(**options: Any) -> BasicTransformerBlock:
    settings = {"num_attention_heads": 5, "attention_head_dim": 16, **options}
    return _vary_norms(BasicTransformerBlock(WIDTH, **settings))


def _audioldm_block() -> BasicTransformerBlock:
    """Two self-attentions: its cross attention gets no text."""
    return _block(cross_attention_dim=WIDTH)


def _tango_block(**options: Any) -> BasicTransformerBlock:
    return _block(cross_attention_dim=TEXT, upcast_attention=True, **options)


def _tokens(batch: int = 2, tokens: int = TOKENS) -> Tensor:
    return torch.randn(batch, tokens, WIDTH)


def _bias(*lengths: int, total: int = 9) -> Tensor:
    """[B, 1, L], as a UNet makes it of a padding mask."""
    keep = torch.arange(total)[None] < torch.tensor(lengths)[:, None]
    return ((1.0 - keep.float()) * -10000.0)[:, None]


def _self_run(block: nn.Module, gain: float) -> Tensor:
    x = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(7))
    return block(gain * x)


def _cross_run(block: nn.Module, gain: float) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(2, TOKENS, WIDTH, generator=generator)
    text = torch.randn(2, 9, TEXT, generator=generator)
    return block(gain * x, encoder_hidden_states=gain * text)


def test_audioldm_self_attention_twice(quantize_block: Quantize, recipe: Any) -> None:
    pair = quantize_block(_audioldm_block(), _self_run, recipe)
    assert type(pair.fused) is FusedBasicTransformerBlock
    assert pair.report.blocks[0].fused == ("attn1", "attn2", "ff")
    for bucket, tokens in enumerate((TOKENS, 1, 39)):
        pair.set_bucket(bucket)
        pair.check(_tokens(tokens=tokens))


@pytest.mark.parametrize("heads", [5, 10, 20])
def test_tango_cross_attention_with_a_mask(
    quantize_block: Quantize, recipe: Any, heads: int
) -> None:
    block = _tango_block(num_attention_heads=heads, attention_head_dim=WIDTH // heads)
    pair = quantize_block(block, _cross_run, recipe)

    def call(module: nn.Module, given: Any) -> Tensor:
        x, text, mask = given
        return module(x, encoder_hidden_states=text, encoder_attention_mask=mask)

    for bucket in range(3):
        pair.set_bucket(bucket)
        x, text = _tokens(), torch.randn(2, 9, TEXT)
        masked = pair.check(x, text, _bias(9, 4), call=call)
        free = pair.check(x, text, None, call=call)
        # the second sample's text ends after 4 tokens, the first one's does not
        torch.testing.assert_close(masked[0], free[0])
        assert not torch.allclose(masked[1], free[1], atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_follows_the_inputs_dtype(
    quantize_block: Quantize, make_recipe: Any, backend: str, dtype: torch.dtype
) -> None:
    pair = quantize_block(_tango_block(), _cross_run, make_recipe(backend=backend))
    x, text, mask = _tokens(), torch.randn(2, 9, TEXT), _bias(9, 4)
    names = ("encoder_hidden_states", "encoder_attention_mask")
    expected = pair.fused(x, **dict(zip(names, (text, mask), strict=True)))
    given = (value.to(dtype) for value in (text, mask))
    y = pair.fused.to(dtype)(x.to(dtype), **dict(zip(names, given, strict=True)))
    assert y.dtype == dtype
    assert (y.float() - expected).norm() <= 0.02 * expected.norm()


def test_a_mask_of_self_attention(quantize_block: Quantize, make_recipe: Any, backend: str) -> None:
    pair = quantize_block(_audioldm_block(), _self_run, make_recipe(backend=backend))
    pair.check(
        _tokens(), _bias(7, 3, total=7), call=lambda m, given: m(given[0], attention_mask=given[1])
    )


def test_a_boolean_mask_says_which_keys_to_keep(
    quantize_block: Quantize, make_recipe: Any, backend: str
) -> None:
    pair = quantize_block(_tango_block(), _cross_run, make_recipe(backend=backend))
    x, text, bias = _tokens(), torch.randn(2, 9, TEXT), _bias(9, 4)

    def call(module: nn.Module, given: Any) -> Tensor:
        x, text, mask = given
        return module(x, encoder_hidden_states=text, encoder_attention_mask=mask)

    y = pair.check(x, text, bias == 0, call=call)
    torch.testing.assert_close(y, call(pair.fused, (x, text, bias)), rtol=1e-4, atol=1e-4)


def test_a_mask_of_another_length_is_padded_as_diffusers_does(
    quantize_block: Quantize, make_recipe: Any, backend: str
) -> None:
    pair = quantize_block(_tango_block(), _cross_run, make_recipe(backend=backend))
    heads = pair.fused.attn2.heads
    repeated = _bias(9, 4).repeat_interleave(heads, dim=0)

    def call(module: nn.Module, given: Any) -> Tensor:
        x, text, mask = given
        return module(x, encoder_hidden_states=text, encoder_attention_mask=mask)

    pair.check(_tokens(), torch.randn(2, 9, TEXT), repeated, call=call)


@pytest.mark.parametrize(
    "options", [{"only_cross_attention": True}, {"double_self_attention": True}]
)
def test_other_arrangements_of_attention(
    quantize_block: Quantize, make_recipe: Any, backend: str, options: dict[str, bool]
) -> None:
    width = WIDTH if "double_self_attention" in options else TEXT
    text = torch.randn(2, 9, width)
    block = _block(cross_attention_dim=width, **options)
    pair = quantize_block(
        block,
        lambda b, gain: b(gain * _tokens(), encoder_hidden_states=gain * text),
        make_recipe(backend=backend),
    )
    pair.check(_tokens(), text, call=lambda m, g: m(g[0], encoder_hidden_states=g[1]))


def test_without_cross_attention(quantize_block: Quantize, make_recipe: Any, backend: str) -> None:
    pair = quantize_block(_block(), _self_run, make_recipe(backend=backend))
    assert pair.report.blocks[0].fused == ("attn1", "ff")
    pair.check(_tokens())


def test_queries_keys_and_values_of_unequal_tables_are_quantized_apart(
    quantize_block: Quantize, make_recipe: Any, backend: str
) -> None:
    pair = quantize_block(_audioldm_block(), _self_run, make_recipe(backend=backend))
    attention = pair.fused.attn1
    assert attention.to_q.quantizes_like(attention.to_k)
    for module in (pair.fused, pair.unfused):
        layer = module.attn1.to_k
        layer.set_activation_scale(layer.x_scale * 2.5)
    assert not attention.to_q.quantizes_like(attention.to_k)
    assert attention.to_q.quantizes_like(attention.to_v)
    pair.check(_tokens())


@pytest.mark.parametrize(
    ("overrides", "fused"),
    [
        ({"attn1.to_v": Scheme.FLOAT}, ("attn2", "ff")),
        ({"attn2.to_out.0": Scheme.W8}, ("attn1", "ff")),
        ({"ff.net.2": Scheme.FLOAT}, ("attn1", "attn2")),
        ({"attn1.to_k": Scheme.W8A8, "ff.net.0.proj": Scheme.W8A8}, ("attn1", "attn2", "ff")),
    ],
)
def test_mixed_schemes_in_one_block(
    quantize_block: Quantize,
    make_recipe: Any,
    backend: str,
    overrides: dict[str, Scheme],
    fused: tuple[str, ...],
) -> None:
    recipe = make_recipe(backend=backend, overrides=overrides)
    pair = quantize_block(_audioldm_block(), _self_run, recipe)
    (row,) = pair.report.blocks
    assert row.fused == fused
    for name in overrides:
        part, _, layer = name.partition(".")
        assert part in fused or layer in row.reasons[part]
    pair.check(_tokens())


@pytest.mark.parametrize("scheme", [Scheme.W8, Scheme.FLOAT])
def test_keys_and_values_of_a_text_may_have_float_activations(
    quantize_block: Quantize, make_recipe: Any, backend: str, scheme: Scheme
) -> None:
    overrides = {"attn2.to_k": scheme, "attn2.to_v": scheme}
    pair = quantize_block(
        _tango_block(), _cross_run, make_recipe(backend=backend, overrides=overrides)
    )
    assert pair.report.blocks[0].fused == ("attn1", "attn2", "ff")
    names = ("encoder_hidden_states", "encoder_attention_mask")

    def call(module: nn.Module, given: Any) -> Tensor:
        return module(given[0], **dict(zip(names, given[1:], strict=True)))

    pair.check(_tokens(), torch.randn(2, 9, TEXT), _bias(9, 4), call=call)
    # the same block without text attends to its image: then norm and projections are not fused
    square = quantize_block(
        _audioldm_block(), _self_run, make_recipe(backend=backend, overrides=overrides)
    )
    square.check(_tokens())
    # one of the two is not enough
    mixed = make_recipe(backend=backend, overrides={"attn2.to_k": scheme})
    report = quantize_block(_tango_block(), _cross_run, mixed).report
    assert report.blocks[0].fused == ("attn1", "ff")
    assert "to_k" in report.blocks[0].reasons["attn2"]


UNFUSABLE: dict[str, Callable[[], BasicTransformerBlock]] = {
    "norm_type": lambda: _block(norm_type="ada_norm_zero", num_embeds_ada_norm=10),
    "positional embeddings": lambda: _block(
        positional_embeddings="sinusoidal", num_positional_embeddings=64
    ),
    "gated": lambda: _block(cross_attention_dim=WIDTH, attention_type="gated"),
    "no weight and bias": lambda: _block(norm_elementwise_affine=False),
}


@pytest.mark.parametrize("reason", UNFUSABLE)
def test_blocks_that_cannot_be_fused_say_why(
    quantize_block: Quantize, make_recipe: Any, reason: str
) -> None:
    kwargs = {"timestep": torch.tensor([3, 3]), "class_labels": torch.tensor([1, 2])}
    pair = quantize_block(
        UNFUSABLE[reason](), lambda b, g: b(g * _tokens(), **kwargs), make_recipe()
    )
    assert type(pair.fused) is BasicTransformerBlock
    assert all(reason in why for why in pair.report.blocks[0].reasons.values())
    x = _tokens()
    assert torch.equal(pair.fused(x, **kwargs), pair.unfused(x, **kwargs))


def _set(name: str, value: Any) -> Callable[[Any], None]:
    return lambda block: setattr(block.attn1, name, value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda b: b.attn1.set_processor(AttnProcessor()), "processor is AttnProcessor"),
        (_set("group_norm", nn.Identity()), "has group_norm"),
        (_set("norm_q", nn.Identity()), "has norm_q"),
        (_set("norm_cross", nn.Identity()), "has norm_cross"),
        (_set("added_kv_proj_dim", 8), "has added_kv_proj_dim"),
        (_set("residual_connection", True), "own residual"),
        (_set("rescale_output_factor", 2.0), "own residual"),
    ],
)
def test_attentions_that_cannot_be_fused_stay_in_a_fused_block(
    quantize_block: Quantize, make_recipe: Any, change: Callable[[Any], None], reason: str
) -> None:
    block = _audioldm_block()
    change(block)
    pair = quantize_block(block, _self_run, make_recipe())
    (row,) = pair.report.blocks
    assert row.fused == ("attn2", "ff")
    assert reason in row.reasons["attn1"]
    pair.check(_tokens())


def test_another_activation_stays(quantize_block: Quantize, make_recipe: Any) -> None:
    pair = quantize_block(_block(activation_fn="gelu"), _self_run, make_recipe())
    assert "not a GEGLU" in pair.report.blocks[0].reasons["ff"]
    pair.check(_tokens())


# --- children and calls that change -------------------------------------------------------------


class Lora(nn.Module):
    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base_layer = base
        self.branch = nn.Linear(base.in_features, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.branch(x)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "child 'attn1.to_q' was replaced": lambda b: setattr(b.attn1, "to_q", Lora(b.attn1.to_q)),
    "child 'attn1.to_out.0' was replaced": lambda b: b.attn1.to_out.__setitem__(
        0, Lora(b.attn1.to_out[0])
    ),
    "child 'ff.net.0.proj' has hooks": lambda b: b.ff.net[0].proj.register_forward_hook(
        lambda *a: 2 * a[2]
    ),
    "child 'attn2' has hooks": lambda b: b.attn2.register_forward_hook(lambda *a: 2 * a[2]),
    "processor of child 'attn2' was replaced": lambda b: b.attn2.set_processor(Doubled()),
}


class Doubled(AttnProcessor2_0):
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().__call__(*args, **kwargs)


@pytest.mark.parametrize("message", CHANGES)
def test_a_changed_child_is_respected_and_said_once(
    quantize_block: Quantize, make_recipe: Any, caplog: pytest.LogCaptureFixture, message: str
) -> None:
    pair = quantize_block(_audioldm_block(), _self_run, make_recipe())
    x = _tokens()
    before = pair.fused(x)
    CHANGES[message](pair.fused)
    changed = [pair.fused(x), pair.fused(x)]
    expected = BasicTransformerBlock.forward(pair.fused, x)
    assert all(torch.equal(y, expected) for y in changed)
    assert not torch.allclose(expected, before)
    assert sum(message in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("kind", ["chunked", "kwargs"])
def test_unusual_calls_run_as_diffusers_does(
    quantize_block: Quantize, make_recipe: Any, kind: str
) -> None:
    pair = quantize_block(_audioldm_block(), _self_run, make_recipe())
    x = _tokens(tokens=8)
    kwargs: dict[str, Any] = {"cross_attention_kwargs": {"temb": None}} if kind == "kwargs" else {}
    if kind == "chunked":
        for block in (pair.fused, pair.unfused):
            block.set_chunk_feed_forward(4, dim=1)
    assert torch.equal(pair.fused(x, **kwargs), pair.unfused(x, **kwargs))


def test_a_table_that_was_loaded_later_is_seen(
    quantize_block: Quantize, make_recipe: Any, backend: str
) -> None:
    pair = quantize_block(_audioldm_block(), _self_run, make_recipe(backend=backend))
    x = _tokens()
    pair.fused(x)
    state = pair.fused.state_dict()
    state["attn1.to_v.x_scale"] = state["attn1.to_v.x_scale"] * 3
    for block in (pair.fused, pair.unfused):
        block.load_state_dict(state)
    pair.check(x)


def test_it_compiles_into_one_graph(quantize_block: Quantize, make_recipe: Any) -> None:
    pair = quantize_block(_audioldm_block(), _self_run, make_recipe())
    compiled = torch.compile(pair.fused, backend="eager", fullgraph=True)
    x = _tokens()
    with torch.no_grad():
        assert torch.equal(compiled(x), pair.fused(x))
