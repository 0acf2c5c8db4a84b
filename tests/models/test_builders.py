"""The UNets of TANGO and Make-An-Audio: the published sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from ptq4adm.models import (
    UNet2DAdapter,
    audioldm2_unet,
    find_adapter,
    make_an_audio_unet,
    tango_unet,
)


@pytest.mark.parametrize(
    ("build", "parameters", "latents", "tokens"),
    [
        (tango_unet, 865_933_768, (8, 256, 16), 32),
        (make_an_audio_unet, 160_223_684, (4, 10, 80), 77),
        (make_an_audio_unet, 160_223_684, (4, 10, 76), 77),  # a clip of 9.7 s
    ],
)
def test_size_and_call(
    build: Callable[..., nn.Module], parameters: int, latents: tuple[int, ...], tokens: int
) -> None:
    unet = build(device="meta")
    assert sum(p.numel() for p in unet.parameters()) == parameters
    assert not unet.training
    with torch.device("meta"):
        y = unet(torch.empty(2, *latents), 7, torch.empty(2, tokens, 1024)).sample
    assert y.shape == (2, *latents)
    adapter = find_adapter(unet)
    assert isinstance(adapter, UNet2DAdapter)
    # the shortcuts of the up blocks: each takes the hidden states and a skip connection
    for name, halves in adapter.segments(unet).items():
        assert unet.get_submodule(name).in_channels == sum(halves)


def test_size_and_call_of_audioldm2() -> None:
    unet = audioldm2_unet(device="meta")
    # 346 million are published
    assert sum(p.numel() for p in unet.parameters()) == 346_943_496
    with torch.device("meta"):
        y = unet(
            torch.empty(2, 8, 256, 16),
            7,
            torch.empty(2, 8, 768),
            encoder_hidden_states_1=torch.empty(2, 30, 1024),
            encoder_attention_mask_1=torch.empty(2, 30),
        ).sample
    assert y.shape == (2, 8, 256, 16)
    assert isinstance(find_adapter(unet), UNet2DAdapter)
