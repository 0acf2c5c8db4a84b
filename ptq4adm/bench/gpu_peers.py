"""Other libraries' low-bit products on a GPU, each optional and through its public API only."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ptq4adm.bench.gpu_environment import package_version
from ptq4adm.bench.gpu_timing import GpuCall
from ptq4adm.bench.gpu_variant import FP16, GpuVariant, check_close

if TYPE_CHECKING:
    from ptq4adm.bench.gpu_problem import GpuProblem

GEMLITE = "gemlite-a16w4"
_GROUP = 64
_LEVELS = 15  # 4 bits, unsigned
# relative error of 4-bit weights in groups; `peers.base` has the same, but its package needs numpy
INT4_TOLERANCE = 0.25


@cache
def gemlite_missing() -> str | None:
    """Why gemlite cannot run, or None; a broken installation is a reason, too."""
    if importlib.util.find_spec("gemlite") is None:
        return "gemlite not installed: pip install gemlite"
    try:
        importlib.import_module("gemlite.helper")
    except Exception as error:  # noqa: BLE001 - whatever its import runs into is the reason
        return f"gemlite {package_version('gemlite')} cannot be imported: {error}"
    return None


def missing_peers() -> dict[str, str]:
    """Peer to reason, for those that cannot run here."""
    reason = gemlite_missing()
    return {} if reason is None else {GEMLITE: reason}


def peer_versions() -> dict[str, str]:
    """Columns of the rows."""
    version = package_version("gemlite")
    return {"version_gemlite": version} if version else {}


def gemlite_variants(problem: GpuProblem) -> list[GpuVariant]:
    """4-bit weights in groups of 64 and float16 activations, for linear layers."""
    shape = problem.shape
    suits = problem.is_linear and shape.K % _GROUP == 0 and shape.N % 32 == 0
    if not suits or problem.device.type != "cuda" or gemlite_missing() is not None:
        return []
    from gemlite.helper import A16W4_HQQ_INT

    w_q, scales, zeros = asymmetric_groups(problem.float_weight(0).float())
    layers: list[Any] = []

    def run(copy: int) -> Tensor:
        while len(layers) <= copy:
            maker = A16W4_HQQ_INT(device=str(problem.device), dtype=problem.x.dtype)
            layers.append(maker.from_weights(w_q, scales, zeros, bias=problem.bias))
        result: Tensor = layers[copy](problem.x)
        return result

    nbytes = 2 * problem.x.numel() + shape.N * shape.K // 2 + 2 * shape.M * shape.N
    return [
        GpuVariant(
            GEMLITE,
            GpuCall(run, (problem.x,)),
            lambda: check_close(
                f"{GEMLITE} on {shape}",
                problem.pick(run(0)),
                problem.float_rows,
                INT4_TOLERANCE,
            ),
            shape.operations,
            nbytes,
            FP16,
        )
    ]


def asymmetric_groups(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weight as (w_q - zero) * scale in groups of 64 along K.

    Args:
        weight: float32 [N, K].

    Returns:
        w_q: uint8 [N, K], 0..15.
        scales: float32 [N K / 64, 1].
        zeros: the same shape.
    """
    groups = weight.reshape(-1, _GROUP)
    low, high = groups.amin(dim=1, keepdim=True), groups.amax(dim=1, keepdim=True)
    scales = (high - low).clamp(min=1e-8) / _LEVELS
    zeros = -low / scales
    w_q = (groups / scales + zeros).round().clamp(0, _LEVELS).to(torch.uint8)
    return w_q.reshape(weight.shape), scales, zeros
