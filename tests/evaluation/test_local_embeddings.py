"""Cnn14, VGGish and CLAP from local files: against plain forwards, and strict about them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers import ClapConfig, ClapFeatureExtractor, ClapModel

from ptq4adm.errors import (
    CheckpointError,
    CheckpointShapeError,
    ConfigError,
    MissingComponentError,
    ShapeError,
    UnsafeCheckpointError,
)
from ptq4adm.evaluation.embeddings import NAMES, LogMelStatistics, load_embedding
from ptq4adm.evaluation.mel import log_mel
from ptq4adm.evaluation.vggish import htk_filters
from ptq4adm.evaluation.weights import file_hash

WIDTHS = (64, 128, 256, 512, 1024, 2048)


def _cnn14_tensors() -> dict[str, Tensor]:
    """Random weights under the names of the published file, its front end included."""
    found = {
        "spectrogram_extractor.stft.conv_real.weight": torch.zeros(257, 1, 512),
        "spectrogram_extractor.stft.conv_imag.weight": torch.zeros(257, 1, 512),
        "logmel_extractor.melW": torch.zeros(257, 64),
    }

    def norm(name: str, width: int) -> None:
        found[f"{name}.weight"] = torch.rand(width) + 0.5
        found[f"{name}.bias"] = torch.randn(width)
        found[f"{name}.running_mean"] = torch.randn(width)
        found[f"{name}.running_var"] = torch.rand(width) + 0.5

    norm("bn0", 64)
    inputs = 1
    for i, width in enumerate(WIDTHS):
        for j in (1, 2):
            shape = (width, inputs, 3, 3)
            block = f"conv_block{i + 1}"
            found[f"{block}.conv{j}.weight"] = torch.randn(shape) * (2 / (9 * inputs)) ** 0.5
            norm(f"{block}.bn{j}", width)
            inputs = width
    for name, outputs in (("fc1", 2048), ("fc_audioset", 527)):
        found[f"{name}.weight"] = torch.randn(outputs, 2048) / 2048**0.5
        found[f"{name}.bias"] = torch.randn(outputs)
    return found


@pytest.fixture(scope="module")
def cnn14() -> dict[str, Tensor]:
    return _cnn14_tensors()


def _cnn14_forward(w: dict[str, Tensor], waveform: Tensor) -> tuple[Tensor, Tensor]:
    """The network from its description, front end by numpy, [B, C, T, F]."""
    padded = np.pad(waveform.double().numpy(), ((0, 0), (256, 256)), mode="reflect")
    starts = range(0, padded.shape[1] - 511, 160)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(512) / 512)
    frames = np.stack([padded[:, i : i + 512] for i in starts], 1) * window
    power = np.abs(np.fft.rfft(frames)) ** 2

    def to_mel(hz: float) -> float:
        return hz * 3 / 200 if hz < 1000 else 15 + 27 * math.log(hz / 1000) / math.log(6.4)

    mel = np.linspace(to_mel(50.0), to_mel(8000.0), 66)
    hz = np.where(mel < 15.0, mel * 200 / 3, 1000.0 * 6.4 ** ((mel - 15.0) / 27.0))
    bank = np.zeros((257, 64))
    for m in range(64):
        triangle = np.interp(np.arange(257) * 31.25, hz[m : m + 3], [0.0, 1.0, 0.0], 0.0, 0.0)
        bank[:, m] = 2.0 / (hz[m + 2] - hz[m]) * triangle
    x = torch.from_numpy(10.0 * np.log10(np.maximum(power @ bank, 1e-10))).float()[:, None]

    def norm(y: Tensor, name: str) -> Tensor:
        parts = (w[f"{name}.{p}"] for p in ("running_mean", "running_var", "weight", "bias"))
        mean, variance, weight, bias = (p[:, None, None] for p in parts)
        return (y - mean) / torch.sqrt(variance + 1e-5) * weight + bias

    x = norm(x.permute(0, 3, 2, 1), "bn0").permute(0, 3, 2, 1)
    for i in range(6):
        for j in (1, 2):
            x = functional.conv2d(x, w[f"conv_block{i + 1}.conv{j}.weight"], padding=1)
            x = norm(x, f"conv_block{i + 1}.bn{j}").clamp(min=0.0)
        if i < 5:
            x = x[:, :, : x.shape[2] // 2 * 2, : x.shape[3] // 2 * 2]
            x = x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]
            x = x / 4
    x = x.mean(3)
    x = x.amax(2) + x.mean(2)
    features = (x @ w["fc1.weight"].T + w["fc1.bias"]).clamp(min=0.0)
    return features, features @ w["fc_audioset.weight"].T + w["fc_audioset.bias"]


def test_cnn14_is_its_description(cnn14: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "Cnn14_16k.pth"
    torch.save({"iteration": 600000, "model": cnn14}, path)
    embedding = load_embedding("cnn14-16k", path)
    waveform = 0.1 * torch.randn(2, 8000)
    found = embedding.embed(waveform)
    features, logits = _cnn14_forward(cnn14, waveform)
    np.testing.assert_allclose(found.features, features, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found.logits, logits, rtol=1e-3, atol=1e-3)
    assert (embedding.dimension, len(embedding.classes)) == (2048, 527)
    assert embedding.weights == file_hash(path)
    assert embedding.embed(waveform[:, :4960]).features.isfinite().all()
    with pytest.raises(ShapeError, match="at least 4960 samples"):
        embedding.embed(waveform[:, :4959])


def test_cnn14_refuses_other_models(cnn14: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(MissingComponentError, match="--weights PATH"):
        load_embedding("cnn14-16k")
    with pytest.raises(MissingComponentError, match="no such file"):
        load_embedding("cnn14-16k", tmp_path / "absent.pth")
    path = tmp_path / "cnn14.safetensors"
    small = {name: t for name, t in cnn14.items() if t.numel() < 1000000}
    save_file(small, path)
    with pytest.raises(CheckpointError, match="lacks"):
        load_embedding("cnn14-16k", path)
    save_file(cnn14 | {"fc_audioset.weight": torch.zeros(10, 2048)}, path)
    with pytest.raises(CheckpointShapeError, match="fc_audioset"):
        load_embedding("cnn14-16k", path)
    torch.save({"model": {"fc1.weight": Path("x")}}, tmp_path / "code.pth")
    with pytest.raises(UnsafeCheckpointError, match="nothing of it was run"):
        load_embedding("cnn14-16k", tmp_path / "code.pth")


# --- VGGish -------------------------------------------------------------------------------------


def test_vggish_is_its_description(tmp_path: Path) -> None:
    shapes = {
        0: (64, 1),
        3: (128, 64),
        6: (256, 128),
        8: (256, 256),
        11: (512, 256),
        13: (512, 512),
    }
    w: dict[str, Tensor] = {}
    for i, (outputs, inputs) in shapes.items():
        scale = (2 / (9 * inputs)) ** 0.5
        w[f"features.{i}.weight"] = torch.randn(outputs, inputs, 3, 3) * scale
        w[f"features.{i}.bias"] = torch.randn(outputs)
    for i, (outputs, inputs) in {0: (4096, 12288), 2: (4096, 4096), 4: (128, 4096)}.items():
        # few rows are not zero: a quarter of a billion random bytes would take longest here
        weight = torch.zeros(outputs, inputs)
        weight[: min(outputs, 128)] = torch.randn(min(outputs, 128), inputs) / inputs**0.5
        w[f"embeddings.{i}.weight"], w[f"embeddings.{i}.bias"] = weight, torch.randn(outputs)
    path = tmp_path / "vggish.safetensors"
    save_file(w | {"pproc.pca_means": torch.zeros(128, 1)}, path)
    embedding = load_embedding("vggish", path)
    waveform = 0.1 * torch.randn(2, 400 + 160 * (2 * 96 + 3))

    pieces = []
    for start in (0, 96):
        frames = np.stack(
            [
                waveform.double().numpy()[:, 160 * i : 160 * i + 400]
                for i in range(start, start + 96)
            ],
            1,
        )
        window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
        magnitude = torch.from_numpy(np.abs(np.fft.rfft(frames * window, 512)))
        x = torch.log(magnitude @ htk_filters().double() + 0.01).float()[:, None]
        for i in shapes:
            x = functional.conv2d(x, w[f"features.{i}.weight"], w[f"features.{i}.bias"], padding=1)
            x = x.clamp(min=0.0)
            if i in (0, 3, 8, 13):
                x = functional.max_pool2d(x, 2)
        x = x.permute(0, 2, 3, 1).reshape(2, -1)
        for i in (0, 2, 4):
            x = x @ w[f"embeddings.{i}.weight"].T + w[f"embeddings.{i}.bias"]
            x = x.clamp(min=0.0) if i < 4 else x
        pieces.append(x)
    expected = (pieces[0] + pieces[1]) / 2
    np.testing.assert_allclose(embedding.embed(waveform).features, expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(ShapeError, match="at least 15600"):
        embedding.embed(waveform[:, :15599])


def test_vggish_filters_are_triangles_on_the_htk_scale() -> None:
    edges = np.linspace(1127 * math.log(1 + 125 / 700), 1127 * math.log(1 + 7500 / 700), 66)
    bins = 1127 * np.log(1 + np.arange(257) * 31.25 / 700)
    for m in (0, 20, 63):
        expected = np.interp(bins, edges[m : m + 3], [0.0, 1.0, 0.0])
        np.testing.assert_allclose(htk_filters()[:, m], expected, atol=1e-6)


# --- CLAP ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clap_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clap") / "tiny-clap"
    torch.manual_seed(0)
    config = ClapConfig(
        text_config={
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 16, "vocab_size": 100,
        },
        audio_config={
            "patch_embeds_hidden_size": 8, "hidden_size": 64, "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 1, 1, 1], "num_hidden_layers": 4,
        },
        projection_dim=24,
    )  # fmt: skip
    ClapModel(config).save_pretrained(folder)
    ClapFeatureExtractor(truncation="rand_trunc", padding="repeatpad").save_pretrained(folder)
    return folder


def test_clap_is_what_transformers_computes(clap_folder: Path) -> None:
    embedding = load_embedding("clap", clap_folder)
    assert (embedding.name, embedding.sample_rate, embedding.dimension) == (
        "clap:tiny-clap", 48000, 24,
    )  # fmt: skip
    waveform = 0.1 * torch.randn(2, 48000)
    extractor = ClapFeatureExtractor.from_pretrained(clap_folder)
    inputs = extractor(list(waveform.numpy()), sampling_rate=48000, return_tensors="pt")
    model = ClapModel.from_pretrained(clap_folder).eval()
    with torch.no_grad():
        hidden = model.audio_model(**inputs).pooler_output
        expected = functional.normalize(model.audio_projection(hidden), dim=1)
    found = embedding.embed(waveform)
    np.testing.assert_allclose(found.features, expected, atol=1e-5)
    assert found.logits is None


def test_clap_cuts_long_clips_the_same_way_every_time(clap_folder: Path) -> None:
    embedding = load_embedding("clap", clap_folder)
    waveform = 0.1 * torch.randn(1, 480000 + 48000)
    found = embedding.embed(waveform).features
    parts = [embedding.embed(waveform[:, :480000]), embedding.embed(waveform[:, 480000:])]
    np.testing.assert_allclose(found, (parts[0].features + parts[1].features) / 2, atol=1e-6)


def test_clap_refuses_what_is_incomplete(clap_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingComponentError, match=r"lacks config\.json"):
        load_embedding("clap", tmp_path)
    for file in clap_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = dict(ClapModel.from_pretrained(clap_folder).state_dict())
    del tensors["audio_projection.linear1.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"audio_projection\.linear1\.weight"):
        load_embedding("clap", tmp_path)


# --- without weights ----------------------------------------------------------------------------


def test_log_mel_statistics_are_mean_and_deviation_over_time() -> None:
    waveform = torch.randn(3, 4000)
    mel = log_mel(waveform).double().numpy()
    expected = np.concatenate([mel.mean(1), mel.std(1, ddof=1)], 1)
    np.testing.assert_allclose(LogMelStatistics().embed(waveform).features, expected, rtol=1e-4)


def test_unknown_names_and_needless_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=", ".join(NAMES)):
        load_embedding("panns")
    with pytest.raises(ConfigError, match="leave them out"):
        load_embedding("logmel-stats", tmp_path)
