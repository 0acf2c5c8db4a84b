"""Balancing changes ranges, and no output."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rounding_inputs import record_inputs
from torch import Tensor, nn

import ptq4adm
from ptq4adm import TextToAudioPipeline
from ptq4adm.balancing import KINDS, balance, find_links
from ptq4adm.calibration import ChosenInputs
from ptq4adm.errors import CalibrationMismatchError, ConfigError
from ptq4adm.rounding import Replay


@pytest.fixture(scope="module")
def inputs(
    float_pipe: TextToAudioPipeline, tmp_path_factory: pytest.TempPathFactory
) -> ChosenInputs:
    folder = tmp_path_factory.mktemp("inputs")
    _, path = record_inputs(float_pipe, folder, prompts=["a dog barks"], size=2)
    return ChosenInputs.load(path)


def outputs(unet: nn.Module, inputs: ChosenInputs) -> Tensor:
    replay = Replay(inputs)
    with torch.no_grad():
        return torch.cat([replay.call(unet, batch) for batch in replay.batches()])


def spread(unet: nn.Module, inputs: ChosenInputs, name: str) -> float:
    """Largest over smallest channel range of a layer's input."""
    found: list[Tensor] = []
    layer = unet.get_submodule(name)
    dims = (0, 2, 3) if isinstance(layer, nn.Conv2d) else (0, 1)
    handle = layer.register_forward_pre_hook(lambda _, args: found.append(args[0].abs().amax(dims)))
    outputs(unet, inputs)
    handle.remove()
    ranges = torch.stack(found).amax(0)
    return float(ranges.max() / ranges.min())


def unbalance(unet: nn.Module) -> None:
    """Norms of channels of very different sizes, as trained models have them."""
    with torch.no_grad():
        for module in unet.modules():
            if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
                module.weight.mul_(torch.exp(torch.randn(len(module.weight))))
                module.bias.add_(0.1 * torch.randn(len(module.bias)))


@pytest.mark.parametrize(
    ("kinds", "alpha"), [*(((kind,), 0.5) for kind in KINDS), (KINDS, 0.0), (KINDS, 1.0)]
)
def test_no_output_changes(
    pipe: TextToAudioPipeline, inputs: ChosenInputs, kinds: tuple[str, ...], alpha: float
) -> None:
    unbalance(pipe.unet)
    given = replace(inputs, fingerprint=ptq4adm.calibration.fingerprint(pipe.unet))
    before, expected = pipe.unet.state_dict(), outputs(pipe.unet, given)
    before = {name: tensor.clone() for name, tensor in before.items()}
    names = balance(pipe.unet, given, alpha=alpha, kinds=kinds, progress=False)
    assert names == [x.name for x in find_links(pipe.unet) if x.kind in kinds]
    changed = {n for n, tensor in pipe.unet.state_dict().items() if not tensor.equal(before[n])}
    assert {f"{name}.weight" for name in names} <= changed
    found = outputs(pipe.unet, given)
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert not pipe.unet._forward_hooks
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in pipe.unet.modules())


def test_channels_become_more_alike(pipe: TextToAudioPipeline, inputs: ChosenInputs) -> None:
    unbalance(pipe.unet)
    given = replace(inputs, fingerprint=ptq4adm.calibration.fingerprint(pipe.unet))
    block = "mid_block.attentions.0"
    names = [f"{block}.proj_in", f"{block}.transformer_blocks.0.attn1.to_q"]
    before = [spread(pipe.unet, given, name) for name in names]
    balance(pipe.unet, given, alpha=1.0, progress=False)
    for name, value in zip(names, before, strict=True):
        # all of the range goes into the weights
        assert spread(pipe.unet, given, name) < min(1.01, value)


def test_keys_of_a_text_are_not_readers_of_the_norm(inputs: ChosenInputs) -> None:
    from diffusers.models.attention import BasicTransformerBlock

    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = BasicTransformerBlock(
                8, 2, 4, cross_attention_dim=6, activation_fn="geglu"
            )
            self.text = nn.Parameter(torch.randn(1, 3, 6))

        def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> tuple[Tensor]:
            del timestep, class_labels
            rows = sample.flatten(2).transpose(1, 2)
            text = self.text.expand(len(rows), -1, -1)
            return (self.block(rows, encoder_hidden_states=text),)

    model = Denoiser().eval()
    given = replace(inputs, fingerprint=ptq4adm.calibration.fingerprint(model), constants={})
    given = replace(given, arguments={"class_labels": given.arguments["class_labels"]})
    expected, keys = outputs(model, given), model.block.attn2.to_k.weight.clone()
    names = balance(model, given, progress=False)
    assert "block.norm2" in names
    assert "block.attn2.to_v" in names
    assert torch.equal(model.block.attn2.to_k.weight, keys)
    torch.testing.assert_close(outputs(model, given), expected, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_balanced_is_refused_and_unchanged(
    pipe: TextToAudioPipeline, quantized: TextToAudioPipeline, inputs: ChosenInputs
) -> None:
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    with pytest.raises(ConfigError, match=r"alpha: got 1\.5"):
        balance(pipe.unet, inputs, alpha=1.5)
    with pytest.raises(ConfigError, match="kinds: got 'batch norm'"):
        balance(pipe.unet, inputs, kinds=["batch norm"])
    with pytest.raises(CalibrationMismatchError, match="record this model's own"):
        balance(pipe.unet, replace(inputs, fingerprint="0" * 64))
    with pytest.raises(ConfigError, match="quantized already"):
        balance(quantized.unet, inputs)
    assert all(tensor.equal(before[n]) for n, tensor in pipe.unet.state_dict().items())
