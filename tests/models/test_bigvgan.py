"""BigVGAN against the published form in plain torch, and its files."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from originals import bigvgan as original
from originals.weights import random_weights
from torch import Tensor

from ptq4adm.errors import CheckpointError, CheckpointShapeError, MissingComponentError
from ptq4adm.models.bigvgan import BigVGAN, low_pass_filter
from ptq4adm.models.bigvgan_files import load_bigvgan
from ptq4adm.models.components import load_component

CONFIG = original.BigVGANConfig(
    16, (4, 2), (8, 4), 32, resblock_kernel_sizes=(3, 7), resblock_dilation_sizes=((1, 3, 5),) * 2
)
SIMPLE = replace(
    CONFIG,
    resblock="2",
    resblock_dilation_sizes=((1, 3),) * 2,
    activation="snake",
    snake_logscale=False,
)


def _write(folder: Path, config: original.BigVGANConfig, **changes: Any) -> dict[str, Tensor]:
    weights = original.fill(random_weights(original.shapes(config), seed=0))
    torch.save({"generator": weights}, folder / "best_netG.pt")
    (folder / "args.yml").write_text(json.dumps({**asdict(config), **changes}))
    return weights


@pytest.mark.parametrize("config", [CONFIG, SIMPLE], ids=["snakebeta", "snake"])
@torch.no_grad()
def test_waveform(config: original.BigVGANConfig, tmp_path: Path) -> None:
    weights = _write(tmp_path, config)
    mel = torch.randn(2, 16, 13)
    expected = original.forward(weights, config, mel)[:, 0]
    vocoder = load_bigvgan(tmp_path)
    got = vocoder(mel)
    assert got.shape == (2, 13 * vocoder.hop) == (2, 104)
    assert (got - expected).norm() < 1e-5 * expected.norm()
    vocoder.save_pretrained(tmp_path / "vocoder")
    entry = ["ptq4adm", "BigVGAN"]
    again = load_component(tmp_path, "vocoder", entry, torch.float32)
    assert torch.equal(again(mel), got)


def test_filter_is_the_published_one() -> None:
    taps = low_pass_filter()
    torch.testing.assert_close(taps, original.kaiser_filter(), rtol=0, atol=1e-7)
    # it passes what the old rate holds, and stops what it does not
    response = torch.fft.rfft(taps, 4096).abs()
    assert response[0] == pytest.approx(1.0)
    assert response[1800:].max() < 0.01


def test_published_size() -> None:
    config = original.BigVGANConfig()
    with torch.device("meta"):
        vocoder = BigVGAN()
    # two tensors of a weight norm are one here, and a filter is none
    shapes = original.shapes(config)
    names = [n for n in shapes if not n.endswith((".weight_g", ".filter"))]
    assert len(vocoder.state_dict()) == len(names)
    count = sum(torch.Size(shapes[name]).numel() for name in names)
    assert sum(p.numel() for p in vocoder.parameters()) == count == 112_199_473
    assert vocoder.hop == 256


def test_files_that_are_missing_or_broken(tmp_path: Path) -> None:
    with pytest.raises(MissingComponentError, match=r"args\.yml: missing"):
        load_bigvgan(tmp_path)
    (tmp_path / "args.yml").write_text("a: [1")
    with pytest.raises(CheckpointError, match="cannot be read as YAML"):
        load_bigvgan(tmp_path)
    (tmp_path / "args.yml").write_text("- 1")
    with pytest.raises(CheckpointError, match="expected a mapping, got list"):
        load_bigvgan(tmp_path)
    (tmp_path / "args.yml").write_text("a: !!python/object/apply:os.getcwd []")
    with pytest.raises(CheckpointError, match="cannot be read as YAML"):
        load_bigvgan(tmp_path)
    (tmp_path / "args.yml").write_text("num_mels: 80")
    with pytest.raises(CheckpointError, match="names no upsample_rates, "):
        load_bigvgan(tmp_path)
    _write(tmp_path, CONFIG)
    (tmp_path / "best_netG.pt").unlink()
    with pytest.raises(MissingComponentError, match=r"best_netG\.pt: no such file"):
        load_bigvgan(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("activation", "relu", "activation is 'relu', known are snakebeta and snake"),
        ("resblock", "3", "resblock is '3'"),
        ("upsample_rates", [4, 2, 2], "lists of one length"),
        ("resblock_kernel_sizes", 3, "lists of one length"),
    ],
)
def test_a_config_that_makes_no_sense(tmp_path: Path, name: str, value: Any, message: str) -> None:
    _write(tmp_path, CONFIG, **{name: value})
    with pytest.raises(CheckpointError, match=message):
        load_bigvgan(tmp_path)


def test_a_config_that_contradicts_the_weights(tmp_path: Path) -> None:
    _write(tmp_path, CONFIG, upsample_initial_channel=64)
    with pytest.raises(
        CheckpointShapeError, match=r"conv_pre\.weight is \[32, 16, 7\], needs \[64"
    ):
        load_bigvgan(tmp_path)
    _write(tmp_path, CONFIG, resblock="2")
    with pytest.raises(
        CheckpointError, match=r"lacks \d+ tensors \('resblocks\.0\.convs\.0\.bias'"
    ):
        load_bigvgan(tmp_path)
    _write(tmp_path, CONFIG, activation="snake")
    with pytest.raises(CheckpointError, match=r"unknown tensors .*act\.beta"):
        load_bigvgan(tmp_path)


def test_weights_that_contradict_each_other(tmp_path: Path) -> None:
    weights = _write(tmp_path, CONFIG)
    half = {name: tensor for name, tensor in weights.items() if name != "ups.0.0.weight_g"}
    torch.save({"generator": half}, tmp_path / "best_netG.pt")
    with pytest.raises(CheckpointError, match=r"ups\.0\.0\.weight_v .* no matching"):
        load_bigvgan(tmp_path)
    other = {**weights, "activation_post.upsample.filter": torch.ones(1, 1, 12) / 12}
    torch.save({"generator": other}, tmp_path / "best_netG.pt")
    with pytest.raises(CheckpointError, match="is not the filter of a published BigVGAN"):
        load_bigvgan(tmp_path)
