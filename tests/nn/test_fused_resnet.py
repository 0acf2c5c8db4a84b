"""FusedResnetBlock2D against diffusers' forward of the same integers, and against float64."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ptq4adm.config import Scheme
from ptq4adm.nn.fuse import fuse_blocks, fusion_report
from ptq4adm.nn.fused_resnet import FusedResnetBlock2D

Quantize = Callable[..., Any]

SIZES = {
    "even": (2, 64, 64, 8, 6),
    "odd height, width 78": (1, 64, 128, 5, 78),
    "one pixel": (3, 96, 32, 1, 1),
    "ragged channels": (2, 72, 40, 7, 3),
}


def _block(channels: int = 64, out: int = 64, **options: Any) -> ResnetBlock2D:
    groups = 8 if channels % 32 or out % 32 else 32
    settings = {"temb_channels": 48, "groups": groups, "eps": 1e-5, **options}
    block = ResnetBlock2D(in_channels=channels, out_channels=out, **settings)
    for norm in (block.norm1, block.norm2):
        nn.init.normal_(norm.weight, 1.0, 0.3)
        nn.init.normal_(norm.bias, 0.0, 0.3)
    return block


def _run(channels: int) -> Callable[[nn.Module, float], Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = 2 * torch.randn(2, channels, 9, 7, generator=generator)
    temb = torch.randn(2, 48, generator=generator)
    return lambda block, gain: block(gain * x, gain * temb)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_it_equals_diffusers_and_float64(
    quantize_block: Quantize, recipe: Any, size: tuple[int, ...]
) -> None:
    batch, channels, out, height, width = size
    pair = quantize_block(_block(channels, out), _run(channels), recipe)
    assert type(pair.fused) is FusedResnetBlock2D
    x, temb = torch.randn(batch, channels, height, width), torch.randn(batch, 48)
    # interpreted kernels are slow
    for bucket in range(1 if recipe.backend == "triton" else 3):
        pair.set_bucket(bucket)
        y = pair.check(x, temb)
        assert y.is_contiguous(memory_format=torch.channels_last)


def test_buckets_matter(quantize_block: Quantize, make_recipe: Any) -> None:
    """Otherwise the test above would pass with any row of the tables."""
    pair = quantize_block(_block(), _run(64), make_recipe())
    results = []
    for bucket in range(3):
        pair.set_bucket(bucket)
        results.append(pair.fused(torch.ones(1, 64, 3, 3), torch.ones(1, 48)))
    assert not torch.equal(results[0], results[2])


def test_a_shortcut_over_a_skip_connection_has_two_scales(
    quantize_block: Quantize, recipe: Any
) -> None:
    segments = {"conv_shortcut": (64, 40)}
    block = _block(104, 64)
    x = torch.cat([torch.randn(2, 64, 5, 7), 30 * torch.randn(2, 40, 5, 7)], dim=1)
    temb = torch.randn(2, 48)
    pair = quantize_block(block, lambda b, gain: b(gain * x, temb), recipe, segments)
    assert pair.fused.conv_shortcut.layout.segments == (64, 40)
    pair.set_bucket(1)
    pair.check(x, temb)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_follows_the_inputs_dtype(
    quantize_block: Quantize, make_recipe: Any, backend: str, dtype: torch.dtype
) -> None:
    pair = quantize_block(_block(), _run(64), make_recipe(backend=backend))
    x, temb = torch.randn(2, 64, 5, 5), torch.randn(2, 48)
    expected = pair.fused(x, temb)
    y = pair.fused.to(dtype)(x.to(dtype), temb.to(dtype))
    assert y.dtype == dtype
    assert (y.float() - expected).norm() <= 0.03 * expected.norm()


def test_memory_formats_give_the_same_result(
    quantize_block: Quantize, make_recipe: Any, backend: str
) -> None:
    pair = quantize_block(_block(64, 128), _run(64), make_recipe(backend=backend))
    x, temb = torch.randn(2, 64, 5, 6), torch.randn(2, 48)
    last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(pair.fused(x, temb), pair.fused(last, temb), rtol=0, atol=1e-5)
    torch.testing.assert_close(pair.fused(x[:, :, ::2], temb), pair.unfused(x[:, :, ::2], temb))


def test_one_row_of_the_time_embedding_serves_the_batch(
    quantize_block: Quantize, make_recipe: Any, backend: str
) -> None:
    pair = quantize_block(_block(), _run(64), make_recipe(backend=backend))
    x, temb = torch.randn(3, 64, 4, 4), torch.randn(1, 48)
    pair.check(x, temb)
    with pytest.raises(RuntimeError, match="must match"):
        pair.fused(torch.randn(4, 64, 4, 4), torch.randn(2, 48))


def test_without_a_time_embedding(quantize_block: Quantize, make_recipe: Any, backend: str) -> None:
    x = torch.randn(2, 64, 5, 5)
    recipe = make_recipe(backend=backend)
    pair = quantize_block(_block(temb_channels=None), lambda b, g: b(g * x, None), recipe)
    pair.check(x, None)


def test_skip_time_act_and_groups_out(
    quantize_block: Quantize, make_recipe: Any, backend: str
) -> None:
    block = _block(64, 128, skip_time_act=True, groups_out=4)
    pair = quantize_block(block, _run(64), make_recipe(backend=backend))
    pair.check(torch.randn(2, 64, 5, 5), torch.randn(2, 48))


@pytest.mark.parametrize("name", ["conv1", "conv2"])
@pytest.mark.parametrize("scheme", [Scheme.FLOAT, Scheme.W8A8])
def test_mixed_schemes_in_one_block(
    quantize_block: Quantize, make_recipe: Any, backend: str, name: str, scheme: Scheme
) -> None:
    recipe = make_recipe(backend=backend, overrides={name: scheme})
    pair = quantize_block(_block(64, 128), _run(64), recipe)
    other = "conv2" if name == "conv1" else "conv1"
    fused = (other,) if scheme is Scheme.FLOAT else ("conv1", "conv2")
    assert pair.report.blocks[0].fused == fused
    pair.check(torch.randn(2, 64, 5, 5), torch.randn(2, 48))


UNFUSABLE = {
    "resamples": {"up": True},
    "resamples ": {"down": True},
    "time_embedding_norm": {"time_embedding_norm": "scale_shift"},
    "output_scale_factor": {"output_scale_factor": 2.0},
    "nonlinearity is Mish": {"non_linearity": "mish"},
}


@pytest.mark.parametrize("reason", UNFUSABLE)
def test_what_cannot_be_fused_stays_and_says_why(
    quantize_block: Quantize, make_recipe: Any, reason: str
) -> None:
    pair = quantize_block(_block(**UNFUSABLE[reason]), _run(64), make_recipe())
    assert type(pair.fused) is ResnetBlock2D
    row = next(row for row in pair.report.blocks if row.kind == "ResnetBlock2D")
    assert row.fused == ()
    assert reason.strip() in row.reasons["conv1"]
    assert reason.strip() in str(pair.report)
    x, temb = torch.randn(2, 64, 4, 4), torch.randn(2, 48)
    assert torch.equal(pair.fused(x, temb), pair.unfused(x, temb))


def test_dropout_in_training_is_not_lost(quantize_block: Quantize, make_recipe: Any) -> None:
    pair = quantize_block(_block(dropout=0.5), _run(64), make_recipe())
    x, temb = torch.randn(2, 64, 4, 4), torch.randn(2, 48)
    quiet = pair.check(x, temb)
    results = []
    for block in (pair.fused, pair.unfused):
        torch.manual_seed(3)
        results.append(block.train()(x, temb))
    assert torch.equal(*results)
    assert not torch.equal(results[0], quiet)


# --- children that change -----------------------------------------------------------------------


class Lora(nn.Module):
    """A low-rank branch beside a layer, as adapters put them."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.branch = nn.Conv2d(base.in_channels, base.out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.branch(x)


def _replace(block: Any) -> Callable[[], None]:
    kept = block.conv2
    block.conv2 = Lora(kept)
    return lambda: setattr(block, "conv2", kept)


def _hook(block: Any) -> Callable[[], None]:
    return block.norm2.register_forward_hook(lambda *a: 0.5 * a[2]).remove


def _pre_hook(block: Any) -> Callable[[], None]:
    return block.conv1.register_forward_pre_hook(lambda _, a: (0.5 * a[0],)).remove


def _patch(block: Any) -> Callable[[], None]:
    original = block.conv1.forward
    block.conv1.forward = lambda x: 2 * original(x)
    return lambda: delattr(block.conv1, "forward")


def _global_hook(block: Any) -> Callable[[], None]:
    def double(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        del args
        return 2 * output if module is block.norm1 else None

    return nn.modules.module.register_module_forward_hook(double).remove


CHANGES = {
    "child 'conv2' was replaced": _replace,
    "child 'norm2' has hooks": _hook,
    "child 'conv1' has hooks": _pre_hook,
    "forward of child 'conv1' was replaced": _patch,
    "hooks on all modules": _global_hook,
}


@pytest.mark.parametrize("message", CHANGES)
def test_a_changed_child_is_respected_and_said_once(
    quantize_block: Quantize, make_recipe: Any, caplog: pytest.LogCaptureFixture, message: str
) -> None:
    pair = quantize_block(_block(), _run(64), make_recipe())
    model = nn.ModuleDict({"mid": pair.fused})
    fuse_blocks(model)
    x, temb = torch.randn(2, 64, 4, 4), torch.randn(2, 48)
    before = pair.fused(x, temb)
    restore = CHANGES[message](pair.fused)
    changed = [pair.fused(x, temb) for _ in range(3)]
    expected = ResnetBlock2D.forward(pair.fused, x, temb)
    assert not torch.equal(expected, before)
    assert all(torch.equal(y, expected) for y in changed)
    said = [record.message for record in caplog.records if message in record.message]
    assert len(said) == 1
    assert said[0].startswith("block 'mid':")
    assert f"unfused: {pair.fused.fusion.find_change()}" in repr(pair.fused)
    assert message in fusion_report(model).blocks[0].reasons["conv2"]
    restore()
    assert torch.equal(pair.fused(x, temb), before)
    assert fusion_report(model).blocks[0].fused == ("conv1", "conv2")


def test_hooks_of_the_block_and_of_called_children_stay_in_use(
    quantize_block: Quantize, make_recipe: Any
) -> None:
    """The time projection and the shortcut are called as modules: watching them costs nothing."""
    pair = quantize_block(_block(64, 128), _run(64), make_recipe())
    seen = []
    for child in (pair.fused, pair.fused.time_emb_proj, pair.fused.conv_shortcut):
        child.register_forward_hook(lambda module, *_: seen.append(module))
    pair.fused(torch.randn(1, 64, 4, 4), torch.randn(1, 48))
    assert seen == [pair.fused.time_emb_proj, pair.fused.conv_shortcut, pair.fused]
    assert not pair.fused.fusion.is_broken()


# --- what it keeps ------------------------------------------------------------------------------


def test_it_is_still_the_diffusers_block(quantize_block: Quantize, make_recipe: Any) -> None:
    pair = quantize_block(_block(64, 128), _run(64), make_recipe())
    assert isinstance(pair.fused, ResnetBlock2D)
    assert list(pair.fused.state_dict()) == list(pair.unfused.state_dict())
    assert "fused: conv1, conv2" in repr(pair.fused)
    assert [n for n, _ in pair.fused.named_modules()] == [
        n for n, _ in pair.unfused.named_modules()
    ]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_fused_and_watches_its_own_children(
    quantize_block: Quantize, make_recipe: Any, duplicate: Callable[[nn.Module], Any]
) -> None:
    pair = quantize_block(_block(), _run(64), make_recipe())
    twin = duplicate(pair.fused)
    x, temb = torch.randn(2, 64, 4, 4), torch.randn(2, 48)
    assert type(twin) is FusedResnetBlock2D
    assert torch.equal(twin(x, temb), pair.fused(x, temb))
    twin.conv1.register_forward_pre_hook(lambda *_: None)
    assert twin.fusion.is_broken()
    assert not pair.fused.fusion.is_broken()


def test_the_report_of_a_block_that_nobody_fused(
    quantize_block: Quantize, make_recipe: Any
) -> None:
    pair = quantize_block(_block(), _run(64), make_recipe())
    (row,) = fusion_report(pair.unfused).blocks
    assert row.reasons["conv1"] == "fuse_blocks was not called"
    assert fusion_report(pair.fused).count() == {"all": 1, "some": 0, "none": 0}
    assert fusion_report(nn.Sequential(nn.Linear(2, 2))).blocks == ()


def test_it_compiles_into_one_graph(quantize_block: Quantize, make_recipe: Any) -> None:
    pair = quantize_block(_block(64, 128), _run(64), make_recipe())
    compiled = torch.compile(pair.fused, backend="eager", fullgraph=True)
    x, temb = torch.randn(2, 64, 4, 4), torch.randn(2, 48)
    with torch.no_grad():
        assert torch.equal(compiled(x, temb), pair.fused(x, temb))


class Trace(TorchDispatchMode):
    """Names of the operators that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_between_the_operators_nothing_is_computed_or_copied(
    quantize_block: Quantize, make_recipe: Any, backend: str
) -> None:
    pair = quantize_block(_block(), _run(64), make_recipe(backend=backend))
    x = torch.randn(2, 64, 5, 5).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), Trace() as trace:
        pair.fused.time_emb_proj = nn.Identity()  # not of the block's making
        pair.fused(x, torch.randn(2, 64))
    views = {"aten::permute", "aten::select.int", "aten::silu", "aten::randn"}
    assert [name for name in trace.names if name not in views] == [
        "ptq4adm::groupnorm_silu_quantize",
        "ptq4adm::w4a8_conv2d",
        "ptq4adm::groupnorm_silu_quantize",
        "ptq4adm::w4a8_conv2d",
    ]
