"""musicnn's taggers: the network against its formula, and the real weights against TensorFlow."""

from __future__ import annotations

import math
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ptq4adm.errors import (
    CheckpointError,
    CheckpointShapeError,
    DependencyError,
    MissingComponentError,
    ShapeError,
)
from ptq4adm.evaluation.embeddings import load_embedding
from ptq4adm.evaluation.mel import mel_bank, mel_power
from ptq4adm.evaluation.musicnn import Musicnn, musicnn_network
from ptq4adm.evaluation.musicnn_tags import TAGS

# what make setup installs beside the environment's packages
PACKAGE = Path(sys.prefix) / "musicnn" / "musicnn"
needs_weights = pytest.mark.skipif(
    not PACKAGE.is_dir(), reason=f"no {PACKAGE}: the weights of musicnn 0.1.0 (make setup)"
)


def _checkpoint() -> dict[str, Tensor]:
    """Random weights under TensorFlow's names and shapes, and two of the optimizer's."""
    kernels = [(7, 38, 1, 204), (7, 67, 1, 204)] + [(n, 1, 1, 51) for n in (128, 64, 32)]
    kernels += [(7, 561, 1, 64), (7, 64, 1, 64), (7, 64, 1, 64)]
    widths = [1, 204, 204, 51, 51, 51, 64, 64, 64, 1506, 200]
    found: dict[str, Tensor] = {"beta1_power": torch.tensor(0.9)}
    for i, shape in enumerate(kernels):
        name = f"conv2d_{i}" if i else "conv2d"
        found[f"{name}/kernel"] = torch.randn(shape) / math.prod(shape[:3]) ** 0.5
        found[f"{name}/bias"] = torch.randn(shape[3])
    for i, width in enumerate(widths):
        name = f"batch_normalization_{i}" if i else "batch_normalization"
        found[f"{name}/gamma"] = torch.randn(width)
        found[f"{name}/beta"] = torch.randn(width)
        found[f"{name}/moving_mean"] = torch.randn(width)
        found[f"{name}/moving_variance"] = torch.rand(width) + 0.1
    for name, shape in (("dense", (1506, 200)), ("dense_1", (200, 50))):
        found[f"{name}/kernel"] = torch.randn(shape) / shape[0] ** 0.5
        found[f"{name}/bias"] = torch.randn(shape[1])
    found["conv2d/kernel/Adam"] = torch.zeros(7, 38, 1, 204)
    return found


def _forward(weights: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The network in float64 and TensorFlow's order [B, T, F, C], from its description."""
    w = {name: tensor.double() for name, tensor in weights.items()}

    def norm(y: Tensor, i: int) -> Tensor:
        name = f"batch_normalization_{i}" if i else "batch_normalization"
        scale = w[f"{name}/gamma"] / torch.sqrt(w[f"{name}/moving_variance"] + 1e-3)
        return (y - w[f"{name}/moving_mean"]) * scale + w[f"{name}/beta"]

    def conv(y: Tensor, i: int, before: int, after: int) -> Tensor:
        name = f"conv2d_{i}" if i else "conv2d"
        kernel, bias = w[f"{name}/kernel"], w[f"{name}/bias"]
        y = functional.pad(y, (0, 0, 0, 0, before, after))
        windows = y.unfold(1, kernel.shape[0], 1).unfold(2, kernel.shape[1], 1)
        return torch.einsum("btfchw,hwco->btfo", windows, kernel).add(bias).clamp(min=0.0)

    y = norm(x.double()[..., None], 0)
    pads = [(3, 3), (3, 3), (63, 64), (31, 32), (15, 16)]
    parts = [norm(conv(y, i, *pads[i]), i + 1).amax(2) for i in range(5)]
    front = torch.cat(parts, 2)  # [B, T, 561]
    levels = [front]
    for i in range(3):
        z = norm(conv(levels[-1][..., None], 5 + i, 3, 3)[:, :, 0], 6 + i)
        levels.append(z if i == 0 else z + levels[-1])
    joined = torch.cat(levels, 2)
    pooled = torch.stack([joined.amax(1), joined.mean(1)], 2).flatten(1)
    hidden = norm(pooled, 9) @ w["dense/kernel"] + w["dense/bias"]
    features = norm(hidden.clamp(min=0.0), 10)
    return features, features @ w["dense_1/kernel"] + w["dense_1/bias"]


@pytest.mark.parametrize("frames", [1, 40])
def test_the_network_is_its_description(frames: int) -> None:
    weights, x = _checkpoint(), torch.rand(2, frames, 96)
    with torch.no_grad():
        found = musicnn_network(weights)(x)
    for ours, expected in zip(found, _forward(weights, x), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=2e-4, atol=2e-4)


def test_a_missing_or_misshapen_weight_is_refused() -> None:
    weights = _checkpoint()
    missing = {k: v for k, v in weights.items() if k != "batch_normalization_9/gamma"}
    with pytest.raises(CheckpointError, match="batch_normalization_9/gamma"):
        musicnn_network(missing)
    with pytest.raises(CheckpointShapeError, match="tags"):
        musicnn_network(weights | {"dense_1/kernel": torch.zeros(200, 49)})


def test_mel_energies_are_the_formula() -> None:
    x = torch.randn(2, 1000)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(512) / 512)
    padded = np.pad(x.double().numpy(), ((0, 0), (256, 256)), mode="reflect")
    frames = np.stack([padded[:, i * 256 : i * 256 + 512] for i in range(1000 // 256 + 1)], 1)
    power = np.abs(np.fft.rfft(frames * window)) ** 2
    # Slaney's scale: 3 mel a 200 Hz below 1 kHz, then 27 mel a factor of 6.4
    mel = np.linspace(0.0, 15.0 + 27.0 * math.log(8.0) / math.log(6.4), 98)
    hz = np.where(mel < 15.0, mel * 200 / 3, 1000.0 * 6.4 ** ((mel - 15.0) / 27.0))
    bins = np.arange(257) * 31.25
    bank = np.zeros((257, 96))
    for m in range(96):
        triangle = np.interp(bins, hz[m : m + 3], [0.0, 1.0, 0.0], left=0.0, right=0.0)
        bank[:, m] = 2.0 / (hz[m + 2] - hz[m]) * triangle
    found = mel_power(x, mel_bank(512, 96, 0.0, 8000.0), hop=256)
    np.testing.assert_allclose(found, power @ bank, rtol=1e-4, atol=1e-5)
    with pytest.raises(ShapeError, match="more than 256 samples"):
        mel_power(x[:, :256], mel_bank(512, 96, 0.0, 8000.0), hop=256)


# --- the real weights ---------------------------------------------------------------------------

# of `_signals`, by TensorFlow 2.21 from the graph in the wheel: some features, some logits, and
# the norms of all
TENSORFLOW = {
    "MTT": (
        [[-0.07995, -0.02536, -0.47368, 2.62383], [3.18528, 2.17296, 0.88487, 0.95241]],
        [
            [-6.97687, -9.7589, -2.78856, -0.20856, -14.78858],
            [-2.38519, -8.6872, -5.13701, -5.61231, -11.82309],
        ],
        [19.311169, 13.893084],
        [70.22429, 51.031162],
    ),
    "MSD": (
        [[-0.17718, -0.12703, -0.14878, -0.29343], [0.99656, 0.61843, -0.14878, -0.02331]],
        [
            [-3.32741, -4.50922, -2.87105, -8.0227, -7.2025],
            [-3.39828, -3.53728, -3.4682, -2.80177, -6.07634],
        ],
        [11.860771, 9.484884],
        [37.97864, 32.154675],
    ),
}


def _signals() -> Tensor:
    """A tone, and a rising one with beeps, float32 [2, 48600]: 187 frames, and 3 to drop."""
    t = torch.arange(48600, dtype=torch.float64) / 16000
    beeps = torch.sin(math.tau * 3000 * t) * (torch.sin(math.tau * 2 * t) > 0)
    chirp = 0.2 * torch.sin(math.tau * (200 + 800 * t) * t) + 0.1 * beeps
    return torch.stack([0.3 * torch.sin(math.tau * 440 * t), chirp]).float()


@needs_weights
@pytest.mark.parametrize("model", ["MTT", "MSD"])
def test_the_real_weights_give_what_tensorflow_gives(model: str) -> None:
    embedding = load_embedding(f"musicnn-{model}", PACKAGE)
    found = embedding.embed(_signals())
    features, logits, feature_norms, logit_norms = TENSORFLOW[model]
    np.testing.assert_allclose(found.features[:, [0, 1, 50, 199]], features, atol=2e-3)
    np.testing.assert_allclose(found.logits[:, [0, 1, 2, 25, 49]], logits, atol=2e-3)
    np.testing.assert_allclose(found.features.norm(dim=1), feature_norms, rtol=1e-4)
    np.testing.assert_allclose(found.logits.norm(dim=1), logit_norms, rtol=1e-4)
    assert embedding.classes is not None
    assert len(set(embedding.classes)) == 50
    if model == "MTT":
        # a pure tone
        assert embedding.classes[int(found.probabilities[0].argmax())] == "flute"


@needs_weights
def test_long_clips_are_the_mean_of_their_pieces() -> None:
    embedding = Musicnn("MTT", PACKAGE)
    x = torch.cat([_signals(), _signals()], 1)[:, : 2 * 187 * 256 + 100]
    filters = mel_bank(512, 96, 0.0, 8000.0)
    mel = torch.log10(10000.0 * mel_power(x, filters, hop=256) + 1.0)
    with torch.no_grad():
        parts = [embedding._network(mel[:, i : i + 187])[0] for i in (0, 187)]
    np.testing.assert_allclose(embedding.embed(x).features, (parts[0] + parts[1]) / 2, atol=1e-4)


@needs_weights
def test_reads_the_wheel_itself_and_refuses_one_of_other_bytes(tmp_path: Path) -> None:
    wheel = tmp_path / "musicnn-0.1.0-py3-none-any.whl"
    contents = {f.name: f.read_bytes() for f in (PACKAGE / "MTT_musicnn").glob(".[di]*")}
    with zipfile.ZipFile(wheel, "w") as file:
        for name, content in contents.items():
            file.writestr(f"musicnn/MTT_musicnn/{name}", content)
    assert Musicnn("MTT", wheel).weights == Musicnn("MTT", PACKAGE).weights
    with zipfile.ZipFile(wheel, "w") as file:
        for name, content in contents.items():
            file.writestr(f"musicnn/MTT_musicnn/{name}", content[:-1] + b"\0")
    with pytest.raises(CheckpointError, match=r"sha256 .* needs .* of musicnn 0.1.0"):
        Musicnn("MTT", wheel)


def test_missing_weights_name_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(DependencyError, match=r"pip install --no-deps musicnn==0\.1\.0"):
        load_embedding("musicnn-MTT")
    with pytest.raises(MissingComponentError, match=r"holds no MSD_musicnn/\.index"):
        load_embedding("musicnn-MSD", tmp_path)
    (tmp_path / "page.whl").write_text("<html>")
    with pytest.raises(MissingComponentError, match="wheel of musicnn"):
        load_embedding("musicnn-MSD", tmp_path / "page.whl")


def test_tags_are_fifty_a_model() -> None:
    assert {name: len(tags) for name, tags in TAGS.items()} == {"MTT": 50, "MSD": 50}
