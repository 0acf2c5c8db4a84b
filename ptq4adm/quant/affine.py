"""Symmetric weight quantization by plain rounding, one scale an output channel.

    w_q[n, k] = clamp(rint(w[n, k] / s[n, k]), qmin, qmax),   w ~ w_q * s                     (1)

`s[n, k]` is `w_scale[n]`, or `w_scale[n] * w_mult[n, k // 64]` in group mode, where `w_mult` is an
integer in 1 .. 15, so that `w_q * w_mult` is still an int8 and one int32 accumulation still covers
all of K.

Rows come in the order of `packing.layout` (padded with zeros, which every scale represents
exactly). Rounding that looks at activations does not belong here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq4adm.errors import ConfigError, NonFiniteError, ShapeError
from ptq4adm.packing.layout import BLOCK_K

QMIN = {4: -8, 8: -127}
QMAX = {4: 7, 8: 127}
MAX_MULT = 15
# a channel of zeros still needs a scale that divides
_SMALLEST_ABSMAX = 1e-8
# clip ratios relative to never clipping; long Gaussian rows want about 0.65 at 4 bits and 0.95 at 8
_CLIP_RATIOS = {4: torch.linspace(0.3, 1.0, 71), 8: torch.linspace(0.5, 1.0, 51)}
# the largest group gets multiplier 15; moving the channel scale a little around that lets the
# others round better
_BASE_RATIOS = torch.linspace(0.88, 1.12, 7).tolist()
# elements searched at once: below the size at which torch splits an operation over threads
_CHUNK = 16384
_ROUNDER = 1.5 * 2**23
# searches, of weights and activations alike: the power of |error| whose sum they make least
ERROR_POWERS = {"squared_error": 2.0, "p2.4": 2.4}


@dataclass(frozen=True)
class QuantizedRows:
    """One weight as integers.

    Attributes:
        w_q: int8 [N, K] in [QMIN, QMAX] of the bit width.
        w_scale: float32 [N], above 0.
        w_mult: None, or uint8 [N, K / 64] in 1 .. 15.
    """

    w_q: Tensor
    w_scale: Tensor
    w_mult: Tensor | None = None

    def dequantize(self) -> Tensor:
        """float32 [N, K], equation (1)."""
        w_int = self.w_q.to(torch.float32)
        if self.w_mult is not None:
            w_int = w_int * self.w_mult.to(torch.float32).repeat_interleave(BLOCK_K, dim=1)
        return w_int * self.w_scale[:, None]


def quantize_rows(
    rows: Tensor,
    *,
    bits: int,
    observer: str = "squared_error",
    group_size: int | None = None,
) -> QuantizedRows:
    """Quantize weight rows by plain rounding.

    Args:
        rows: float [N, K]; K a multiple of 64 in group mode.
        bits: 4 or 8.
        observer: "absmax" takes the scale that clips nothing; "squared_error" the one of a grid of
            clip ratios (0.30 to 1.00 in steps of 0.01; from 0.50 at 8 bits) whose squared error
            over the row is least; "p2.4" the one whose sum of |error|^2.4 is, which clips less.
        group_size: None, or 64 (4 bits only).

    Returns:
        The integers and their scales.

    Raises:
        ShapeError: if `rows` has another rank, or K does not fit the groups.
        ConfigError: for other bits, observer or group size.
        NonFiniteError: if a weight is NaN or infinite.
    """
    _check_arguments(rows, bits, observer, group_size)
    rows = rows.detach().to(torch.float32)
    if not bool(torch.isfinite(rows).all()):
        raise NonFiniteError(
            f"weight rows {list(rows.shape)} hold NaN or infinite values; repair the model first"
        )
    if group_size is not None:
        return _quantize_groups(rows, observer)
    w_scale = _choose_scale(rows, bits, observer)
    return QuantizedRows(_round(rows, w_scale, bits), w_scale)


def quantization_error(rows: Tensor, quantized: QuantizedRows) -> Tensor:
    """Squared error of each row, float32 [N]."""
    return (rows.to(torch.float32) - quantized.dequantize()).square().sum(dim=1)


def _check_arguments(rows: Tensor, bits: int, observer: str, group_size: int | None) -> None:
    if bits not in QMAX:
        raise ConfigError(f"bits: got {bits}, needs 4 or 8")
    if observer != "absmax" and observer not in ERROR_POWERS:
        names = " or ".join(repr(name) for name in ("absmax", *ERROR_POWERS))
        raise ConfigError(f"weight observer: got {observer!r}, needs {names}")
    if rows.dim() != 2:
        raise ShapeError(
            f"weight rows: got shape {list(rows.shape)}, needs [N, K]; use weight_to_rows"
        )
    if group_size is None:
        return
    if group_size != BLOCK_K or bits != 4:
        raise ConfigError(
            f"group_size {group_size} at {bits} bits: groups are {BLOCK_K} wide and for 4-bit "
            "weights; "
            "use group_size=None"
        )
    if rows.shape[1] % BLOCK_K:
        raise ShapeError(
            f"weight rows: K = {rows.shape[1]} is not a multiple of {BLOCK_K}; use weight_to_rows"
        )


def _absmax(rows: Tensor) -> Tensor:
    return rows.abs().amax(dim=1).clamp_min(_SMALLEST_ABSMAX)  # [N]


def _round(rows: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Equation (1) with one scale a row: int8 [N, K]."""
    return (rows / scale[:, None]).round_().clamp_(QMIN[bits], QMAX[bits]).to(torch.int8)


def _choose_scale(rows: Tensor, bits: int, observer: str) -> Tensor:
    """Scale of each row, float32 [N]; the search is an exact minimum over the grid."""
    full = _absmax(rows) / QMAX[bits]
    if observer == "absmax":
        return full
    candidates = full[:, None] * _CLIP_RATIOS[bits].to(full.device)  # [N, C]
    power = ERROR_POWERS[observer]
    best = _grid_errors(rows, candidates, bits, power).argmin(dim=1, keepdim=True)
    return candidates.gather(1, best)[:, 0]


def _grid_errors(rows: Tensor, scales: Tensor, bits: int, power: float) -> Tensor:
    """Sum of |error|^power of each row under each of its C scales, float32 [N, C].

    Args:
        rows: float32 [N, K].
        scales: float32 [N, C], above 0, at least a hundredth of the scale that clips nothing.
        bits: 4 or 8.
        power: 2, or any number above 0.
    """
    errors = torch.empty_like(scales)
    step = max(1, _CHUNK // rows.shape[1])
    for start in range(0, rows.shape[0], step):
        part = rows[start : start + step]
        for i in range(scales.shape[1]):
            scale = scales[start : start + step, i : i + 1]
            # adding and taking away 1.5 * 2**23 rounds to the nearest integer, ties to even, as
            # `round_` does; torch splits that one over threads even when it is tiny, at 10 times
            # the cost of the whole search
            w_q = (part / scale).add_(_ROUNDER).sub_(_ROUNDER).clamp_(QMIN[bits], QMAX[bits])
            error = w_q.mul_(scale).sub_(part)
            # a product is exact where it can be, and ten times cheaper than a power
            raised = error.mul_(error) if power == 2.0 else error.abs_().pow_(power)
            errors[start : start + step, i] = raised.sum(dim=1)
    return errors


def _quantize_groups(rows: Tensor, observer: str) -> QuantizedRows:
    """4 bits, a multiplier a group: the best channel scale of 7, each with its multipliers."""
    N, K = rows.shape
    groups = rows.reshape(N * (K // BLOCK_K), BLOCK_K)
    wanted = _choose_scale(groups, 4, observer).view(N, -1)  # [N, G]
    base = wanted.amax(dim=1) / MAX_MULT  # the largest group gets multiplier 15
    if observer == "absmax":
        # the tolerance keeps an exact multiple from being pushed up by rounding of the division
        mult = (wanted / base[:, None] - 1e-4).ceil().clamp(1, MAX_MULT)
        return _finish_groups(groups, base, mult)
    mults = torch.arange(1, MAX_MULT + 1, dtype=torch.float32, device=rows.device)
    least = torch.full((N,), torch.inf, device=rows.device)
    best_base, best_mult = base.clone(), torch.ones_like(wanted)
    for ratio in _BASE_RATIOS:
        candidate = base * ratio
        scales = (candidate[:, None, None] * mults).expand(N, wanted.shape[1], MAX_MULT)
        grid = scales.reshape(-1, MAX_MULT)
        errors, index = _grid_errors(groups, grid, 4, ERROR_POWERS[observer]).min(dim=1)
        total = errors.view(N, -1).sum(dim=1)
        better = total < least
        least = torch.where(better, total, least)
        best_base = torch.where(better, candidate, best_base)
        best_mult = torch.where(better[:, None], mults[index].view(N, -1), best_mult)
    return _finish_groups(groups, best_base, best_mult)


def _finish_groups(groups: Tensor, base: Tensor, mult: Tensor) -> QuantizedRows:
    N, G = mult.shape
    scale = (base[:, None] * mult).reshape(-1)
    w_q = _round(groups, scale, 4).view(N, G * BLOCK_K)
    return QuantizedRows(w_q, base, mult.to(torch.uint8))
