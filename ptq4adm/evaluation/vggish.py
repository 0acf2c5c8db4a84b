"""VGGish, the embedding of the Frechet audio distance.

Its weights are read from the state dict of the usual port to torch (`features.0.weight` to
`embeddings.4.bias`); the PCA after it is not applied, nor the last ReLU, as in the toolkit that
papers on text to audio use. That toolkit takes every 0.96 seconds as a sample; here a clip is one,
the mean of its pieces, so figures are not those of papers.

Source: Hershey et al., "CNN Architectures for Large-Scale Audio Classification", 2017. It reads
ln(0.01 + mel magnitude) of 64 bins on HTK's scale, frames of 400 by 160 samples.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ptq4adm.errors import ShapeError
from ptq4adm.evaluation.embeddings import Embedded
from ptq4adm.evaluation.weights import file_hash
from ptq4adm.models.assign import build
from ptq4adm.models.pickled import read_tensors

_WINDOW, _HOP, _N_FFT, _N_MELS = 400, 160, 512, 64
_F_MIN, _F_MAX = 125.0, 7500.0
_OFFSET = 0.01
_PIECE = 96  # frames: 0.96 s
_FEWEST = _WINDOW + _HOP * (_PIECE - 1)


class VggishEmbedding:
    """Embedding: 128 features, no classes.

    Args:
        weights: the state dict, as .pth or .safetensors.

    Raises:
        MissingComponentError: if there is no such file.
        CheckpointError: if it is another model's, or holds more than tensors.
    """

    name = "vggish"
    sample_rate = 16000
    dimension = 128
    classes: tuple[str, ...] | None = None

    def __init__(self, weights: str | Path) -> None:
        tensors = {k: t for k, t in read_tensors(weights).items() if not k.startswith("pproc.")}
        self._network = build(Vggish, tensors, str(weights), dtype=torch.float32)
        self.weights = file_hash(weights)
        self._filters = htk_filters()

    @torch.no_grad()
    def embed(self, waveforms: Tensor) -> Embedded:
        """Embed float32 [B, S] at 16 kHz; S is at least 15600 samples (0.975 s)."""
        if waveforms.dim() != 2 or waveforms.shape[1] < _FEWEST:
            raise ShapeError(
                f"waveforms: got {tuple(waveforms.shape)}; {self.name} needs [B, S] of at least "
                f"{_FEWEST} samples; leave out such short clips"
            )
        frames = waveforms.float().cpu().unfold(1, _WINDOW, _HOP) * torch.hann_window(_WINDOW)
        magnitude = torch.fft.rfft(frames, _N_FFT).abs()  # [B, T, 257]
        mel = torch.log(magnitude @ self._filters + _OFFSET)
        pieces = mel.split(_PIECE, dim=1)
        whole = [p for p in pieces if p.shape[1] == _PIECE]
        return Embedded(torch.stack([self._network(p) for p in whole]).mean(0))


class Vggish(nn.Module):
    """The network, under the names of its usual port to torch."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 1
        for widths in ((64,), (128,), (256, 256), (512, 512)):
            for width in widths:
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
                inputs = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.embeddings = nn.Sequential(
            nn.Linear(512 * 6 * 4, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(),
            nn.Linear(4096, 128),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Log-mels float32 [B, 96, 64] to features [B, 128]."""
        x = self.features(x[:, None])
        # flattened channels last, as the weights were trained
        features: Tensor = self.embeddings(x.permute(0, 2, 3, 1).flatten(1))
        return features


def htk_filters() -> Tensor:
    """Triangles of height 1, linear on HTK's mel scale, float32 [257, 64]; bin 0 is unused."""
    mel = 1127.0 * torch.log1p(torch.linspace(0.0, 8000.0, _N_FFT // 2 + 1).double() / 700.0)
    ends = 1127.0 * torch.log1p(torch.tensor([_F_MIN, _F_MAX], dtype=torch.float64) / 700.0)
    edges = torch.linspace(float(ends[0]), float(ends[1]), _N_MELS + 2, dtype=torch.float64)
    up = (mel[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    down = (edges[2:] - mel[:, None]) / (edges[2:] - edges[1:-1])
    filters = torch.minimum(up, down).clamp(min=0.0)
    filters[0] = 0.0
    return filters.float()
