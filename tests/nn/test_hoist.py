"""Constant work before the loop: the same answers, and never a stale one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from ptq4adm import QuantConfig, quantize
from ptq4adm.errors import ConfigError, ShapeError, UnsupportedModelError
from ptq4adm.nn import W8Linear
from ptq4adm.nn.hoist import HoistedForward, prepared

LABELS, TEXT = 24, 40
TIMESTEPS = torch.tensor([981, 500, 20, 1])
# tables are products of other shapes than those of single calls: float32 sums in another order
TABLE_TOLERANCE = 1e-5
# a quantizer after a table may take the neighbouring integer, and in these random models one such
# flip spreads: inputs times 1 + 1e-6 move the result of the plain call by up to 3e-2
FLIP_TOLERANCE = 5e-2
RESNETS = 8


def _unet(*, text: bool = False, **options: Any) -> UNet2DConditionModel:
    torch.manual_seed(1)
    settings: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
        "cross_attention_dim": TEXT if text else (32, 64),
        **options,
    }
    return UNet2DConditionModel(**settings).eval().requires_grad_(False)


def _audioldm(**options: Any) -> UNet2DConditionModel:
    return _unet(
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=LABELS,
        **{"class_embeddings_concat": True, **options},
    )


def _quantized(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    config = QuantConfig(activation="dynamic", weight_observer="absmax", backend="reference")
    quantize(unet, config, progress=False)
    return unet


MODELS = {
    "audioldm": _audioldm,
    "class embedding added": lambda: _audioldm(class_embeddings_concat=False),
    "time act": lambda: _audioldm(time_embedding_act_fn="silu", resnet_skip_time_act=True),
    "scale and shift": lambda: _audioldm(resnet_time_scale_shift="scale_shift"),
    "tango": lambda: _unet(text=True, use_linear_projection=True),
    "audioldm w4a8": lambda: _quantized(_audioldm()),
    "tango w4a8": lambda: _quantized(_unet(text=True, use_linear_projection=True)),
    "time projections in w4a8": lambda: _w4a8_times(),
}


def _w4a8_times() -> UNet2DConditionModel:
    unet = _audioldm()
    config = QuantConfig(
        activation="dynamic",
        weight_observer="absmax",
        backend="reference",
        overrides={"*.time_emb_proj": "w4a8"},
    )
    quantize(unet, config, progress=False)
    return unet


def _conditions(unet: UNet2DConditionModel, batch: int = 2) -> dict[str, Tensor | None]:
    has_text = isinstance(unet.config.cross_attention_dim, int)
    return {
        "encoder_hidden_states": torch.randn(batch, 5, TEXT) if has_text else None,
        "class_labels": None if unet.class_embedding is None else torch.randn(batch, LABELS),
    }


def _call(unet: nn.Module, x: Tensor, timestep: Any, **conditions: Any) -> Tensor:
    with torch.no_grad():
        return unet(x, timestep, **conditions).sample


def _error(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


def _projections(unet: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in unet.named_modules() if n.endswith("time_emb_proj")}


@pytest.fixture(params=list(MODELS))
def unet(request: pytest.FixtureRequest) -> UNet2DConditionModel:
    return MODELS[request.param]()


def test_every_prepared_call_agrees_with_the_plain_one(unet: UNet2DConditionModel) -> None:
    conditions, x = _conditions(unet), torch.randn(2, 4, 6, 8)
    plain = [_call(unet, x, t, **conditions) for t in TIMESTEPS]
    with prepared(unet, TIMESTEPS, **conditions):
        kept = [_call(unet, x, t, **conditions) for t in TIMESTEPS]
    is_quantized = any(isinstance(m, W8Linear) for m in unet.modules())
    for y, expected in zip(kept, plain, strict=True):
        assert _error(y, expected) <= (FLIP_TOLERANCE if is_quantized else TABLE_TOLERANCE)


def test_tables_agree_with_the_projections(unet: UNet2DConditionModel) -> None:
    """Split or not, within rounding of float32; the quantizers after them are left out."""
    conditions, x = _conditions(unet), torch.randn(2, 4, 6, 8)
    outputs: dict[str, list[Tensor]] = {}

    def run() -> dict[str, list[Tensor]]:
        outputs.clear()
        handles = [
            m.register_forward_hook(lambda *a, n=n: outputs.setdefault(n, []).append(a[2]))
            for n, m in _projections(unet).items()
        ]
        for t in TIMESTEPS:
            _call(unet, x, t, **conditions)
        for handle in handles:
            handle.remove()
        return dict(outputs)

    plain = run()
    with prepared(unet, TIMESTEPS, **conditions):
        assert all(isinstance(m.forward, HoistedForward) for m in _projections(unet).values())
        kept = run()
    assert len(plain) == len(kept) == RESNETS
    for name, values in plain.items():
        for y, expected in zip(kept[name], values, strict=True):
            assert y.shape == expected.shape
            assert _error(y, expected) <= TABLE_TOLERANCE


@pytest.mark.parametrize("model", ["tango", "tango w4a8"])
def test_keys_and_values_are_those_of_the_plain_call(model: str) -> None:
    """Same input, same shape: the same bits."""
    unet = MODELS[model]()
    conditions, x = _conditions(unet), torch.randn(2, 4, 6, 8)
    times: Any = {"encoder_hidden_states": conditions["encoder_hidden_states"]}
    plain = _call(unet, x, 7, **conditions)
    layers = [
        layer
        for name, m in unet.named_modules()
        if name.endswith("attn2")
        for layer in (m.to_k, m.to_v)
    ]
    # no table for timestep 7, so only the text is kept
    with prepared(unet, TIMESTEPS, **times), pytest.MonkeyPatch.context() as patch:
        for cls in {type(layer) for layer in layers}:
            for method in {"forward", "matmul"} & set(dir(cls)):
                patch.setattr(cls, method, _refuse(layers, getattr(cls, method)))
        assert torch.equal(_call(unet, x, 7, **conditions), plain)


def _refuse(layers: list[nn.Module], original: Any = nn.Linear.forward) -> Any:
    """A method that fails for some layers and is the original for the others."""

    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        assert all(self is not layer for layer in layers), "a constant was computed again"
        return original(self, *args, **kwargs)

    return method


def test_nothing_constant_is_computed_in_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = _quantized(_audioldm())
    conditions, x = _conditions(unet), torch.randn(2, 4, 6, 8)
    calls: list[nn.Module] = []
    original = W8Linear.forward
    monkeypatch.setattr(W8Linear, "forward", lambda s, x: calls.append(s) or original(s, x))
    with prepared(unet, TIMESTEPS, **conditions):
        calls.clear()
        for t in TIMESTEPS:
            _call(unet, x, t, **conditions)
    assert calls == []
    _call(unet, x, TIMESTEPS[0], **conditions)
    assert len(calls) == RESNETS + 2 + 1  # and the time embedding, the class embedding


# --- never a stale answer -----------------------------------------------------------------------


def _another_text(conditions: dict[str, Any]) -> dict[str, Any]:
    return {k: None if v is None else v + 1 for k, v in conditions.items()}


@pytest.mark.parametrize("model", ["audioldm", "tango", "audioldm w4a8"])
def test_what_was_not_prepared_is_computed(model: str) -> None:
    unet = MODELS[model]()
    conditions = _conditions(unet)
    larger = {k: None if v is None else torch.cat([v, v[:1]]) for k, v in conditions.items()}
    x = torch.randn(2, 4, 6, 8)
    calls = {
        "another timestep": (x, 77, conditions),
        "another condition": (x, 500, _another_text(conditions)),
        "another batch": (torch.randn(3, 4, 6, 8), 500, larger),
        "a timestep a sample": (x, torch.tensor([500, 20]), conditions),
    }
    plain = {name: _call(unet, s, t, **c) for name, (s, t, c) in calls.items()}
    with prepared(unet, TIMESTEPS, **conditions):
        for name, (s, t, c) in calls.items():
            y = _call(unet, s, t, **c)
            # without class labels the time tables hold for every text and batch
            may_use_tables = model == "tango" and name in ("another condition", "another batch")
            if may_use_tables:
                assert _error(y, plain[name]) <= TABLE_TOLERANCE, name
            else:
                assert torch.equal(y, plain[name]), name


@pytest.mark.parametrize("model", ["audioldm", "tango"])
def test_a_condition_that_is_changed_in_place_is_computed(model: str) -> None:
    unet = MODELS[model]()
    conditions, x = _conditions(unet), torch.randn(2, 4, 6, 8)
    with prepared(unet, TIMESTEPS, **conditions):
        for value in conditions.values():
            if value is not None:
                value.mul_(-2)
        y = _call(unet, x, 500, **conditions)
    assert _error(y, _call(unet, x, 500, **conditions)) <= TABLE_TOLERANCE


@pytest.mark.parametrize("timestep", [500, 500.0, torch.tensor([500]), torch.tensor([500, 500])])
def test_equal_values_in_other_objects_are_recognized(
    timestep: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = _audioldm()
    conditions, x = _conditions(unet), torch.randn(2, 4, 6, 8)
    copies = {k: None if v is None else v.clone() for k, v in conditions.items()}
    with prepared(unet, TIMESTEPS, **conditions):
        monkeypatch.setattr(nn.Linear, "forward", _refuse(list(_projections(unet).values())))
        _call(unet, x, timestep, **copies)
        with torch.no_grad():  # positional, as some pipelines call
            unet(x, timestep, None, copies["class_labels"])


def test_a_timestep_condition_is_computed() -> None:
    unet = _audioldm(time_cond_proj_dim=6)
    conditions, x, cond = _conditions(unet), torch.randn(2, 4, 6, 8), torch.randn(2, 6)
    plain = _call(unet, x, 500, timestep_cond=cond, **conditions)
    with prepared(unet, TIMESTEPS, **conditions):
        assert torch.equal(_call(unet, x, 500, timestep_cond=cond, **conditions), plain)


def test_gradients_are_not_lost() -> None:
    unet = _audioldm().requires_grad_(True)
    conditions, x = _conditions(unet), torch.randn(2, 4, 6, 8)
    with prepared(unet, TIMESTEPS, **conditions):
        unet(x, 500, **conditions).sample.sum().backward()
    assert all(m.weight.grad is not None for m in _projections(unet).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    unet = _audioldm().to(dtype)
    x = torch.randn(2, 4, 6, 8, dtype=dtype)
    labels = torch.randn(2, LABELS, dtype=dtype)
    conditions: Any = {"encoder_hidden_states": None, "class_labels": labels}
    plain = [_call(unet, x, t, **conditions) for t in TIMESTEPS]
    with prepared(unet, TIMESTEPS, **conditions):
        kept = [_call(unet, x, t, **conditions) for t in TIMESTEPS]
    for y, expected in zip(kept, plain, strict=True):
        assert y.dtype == dtype
        assert _error(y.double(), expected.double()) <= (0.02 if dtype == torch.bfloat16 else 1e-10)


# --- the room it leaves -------------------------------------------------------------------------


def _traces(unet: nn.Module) -> list[str]:
    left = [n for n, m in unet.named_modules() if "forward" in m.__dict__]
    return left + [str(h) for h in (*unet._forward_hooks, *unet._forward_pre_hooks)]


def test_nothing_is_left_behind_even_after_an_error() -> None:
    unet = _audioldm()
    conditions = _conditions(unet)
    with prepared(unet, TIMESTEPS, **conditions):
        assert _traces(unet)
    assert not _traces(unet)
    with pytest.raises(ZeroDivisionError), prepared(unet, TIMESTEPS, **conditions):
        raise ZeroDivisionError
    assert not _traces(unet)
    with pytest.raises(RuntimeError), prepared(unet, TIMESTEPS, class_labels=torch.randn(2, 3)):
        pytest.fail("labels of another width were prepared")
    assert not _traces(unet)


def test_a_call_that_fails_does_not_leave_its_row_in_use() -> None:
    unet = _audioldm()
    conditions, x = _conditions(unet), torch.randn(2, 4, 6, 8)
    (name, projection), *_ = _projections(unet).items()
    with prepared(unet, TIMESTEPS, **conditions):
        with pytest.raises(RuntimeError):
            _call(unet, x[:, :2], 500, **conditions)
        temb = torch.randn(2, projection.in_features)
        expected = nn.functional.linear(temb, projection.weight, projection.bias)
        assert torch.equal(projection(temb), expected), name


def test_watched_and_patched_modules_are_called_as_ever() -> None:
    unet = _audioldm()
    conditions, x = _conditions(unet), torch.randn(2, 4, 6, 8)
    watched, patched, *_ = _projections(unet).values()
    seen: list[Tensor] = []
    watched.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    original = patched.forward
    patched.forward = lambda x: 2 * original(x)
    plain = _call(unet, x, 500, **conditions)
    with prepared(unet, TIMESTEPS, **conditions):
        assert _error(_call(unet, x, 500, **conditions), plain) <= TABLE_TOLERANCE
    assert len(seen) == 2
    assert patched.__dict__["forward"] is not original


def test_a_watched_embedding_keeps_all_its_calls() -> None:
    """Calibration watches every linear: nothing may be left out, and nothing called beside."""
    unet = _audioldm()
    conditions, x = _conditions(unet), torch.randn(2, 4, 6, 8)
    seen: list[int] = []
    unet.time_embedding.linear_1.register_forward_pre_hook(
        lambda _, args: seen.append(len(args[0]))
    )
    with prepared(unet, TIMESTEPS, **conditions):
        assert seen == []
        _call(unet, x, 500, **conditions)
    assert seen == [2]


def test_refusals() -> None:
    unet = _audioldm()
    conditions = _conditions(unet)
    with prepared(unet, TIMESTEPS, **conditions), pytest.raises(ConfigError, match="already"):
        prepared(unet, TIMESTEPS, **conditions).__enter__()
    with pytest.raises(ShapeError, match=r"needs \[T\]"):
        prepared(unet, torch.tensor(5), **conditions).__enter__()
    other = UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    with pytest.raises(UnsupportedModelError, match="UNet2DModel"):
        prepared(other, TIMESTEPS).__enter__()
