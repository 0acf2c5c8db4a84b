"""Adapters of PEFT on a packed UNet: they change its result, are trained, saved and removed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from tiny_audioldm2 import GPT, T5, tiny_audioldm2_unet
from torch import Tensor, nn

import ptq4adm
from ptq4adm import QuantConfig
from ptq4adm.errors import ConfigError, UnsupportedLayerError
from ptq4adm.nn import HalfLinear, W4A8Linear, W8Linear
from ptq4adm.packing.checkpoint import save_denoiser

Load = Callable[..., nn.Module]
Run = Callable[..., Tensor]
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture
def unet(load_packed: Load) -> nn.Module:
    return load_packed()


@pytest.fixture
def adapted(unet: nn.Module) -> nn.Module:
    unet.add_adapter(LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False))
    return unet


def _adapters(unet: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in unet.named_parameters() if "lora_" in name}


def test_an_adapter_changes_the_result_and_disabled_it_does_not(
    load_packed: Load, adapted: nn.Module, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    plain = run(load_packed())
    assert (run(adapted) - plain).norm() > 0.01 * plain.norm()
    # a wrapped child is seen: its block runs unfused, and says so
    assert "child 'attn1.to_q' was replaced: it runs unfused" in caplog.text
    adapted.disable_adapters()
    unfused = run(adapted)
    assert (unfused - plain).norm() <= 1e-2 * plain.norm()
    adapted.enable_adapters()
    adapted.unload_lora()
    assert torch.equal(run(adapted), plain)


def test_a_fresh_adapter_is_the_identity(unet: nn.Module, run: Run) -> None:
    unet.add_adapter(LoraConfig(r=4, target_modules=TARGETS))
    adapted = run(unet)
    unet.disable_adapters()
    assert torch.equal(run(unet), adapted)


def test_a_training_step_reaches_every_adapter(adapted: nn.Module) -> None:
    parameters = _adapters(adapted)
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    assert [n for n, p in adapted.named_parameters() if p.requires_grad] == list(parameters)
    optimizer = torch.optim.SGD(parameters.values(), lr=0.05)
    sample, labels, target = torch.randn(2, 8, 8, 8), torch.randn(2, 64), torch.randn(2, 8, 8, 8)
    losses = []
    for _ in range(3):
        result = adapted(sample, torch.tensor(300), None, class_labels=labels).sample
        loss = (result - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        silent = [n for n, p in parameters.items() if p.grad is None or not p.grad.abs().sum() > 0]
        assert silent == []
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


def test_an_adapter_is_saved_and_loaded(
    load_packed: Load, adapted: nn.Module, run: Run, tmp_path: Path
) -> None:
    expected = run(adapted)
    adapted.save_lora_adapter(tmp_path)
    fresh = load_packed()
    fresh.load_lora_adapter(str(tmp_path), prefix=None, weight_name=FILE, use_safetensors=True)
    assert torch.equal(run(fresh), expected)


def test_a_packed_weight_is_not_merged_in_silence(adapted: nn.Module, run: Run) -> None:
    expected = run(adapted)
    for safe in (False, True):
        with pytest.raises(UnsupportedLayerError, match="dequantize"):
            adapted.fuse_lora(safe_fusing=safe)
    assert torch.equal(run(adapted), expected)


def test_a_dequantized_one_is(unet: nn.Module, run: Run) -> None:
    unet.dequantize()
    unet.add_adapter(LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False))
    expected = run(unet)
    unet.fuse_lora()
    torch.testing.assert_close(run(unet), expected, rtol=1e-3, atol=1e-4)


def test_a_model_with_adapters_is_not_saved_under_wrong_names(
    adapted: nn.Module, tmp_path: Path
) -> None:
    for save in (adapted.save_pretrained, lambda path: save_denoiser(adapted, path)):
        with pytest.raises(ConfigError, match="save_lora_adapter"):
            save(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    with pytest.raises(ConfigError, match="has adapters"):
        adapted.dequantize()


def test_convolutions_are_refused_by_name(unet: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"W4A8Conv2d.* is not supported"):
        unet.add_adapter(LoraConfig(r=4, target_modules=["conv1"]))


def test_audioldm2_is_adapted_without_diffusers_methods() -> None:
    unet = tiny_audioldm2_unet().requires_grad_(False).eval()
    config = QuantConfig(activation="dynamic", weight_observer="absmax")
    ptq4adm.quantize(unet, config, progress=False)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_k"]), unet)
    inputs = (torch.randn(1, 8, 8, 8), torch.tensor(300), torch.randn(1, 8, GPT))
    unet(*inputs, encoder_hidden_states_1=torch.randn(1, 3, T5)).sample.sum().backward()
    # a fresh adapter is zero in its second matrix, through which the first has no gradient yet
    second = [p.grad for name, p in unet.named_parameters() if "lora_B" in name]
    assert second
    assert all(grad is not None and bool(grad.abs().sum() > 0) for grad in second)


@pytest.mark.parametrize("cls", [W4A8Linear, W8Linear, HalfLinear])
def test_a_replaced_linear_is_one_and_shows_its_weight(cls: type) -> None:
    linear = nn.Linear(64, 16)
    layer = cls.from_float(linear)
    assert isinstance(layer, nn.Linear)
    assert layer.weight.shape == (16, 64)
    assert (layer.weight - linear.weight).norm() < 0.2 * linear.weight.norm()
    assert "weight" not in dict(layer.named_parameters())
    assert type(layer.weight + 0) is Tensor


@pytest.mark.parametrize("cls", [W4A8Linear, W8Linear])
def test_its_decoded_weight_cannot_be_assigned(cls: type) -> None:
    layer = cls.from_float(nn.Linear(64, 16))
    before = layer.weight.clone()
    with pytest.raises(UnsupportedLayerError, match=r"got \[16, 64\]"):
        layer.weight.data += 1.0
    with pytest.raises((KeyError, AttributeError)):
        layer.weight = nn.Parameter(torch.zeros(16, 64))
    assert torch.equal(layer.weight, before)
