"""What every peer provides, and what they share."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ptq4adm.bench.problem import Problem, Variant

FLOAT_TOLERANCE = 1e-3
INT8_TOLERANCE = 0.06
INT4_TOLERANCE = 0.25
INSTALL_HINT = "pip install 'ptq4adm[bench]'"


class Peer(Protocol):
    """A library that computes the same layers.

    Attributes:
        name: first part of its variants' names.
    """

    name: str

    def missing(self) -> str | None:
        """Why it cannot run here and what to do, or None."""

    def version(self) -> str:
        """Version of the library, or an empty string if it is not installed."""

    def variants(self, problem: Problem) -> list[Variant]:
        """Its ways to compute a layer; empty if it has none for this kind."""


@dataclass(frozen=True)
class Affine:
    """Asymmetric 8-bit quantization of activations: real = (q - zero_point) * scale.

    Attributes:
        scale: step.
        zero_point: integer that stands for 0.
    """

    scale: float
    zero_point: int

    @classmethod
    def of(cls, tensor: Tensor, *, levels: int = 255) -> Affine:
        """From the smallest and largest value; zero is representable.

        Args:
            tensor: float32.
            levels: largest integer; 127 keeps pairs of products within int16, which processors
                without VNNI need.
        """
        low, high = min(0.0, float(tensor.min())), max(0.0, float(tensor.max()))
        scale = max(high - low, 1e-8) / levels
        return cls(scale, round(-low / scale))


def symmetric_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weight as int8 in [-127, 127] with one step an output channel.

    Returns:
        w_q: int8, of the weight's shape.
        w_scale: float32 [N].
    """
    w_scale = weight.flatten(1).abs().amax(dim=1) / 127
    shape = (-1, *(1,) * (weight.dim() - 1))
    return torch.round(weight / w_scale.reshape(shape)).to(torch.int8), w_scale


def package_version(package: str) -> str:
    """Installed version, or an empty string."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def missing_packages(*packages: str) -> str | None:
    """Why a peer cannot run, or None if all its packages can be found."""
    lacking = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"{', '.join(lacking)} not installed: {INSTALL_HINT}" if lacking else None
