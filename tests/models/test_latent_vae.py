"""First stages of the latent-diffusion code against a forward of the original in plain torch."""

from __future__ import annotations

import pytest
import torch
from originals import vae as original
from originals.weights import random_weights

from ptq4adm.errors import CheckpointError, CheckpointShapeError
from ptq4adm.models import latent_vae
from ptq4adm.models.latent_vae import PREFIX, load_vae

# attention at the two coarsest levels, as Make-An-Audio has it, and none but in the middle
WITH = original.VaeConfig(4, 32, (1, 2, 2, 4), 624, (78, 156))
WITHOUT = original.VaeConfig(8, 32, (1, 2, 4), 256, num_res_blocks=1)


@pytest.mark.parametrize("config", [WITH, WITHOUT], ids=["attention", "middle"])
@torch.no_grad()
def test_both_halves(config: original.VaeConfig) -> None:
    weights = random_weights(original.shapes(config), seed=0)
    vae = load_vae({**weights, "vocoder.conv_pre.bias": torch.ones(1)}, 0.5, "file")
    latents = torch.randn(2, config.z_channels, 10, 6)
    expected = original.decode(weights, config, latents)
    assert (vae.decode(latents).sample - expected).norm() < 1e-5 * expected.norm()
    mel = torch.randn(2, 1, 80, 40)
    expected = original.encode(weights, config, mel)
    assert (vae.encode(mel).latent_dist.mean - expected).norm() < 1e-5 * expected.norm()
    assert vae.config.scaling_factor == 0.5


@pytest.mark.parametrize("config", [original.MAKE_AN_AUDIO, original.AUDIOLDM], ids=["maa", "ldm"])
def test_published_sizes(config: original.VaeConfig) -> None:
    with torch.device("meta"):
        weights = {name: torch.empty(shape) for name, shape in original.shapes(config).items()}
    vae = load_vae(weights, 1.0, "file")
    widths = tuple(config.ch * mult for mult in config.ch_mult)
    assert vae.config.block_out_channels == widths
    assert sum(p.numel() for p in vae.parameters()) == sum(t.numel() for t in weights.values())


def test_names_in_messages_are_those_of_the_file() -> None:
    weights = random_weights(original.shapes(WITH), seed=0)
    vae = load_vae(weights, 1.0, "file")
    names = {latent_vae.file_name(name, len(WITH.ch_mult)) for name in vae.state_dict()}
    assert names == weights.keys()


def test_missing_unknown_and_contradicting_tensors_are_named() -> None:
    weights = random_weights(original.shapes(WITH), seed=0)
    for name in ("decoder.up.3.attn.2.proj_out.bias", "encoder.down.1.block.0.nin_shortcut.weight"):
        lacking = {n: tensor for n, tensor in weights.items() if n != name}
        with pytest.raises(CheckpointError, match=rf"lacks 1 tensors \('{PREFIX}{name}'\)"):
            load_vae(lacking, 1.0, "file")
    with pytest.raises(CheckpointError, match=f"holds 1 unknown .*{PREFIX}quantize"):
        load_vae({**weights, "quantize.embedding.weight": torch.ones(1)}, 1.0, "file")
    with pytest.raises(CheckpointError, match=f"lacks {PREFIX}post_quant_conv"):
        load_vae({n: t for n, t in weights.items() if "post" not in n}, 1.0, "file")
    with pytest.raises(CheckpointError, match=f"lacks {PREFIX}encoder.down.0"):
        load_vae({n: t for n, t in weights.items() if "encoder.down.0" not in n}, 1.0, "file")
    name = "decoder.mid.attn_1.q.weight"
    with pytest.raises(CheckpointShapeError, match=rf"{PREFIX}{name} is \[128, 128, 3, 1\]"):
        load_vae({**weights, name: torch.ones(128, 128, 3, 1)}, 1.0, "file")
