"""Cnn14_16k of PANNs, the embedding that papers on text to audio report distances in.

Its published file, `Cnn14_16k_mAP=0.438.pth`, is a user's to fetch; it is read without running code
of it, and every name and shape is checked.

Source: Kong et al., "PANNs: Large-Scale Pretrained Audio Neural Networks", 2020: six blocks of two
3 x 3 convolutions, mean over frequency, maximum plus mean over time, one dense layer of 2048.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from ptq4adm.errors import ShapeError
from ptq4adm.evaluation.embeddings import Embedded
from ptq4adm.evaluation.mel import mel_bank, mel_power
from ptq4adm.evaluation.weights import file_hash
from ptq4adm.models.assign import build
from ptq4adm.models.pickled import read_tensors

_N_FFT, _HOP, _N_MELS, _F_MIN, _F_MAX = 512, 160, 64, 50.0, 8000.0
_CLASSES = 527
_WIDTHS = (64, 128, 256, 512, 1024, 2048)
_FLOOR = 1e-10  # of a mel energy
# five of six blocks halve the frames
_FEWEST_FRAMES = 2**5
# what the file holds besides: constants of its front end, which are computed here
_VARIANCE = ".running_var"
_FRONT = ("spectrogram_extractor.", "logmel_extractor.")


class Cnn14Embedding:
    """Embedding: 2048 features, 527 classes of AudioSet by their numbers.

    Args:
        weights: the published .pth file, or its state dict as .safetensors.

    Raises:
        MissingComponentError: if there is no such file.
        CheckpointError: if it is another model's, or holds more than tensors.
    """

    name = "cnn14-16k"
    sample_rate = 16000
    dimension = _WIDTHS[-1]
    classes: tuple[str, ...] | None = tuple(f"AudioSet {i}" for i in range(_CLASSES))

    def __init__(self, weights: str | Path) -> None:
        tensors = {
            name: tensor
            for name, tensor in read_tensors(weights, entry="model").items()
            if not name.startswith(_FRONT)
        }
        # the count of training steps is never read, and old files lack it
        norms = [name.removesuffix(_VARIANCE) for name in tensors if name.endswith(_VARIANCE)]
        tensors |= {f"{norm}.num_batches_tracked": torch.tensor(0) for norm in norms}
        self._network = build(Cnn14, tensors, str(weights), dtype=torch.float32)
        self.weights = file_hash(weights)
        self._filters = mel_bank(_N_FFT, _N_MELS, _F_MIN, _F_MAX)

    @torch.no_grad()
    def embed(self, waveforms: Tensor) -> Embedded:
        """Embed float32 [B, S] at 16 kHz; S is at least 4960 samples (0.31 s)."""
        if waveforms.dim() != 2 or waveforms.shape[1] < _HOP * (_FEWEST_FRAMES - 1):
            raise ShapeError(
                f"waveforms: got {tuple(waveforms.shape)}; {self.name} needs [B, S] of at least "
                f"{_HOP * (_FEWEST_FRAMES - 1)} samples; leave out such short clips"
            )
        mel = mel_power(waveforms.float().cpu(), self._filters, hop=_HOP)
        features, logits = self._network(10.0 * torch.log10(mel.clamp(min=_FLOOR)))
        return Embedded(features, logits)


class Cnn14(nn.Module):
    """The network, under the names of the published file."""

    def __init__(self) -> None:
        super().__init__()
        self.bn0 = nn.BatchNorm2d(_N_MELS)
        inputs = (1, *_WIDTHS)
        for i, width in enumerate(_WIDTHS):
            self.add_module(f"conv_block{i + 1}", _Block(inputs[i], width))
        self.fc1 = nn.Linear(_WIDTHS[-1], _WIDTHS[-1])
        self.fc_audioset = nn.Linear(_WIDTHS[-1], _CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log-mels in dB, float32 [B, T, 64], to features [B, 2048] and logits [B, 527]."""
        x = self.bn0(x[:, None].transpose(1, 3)).transpose(1, 3)  # normalized for each mel bin
        for i in range(len(_WIDTHS)):
            x = self.get_submodule(f"conv_block{i + 1}")(x)
            if i + 1 < len(_WIDTHS):
                x = functional.avg_pool2d(x, 2)
        x = x.mean(3)
        features = functional.relu(self.fc1(x.amax(2) + x.mean(2)))
        return features, self.fc_audioset(features)


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(x)))
