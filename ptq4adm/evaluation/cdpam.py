"""CDPAM, a perceptual metric's embedding of speech and sound, from the package cdpam 0.0.6.

Its weights are a pickle of Python 2's time in the package's wheel, which torch's own restricted
unpickler cannot read. The bytes are hashed first; then they are unpickled with nothing but tensors
allowed. The package is never imported. It computes on samples at full rate, and is slow.

Source: Manocha et al., "CDPAM: Contrastive Learning for Perceptual Audio Similarity", 2021: 16
convolutions of 15 taps, every fourth halves the rate and doubles the channels, mean over time; the
first half of the channels is what is heard, the second what is said.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ptq4adm.errors import (
    CheckpointError,
    ShapeError,
    UnsafeCheckpointError,
)
from ptq4adm.evaluation.embeddings import Embedded
from ptq4adm.evaluation.wheels import WeightsPackage
from ptq4adm.models.assign import build
from ptq4adm.models.pickled import take

_PACKAGE = WeightsPackage("cdpam", "0.0.6")
_FILE = "CDPAM_trained/scratchJNDdefault_best_model.pth"
_HASH = "453c8b6edee1a94f0120236156436ff28fe4d8d884485e4a67695c8e8570bdfe"
_LAYERS, _WIDTH, _TAPS = 16, 64, 15
_FULL_SCALE = 32768.0  # it was trained on 16-bit integers
_ALLOWED = {
    ("collections", "OrderedDict"),
    ("torch", "FloatStorage"),
    ("torch", "LongStorage"),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"),
}


class CdpamEmbedding:
    """Embedding: 512 features of what is heard, of length 1; no classes.

    Args:
        weights: the wheel, or the folder of the package; None for the installed one.

    Raises:
        DependencyError: if it is not installed.
        MissingComponentError: if there is no such file.
        CheckpointError: if the file's hash is not that of version 0.0.6.
    """

    name = "cdpam"
    weights = _HASH
    sample_rate = 22050
    dimension = 512
    classes: tuple[str, ...] | None = None

    def __init__(self, weights: str | Path | None = None) -> None:
        content = _PACKAGE.read(weights, _FILE, _HASH)
        self._network = cdpam_network(read_old_pickle(content, "state"))

    @torch.no_grad()
    def embed(self, waveforms: Tensor) -> Embedded:
        """Embed float32 [B, S] at 22.05 kHz."""
        if waveforms.dim() != 2 or not waveforms.shape[1]:
            raise ShapeError(f"waveforms: got {tuple(waveforms.shape)}; [B, S] is needed")
        x = (waveforms.float().cpu() * _FULL_SCALE).round()
        heard = self._network(x).chunk(2, dim=1)[0]
        return Embedded(functional.normalize(heard, dim=1))


class CdpamNetwork(nn.Module):
    """The encoder, under the names of the file."""

    def __init__(self) -> None:
        super().__init__()
        widths = [_WIDTH << ((i + 1) // 4) for i in range(_LAYERS)]
        inputs = [1, *widths[:-1]]
        # a stride takes every second sample, as the original does afterwards
        strides = [2 if (i + 1) % 4 == 0 else 1 for i in range(_LAYERS)]
        self.encoder = nn.ModuleList(
            nn.Conv1d(n, width, _TAPS, stride, _TAPS // 2)
            for n, width, stride in zip(inputs, widths, strides, strict=True)
        )
        self.ebatch = nn.ModuleList(nn.BatchNorm1d(width) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        """Samples float32 [B, S] to [B, 1024]."""
        x = x[:, None]
        for conv, norm in zip(self.encoder, self.ebatch, strict=True):
            x = functional.leaky_relu(norm(conv(x)), 0.1)
        return x.mean(2)


def cdpam_network(tensors: Mapping[str, Tensor]) -> CdpamNetwork:
    """The encoder with the weights of the whole metric.

    Raises:
        CheckpointError: if a weight is missing, or has another shape.
    """
    return build(CdpamNetwork, take(tensors, "base_encoder."), "cdpam", dtype=torch.float32)


def read_old_pickle(content: bytes, entry: str) -> dict[str, Tensor]:
    """The state dict in a file that `torch.save` of an old PyTorch wrote.

    Args:
        content: of the file.
        entry: key of the state dict.

    Raises:
        UnsafeCheckpointError: if it asks for more than tensors; nothing of it was run.
        CheckpointError: if it is something else, or cut short.
    """
    module = SimpleNamespace(
        __name__="tensors",
        Unpickler=_TensorUnpickler,
        load=lambda file, **kw: _TensorUnpickler(file, **kw).load(),
    )
    try:
        # the names that _TensorUnpickler allows are all that is called
        found = torch.load(
            io.BytesIO(content), map_location="cpu", weights_only=False, pickle_module=module
        )
        state = found[entry]
    except UnsafeCheckpointError:
        raise
    except (
        pickle.UnpicklingError,
        EOFError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as e:
        raise CheckpointError(
            f"{len(content)} bytes: cut short, or no state dict under {entry!r} ({e}); "
            "copy it again"
        ) from e
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


class _TensorUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise UnsafeCheckpointError(
                f"it asks for {module}.{name}, more than tensors, which is refused, and nothing of "
                "it was run; get the file from its authors"
            )
        return super().find_class(module, name)
