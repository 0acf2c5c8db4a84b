"""Music taggers of the package musicnn 0.1.0 (Pons and Serra, 2019), in torch.

Their weights lie in the package's wheel, as a TensorFlow checkpoint. The wheel asks for TensorFlow
and for a numpy of 2019, which nothing here needs: it is installed without what it depends on, and
never imported. Two files are hashed and read (a hundredth of a second, so nothing is converted).

Source: the network is the one that the package's `models.py` describes: 7 x 38 and 7 x 67 filters
for timbre and 128, 64 and 32 x 1 for time, three convolutions with residuals, maximum and mean over
time, one dense layer. It reads log10(1 + 10^4 mel energy), 96 bins, frames of 512 by 256 samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from ptq4adm.errors import CheckpointError, ConfigError
from ptq4adm.evaluation.embeddings import Embedded
from ptq4adm.evaluation.mel import mel_bank, mel_power
from ptq4adm.evaluation.musicnn_tags import TAGS
from ptq4adm.evaluation.tf_bundle import read_bundle
from ptq4adm.evaluation.wheels import WeightsPackage
from ptq4adm.models.assign import build

_PACKAGE = WeightsPackage("musicnn", "0.1.0")
_FILES = (".index", ".data-00000-of-00001")
# sha256 of the two files of each model in the wheel of musicnn 0.1.0
_HASHES = {
    "MTT": (
        "da2d7bb670b2b31e9bc441bb1bd75eca31b5b061f963cc1f9630c1aff3238f57",
        "041f3935e981a65cea739842d30c188d3a7d2adf4410955c8668eb3de4a5acab",
    ),
    "MSD": (
        "87f3e0f3550c8d3bafc840374003e5c8af5eeb5ecf6add61af09a7822d3282c8",
        "8579734ee6388f799ed0def4bbd0d1fdcbeaf213ef2a9dc860917bd76a303de6",
    ),
}
_N_FFT, _HOP, _N_MELS = 512, 256, 96
_PATCH = 187  # frames: the 3 seconds it was trained on
_EPS = 1e-3  # of TensorFlow's batch normalization
_KERNELS = ((7, 38), (7, 67), (128, 1), (64, 1), (32, 1))
_TIMBRE, _TIME, _MIDDLE, _UNITS = 204, 51, 64, 200


class Musicnn:
    """Embedding: the 200 units before the tags, and 50 tags.

    Clips longer than 3 seconds are cut into pieces of 3 seconds, as the package does, what is left
    over is dropped, and features and logits are averaged over the pieces.

    Args:
        model: "MTT" (trained on MagnaTagATune) or "MSD" (on the Million Song Dataset).
        weights: the wheel, or the folder of the package; None for the installed one.

    Raises:
        ConfigError: if there is no such model.
        DependencyError: if it is not installed.
        MissingComponentError: if there is no such file.
        CheckpointError: if a file's hash is not that of version 0.1.0.
    """

    sample_rate = 16000
    dimension = _UNITS

    def __init__(self, model: str = "MTT", weights: str | Path | None = None) -> None:
        if model not in _HASHES:
            raise ConfigError(f"musicnn {model!r}: unknown; choose {' or '.join(_HASHES)}")
        self.name = f"musicnn-{model}"
        self.weights = _HASHES[model][1]
        self.classes: tuple[str, ...] | None = TAGS[model]
        index, data = (
            _PACKAGE.read(weights, f"{model}_musicnn/{name}", sha256)
            for name, sha256 in zip(_FILES, _HASHES[model], strict=True)
        )
        self._network = musicnn_network(read_bundle(index, data))
        self._filters = mel_bank(_N_FFT, _N_MELS, 0.0, 8000.0)

    @torch.no_grad()
    def embed(self, waveforms: Tensor) -> Embedded:
        """Embed float32 [B, S] at 16 kHz; S is more than 256 samples."""
        mel = mel_power(waveforms.float().cpu(), self._filters, hop=_HOP)
        # the package rounds to float16 here, and overflows at loud clips; nothing is rounded
        x = torch.log10(10000.0 * mel + 1.0)
        pieces = x.split(_PATCH, dim=1)
        if len(pieces) > 1 and pieces[-1].shape[1] < _PATCH:
            pieces = pieces[:-1]
        found = [self._network(piece) for piece in pieces]
        features, logits = (torch.stack(part).mean(0) for part in zip(*found, strict=True))
        return Embedded(features, logits)


class MusicnnNetwork(nn.Module):
    """The network: log-mels to features and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.input_norm = _norm(1, nn.BatchNorm2d)
        widths = [_TIMBRE] * 2 + [_TIME] * 3
        self.front = nn.ModuleList(
            nn.Conv2d(1, n, k) for n, k in zip(widths, _KERNELS, strict=True)
        )
        self.front_norms = nn.ModuleList(_norm(n, nn.BatchNorm2d) for n in widths)
        inputs = [sum(widths), _MIDDLE, _MIDDLE]
        self.middle = nn.ModuleList(nn.Conv1d(n, _MIDDLE, 7, padding=3) for n in inputs)
        self.middle_norms = nn.ModuleList(_norm(_MIDDLE, nn.BatchNorm1d) for _ in inputs)
        pooled = 2 * (sum(widths) + 3 * _MIDDLE)
        self.pooled_norm = _norm(pooled, nn.BatchNorm1d)
        self.dense = nn.Linear(pooled, _UNITS)
        self.dense_norm = _norm(_UNITS, nn.BatchNorm1d)
        self.tags = nn.Linear(_UNITS, 50)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log-mels float32 [B, T, 96] to features [B, 200] and logits [B, 50]."""
        x = self.input_norm(x[:, None])
        parts = []
        for conv, norm, (height, _) in zip(self.front, self.front_norms, _KERNELS, strict=True):
            before = (height - 1) // 2  # an even kernel's longer side is after
            after = height - 1 - before
            y = functional.relu(conv(functional.pad(x, (0, 0, before, after))))
            parts.append(norm(y).amax(3))  # [B, n, T]
        levels = [torch.cat(parts, 1)]
        for i, (conv, norm) in enumerate(zip(self.middle, self.middle_norms, strict=True)):
            y = norm(functional.relu(conv(levels[-1])))
            levels.append(y if i == 0 else y + levels[-1])
        joined = torch.cat(levels, 1)
        # flattened from [B, channels, (maximum, mean)]
        pooled = torch.stack([joined.amax(2), joined.mean(2)], 2).flatten(1)
        features = self.dense_norm(functional.relu(self.dense(self.pooled_norm(pooled))))
        return features, self.tags(features)


def musicnn_network(tensors: Mapping[str, Tensor]) -> MusicnnNetwork:
    """The network with the weights of a checkpoint.

    Args:
        tensors: by TensorFlow's names (`conv2d_1/kernel`); others, as an optimizer's, are ignored.

    Raises:
        CheckpointError: if a weight is missing, or has another shape.
    """
    state: dict[str, Tensor] = {}
    norms = ["input_norm", *(f"front_norms.{i}" for i in range(5))]
    norms += [*(f"middle_norms.{i}" for i in range(3)), "pooled_norm", "dense_norm"]
    parts = {"gamma": "weight", "beta": "bias"}
    parts |= {"moving_mean": "running_mean", "moving_variance": "running_var"}
    try:
        for i, ours in enumerate(norms):
            for theirs, part in parts.items():
                state[f"{ours}.{part}"] = tensors[f"{_numbered('batch_normalization', i)}/{theirs}"]
            state[f"{ours}.num_batches_tracked"] = torch.tensor(0)
        for i in range(8):
            theirs = _numbered("conv2d", i)
            kernel = tensors[f"{theirs}/kernel"].permute(3, 2, 0, 1)  # [out, in, height, width]
            # the middle's kernels span all features of a frame: channels of a 1-D convolution
            ours = f"front.{i}" if i < 5 else f"middle.{i - 5}"
            state[f"{ours}.weight"] = kernel if i < 5 else kernel[:, 0].transpose(1, 2)
            state[f"{ours}.bias"] = tensors[f"{theirs}/bias"]
        for i, ours in enumerate(("dense", "tags")):
            state[f"{ours}.weight"] = tensors[f"{_numbered('dense', i)}/kernel"].T
            state[f"{ours}.bias"] = tensors[f"{_numbered('dense', i)}/bias"]
    except KeyError as error:
        raise CheckpointError(
            f"musicnn: the checkpoint has no {error}; give one of MTT_musicnn or MSD_musicnn"
        ) from error
    return build(MusicnnNetwork, state, "musicnn", dtype=torch.float32)


def _norm(features: int, kind: type[nn.BatchNorm1d] | type[nn.BatchNorm2d]) -> nn.Module:
    return kind(features, eps=_EPS)


def _numbered(name: str, index: int) -> str:
    """TensorFlow numbers all but the first layer of a kind."""
    return f"{name}_{index}" if index else name
