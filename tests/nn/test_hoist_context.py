"""What a prepared call depends on beside its arguments: buckets, autocast, hooks, copies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ptq4adm.config import Scheme
from ptq4adm.errors import UnsupportedLayerError
from ptq4adm.nn import QuantizedLayer, StepIndex, attach_step_hook
from ptq4adm.nn.forwards import HoistedForward, is_hoisted
from ptq4adm.nn.fuse import fuse_blocks
from ptq4adm.nn.hoist import _Key, _Run, prepared
from ptq4adm.nn.replace import check_hooks, quantized_layer, replace_layers
from ptq4adm.quant.buckets import TimestepBuckets

LABELS, TEXT = 24, 40
TIMESTEPS = torch.tensor([981, 500, 260, 1])  # one of each quarter
GAINS = torch.tensor([[1.0, 0.3, 0.1, 0.03]])  # scales of the buckets: some clip
TOLERANCE = 1e-5  # float32 sums in another order


def _unet(*, text: bool = False) -> UNet2DConditionModel:
    torch.manual_seed(1)
    options: dict[str, Any] = {"cross_attention_dim": TEXT}
    if not text:
        options = {
            "cross_attention_dim": (32, 64),
            "class_embed_type": "simple_projection",
            "projection_class_embeddings_input_dim": LABELS,
            "class_embeddings_concat": True,
        }
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        attention_head_dim=2,
        norm_num_groups=8,
        **options,
    )
    return unet.eval().requires_grad_(False)


def _static(unet: nn.Module, ends: tuple[str, ...], scheme: Scheme, table: Tensor) -> StepIndex:
    """Quantize some layers with a table of four buckets, and let calls choose the bucket."""
    step = StepIndex(TimestepBuckets(1000, (True,) * 4))
    replacements = {
        name: quantized_layer(
            layer,
            scheme,
            x_scale=table,
            step=step,
            segments=None,
            group_size=None,
            weight_observer="absmax",
            backend="reference",
        )
        for name, layer in unet.named_modules()
        if name.endswith(ends) and isinstance(layer, nn.Linear)
    }
    assert replacements
    replace_layers(unet, replacements)
    attach_step_hook(unet, step)
    return step


def _labels() -> dict[str, Any]:
    return {"encoder_hidden_states": None, "class_labels": torch.randn(2, LABELS)}


def _call(unet: nn.Module, x: Tensor, timestep: Any, **conditions: Any) -> Tensor:
    with torch.no_grad():
        return unet(x, timestep, **conditions).sample


def _error(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


# --- calibration buckets ------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [Scheme.W4A8, Scheme.W8A8])
@pytest.mark.parametrize(
    "layers", [("time_emb_proj",), ("time_embedding.linear_2",), ("class_embedding",)]
)
def test_every_step_has_the_scales_of_its_own_bucket(
    scheme: Scheme, layers: tuple[str, ...]
) -> None:
    unet, conditions, x = _unet(), _labels(), torch.randn(2, 4, 6, 8)
    step = _static(unet, layers, scheme, 0.02 * GAINS)
    plain = [_call(unet, x, t, **conditions) for t in TIMESTEPS]
    assert _error(plain[0], _call(unet, x, 1, **conditions)) > 1e-3  # the buckets do matter
    for entered in range(4):
        step.index.fill_(entered)
        with prepared(unet, TIMESTEPS, **conditions):
            assert int(step.index) == entered
            kept = [_call(unet, x, t, **conditions) for t in TIMESTEPS]
        for y, expected in zip(kept, plain, strict=True):
            assert _error(y, expected) <= TOLERANCE


@pytest.mark.parametrize("is_equal", [True, False], ids=["equal columns", "other columns"])
def test_keys_and_values_are_kept_only_if_all_buckets_agree(is_equal: bool) -> None:
    unet, x = _unet(text=True), torch.randn(2, 4, 6, 8)
    text: Any = {"encoder_hidden_states": torch.randn(2, 5, TEXT)}
    ends = ("attn2.to_k", "attn2.to_v")
    table = torch.full((1, 4), 0.02) if is_equal else 0.02 * GAINS
    _static(unet, ends, Scheme.W4A8, table)
    plain = [_call(unet, x, t, **text) for t in TIMESTEPS]
    layers = [m for n, m in unet.named_modules() if n.endswith(ends)]
    assert layers
    with prepared(unet, TIMESTEPS, **text):
        assert [is_hoisted(layer) for layer in layers] == [is_equal] * len(layers)
        kept = [_call(unet, x, t, **text) for t in TIMESTEPS]
    for y, expected in zip(kept, plain, strict=True):
        assert _error(y, expected) <= TOLERANCE


# --- the mode of the call -----------------------------------------------------------------------


@pytest.mark.parametrize("outside", [True, False], ids=["prepared outside", "prepared inside"])
def test_another_autocast_is_computed(outside: bool) -> None:
    unet, conditions, x = _unet(), _labels(), torch.randn(2, 4, 6, 8)

    def cast(enabled: bool) -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)

    with cast(outside):
        plain = _call(unet, x, 500, **conditions)
    with cast(not outside), prepared(unet, TIMESTEPS, **conditions), cast(outside):
        assert torch.equal(_call(unet, x, 500, **conditions), plain)


@pytest.mark.parametrize("inside", [True, False], ids=["hooked inside", "hooked before"])
def test_hooks_on_all_modules_see_every_call(inside: bool) -> None:
    unet, conditions, x = _unet(), _labels(), torch.randn(2, 4, 6, 8)
    seen: list[nn.Module] = []
    with ExitStack() as stack:
        if inside:
            stack.enter_context(prepared(unet, TIMESTEPS, **conditions))
        handle = register_module_forward_pre_hook(lambda module, _: seen.append(module))
        stack.callback(handle.remove)
        if not inside:
            stack.enter_context(prepared(unet, TIMESTEPS, **conditions))
            assert not any(map(is_hoisted, unet.modules()))
        assert seen == []  # nothing is called beside
        _call(unet, x, 500, **conditions)
    assert sum(module is unet.time_embedding.linear_1 for module in seen) == 1


def test_a_module_with_a_backward_hook_is_called_as_ever() -> None:
    unet = _unet()
    watched = next(m for n, m in unet.named_modules() if n.endswith("time_emb_proj"))
    watched.register_full_backward_hook(lambda *_: None)
    with prepared(unet, TIMESTEPS, **_labels()):
        assert not is_hoisted(watched)
        assert is_hoisted(unet.time_embedding)


def test_an_inference_tensor_off_the_cpu_matches_nothing() -> None:
    plain = torch.empty(2, 3, device="meta")
    with torch.inference_mode():
        inner = torch.empty(2, 3, device="meta")
    assert not _Key(inner).matches(inner)
    assert not _Key(plain).matches(inner)
    assert not _Key(inner).matches(plain)
    key = _Key(plain)
    assert key.matches(plain)
    plain.add_(1)
    assert not key.matches(plain)


# --- copies -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_prepared_model_is_not_prepared(make: Callable[[Any], Any]) -> None:
    unet, conditions, x = _unet(), _labels(), torch.randn(2, 4, 6, 8)
    with prepared(unet, TIMESTEPS, **conditions):
        twin, other = make(unet), make(unet)
        assert not any(map(is_hoisted, twin.modules()))
        check_hooks(dict(twin.time_embedding.named_modules()))
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(0.5)
        y = _call(twin, x, 500, **conditions)
        assert not torch.equal(y, _call(unet, x, 500, **conditions))
    assert not any("forward" in m.__dict__ for m in twin.modules())
    assert torch.equal(y, _call(twin, x, 500, **conditions))
    # and can be prepared by itself, called before or not
    for model in (twin, other):
        plain = _call(model, x, 500, **conditions)
        with prepared(model, TIMESTEPS, **conditions):
            assert is_hoisted(model.time_embedding)
            assert _error(_call(model, x, 500, **conditions), plain) <= TOLERANCE
        assert not any(type(m.__dict__.get("forward")) is HoistedForward for m in model.modules())


def test_a_hoisted_layer_is_not_replaced() -> None:
    unet = _unet()
    layers = {"x": unet.time_embedding}
    with prepared(unet, TIMESTEPS, **_labels()):
        with pytest.raises(UnsupportedLayerError, match="replaced forward"):
            check_hooks(layers)
    check_hooks(layers)


def test_fused_blocks_use_what_was_kept_of_static_layers() -> None:
    """A table of equal columns is constant, fused or not."""
    unet, x = _unet(text=True), torch.randn(2, 4, 6, 8)
    text: Any = {"encoder_hidden_states": torch.randn(2, 5, TEXT)}
    ends = ("to_q", "to_k", "to_v", "to_out.0")
    _static(unet, ends, Scheme.W4A8, torch.full((1, 4), 0.03))
    fuse_blocks(unet)
    plain = _call(unet, x, 500, **text)
    keys = [m.to_k for n, m in unet.named_modules() if n.endswith("attn2")]
    assert all(isinstance(key, QuantizedLayer) for key in keys)
    with prepared(unet, TIMESTEPS, **text), pytest.MonkeyPatch.context() as patch:
        original = QuantizedLayer.quantize_input

        def refuse(self: Any, *args: Any) -> Any:
            assert all(self is not key for key in keys), "a kept result was computed again"
            return original(self, *args)

        patch.setattr(QuantizedLayer, "quantize_input", refuse)
        assert _error(_call(unet, x, 500, **text), plain) <= TOLERANCE


def test_steps_on_a_device_are_known_by_their_place() -> None:
    run = _Run(torch.arange(4.0), None, {}, torch.float32)
    numbers = torch.empty(8, device="meta")
    run.timesteps, run.version = numbers[1::2], numbers._version
    assert [run._row(step) for step in run.timesteps] == [0, 1, 2, 3]
    assert run._row(numbers[2]) is None  # between two of them
    assert run._row(numbers[0]) is None
    assert run._row(torch.empty(1, dtype=torch.int64, device="meta")[0]) is None
    step = run.timesteps[2]
    numbers.fill_(1.0)  # the rows no longer say what the tensor holds
    assert run._row(step) is None
