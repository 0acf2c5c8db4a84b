"""GPTQ: weights are rounded one after the other, and those to come make up for the error.

With H = X X^T over inputs X [K, M] of a layer, rows w are rounded to values q so that

    (q - w) H (q - w)^T                                                                     (1)

is small: once w_k is rounded, the best change of the weights that are still free is known in closed
form. With U upper triangular and H^-1 = U^T U it is, for k = 1, 2, ...

    e_k = (w_k - q_k) / U_kk,   w_j <- w_j - e_k U_kj   for j > k                           (2)

U needs no inverse of H: with J the reversal of order and J H J = L L^T, U = J L^-1 J. An input
that is always zero has no say in (1): its weight is rounded to nearest, and so is a padded zero,
exactly.

Source: GPTQ (Frantar et al., ICLR 2023). `shift_target` is the closed form of the same problem
where the layer reads other inputs than its float twin.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ptq4adm.errors import ConfigError, NonFiniteError, ShapeError
from ptq4adm.packing.layout import expand_multipliers
from ptq4adm.quant.affine import QMAX, QMIN, QuantizedRows

# float64 up to this K: beyond it a factor takes gigabytes, and (2) loses little in float32
_LARGEST_DOUBLE = 4096
_MOST_DAMP = 1e4


def gptq_rows(
    rows: Tensor,
    hessian: Tensor,
    start: QuantizedRows,
    *,
    bits: int,
    damp: float = 0.01,
    block: int = 128,
    act_order: bool = True,
) -> QuantizedRows:
    """Integers of weight rows for given scales.

    Args:
        rows: float32 [N, K] to be approximated, in the order of `packing.layout`.
        hessian: float32 or float64 [K, K], X X^T up to a factor.
        start: whose scales, and multipliers, are taken.
        bits: 4 or 8.
        damp: added to the diagonal of H, as a share of its mean over the inputs that are not always
            zero.
        block: columns after which the rest is updated at once; changes no result but rounding.
        act_order: round weights of large inputs first; False takes them in the order of K.

    Returns:
        `start` with other integers.

    Raises:
        ShapeError: if the sizes do not fit.
        ConfigError: if bits, damp or block are out of range.
        NonFiniteError: if an argument holds NaN or infinite values.
    """
    _check(rows, hessian, start, bits, damp, block)
    scale = _scales(start)
    w_q = (rows / scale).round_().clamp_(QMIN[bits], QMAX[bits]).to(torch.int8)
    diagonal = hessian.diagonal()
    alive = torch.nonzero(diagonal > 0).flatten()
    if act_order:
        alive = alive[diagonal[alive].argsort(descending=True, stable=True)]
    if alive.numel():
        upper = _upper_factor(hessian[alive[:, None], alive], damp).to(torch.float32)
        w_q[:, alive] = _sweep(rows[:, alive], scale[:, alive], upper, bits, block)
    return replace(start, w_q=w_q)


def shift_target(rows: Tensor, hessian: Tensor, cross: Tensor, *, damp: float = 0.01) -> Tensor:
    """Weights that come closest to the float layer's output where the inputs are others.

        argmin_V |W X - V Z|^2 + r |V - W|^2 = W + W (C - H) (H + r)^-1                     (3)

    with H = Z Z^T, C = X Z^T; r is `damp` times the mean of H's diagonal.

    Args:
        rows: W, float32 [N, K].
        hessian: H, [K, K], of the inputs that the layer will read.
        cross: C, [K, K], the float inputs times them.
        damp: as in `gptq_rows`.

    Returns:
        float32 [N, K]; `rows` where an input is always zero.

    Raises:
        ShapeError: if the sizes do not fit.
    """
    K = rows.shape[1]
    if tuple(hessian.shape) != (K, K) or tuple(cross.shape) != (K, K):
        raise ShapeError(
            f"hessian {list(hessian.shape)}, cross {list(cross.shape)}: need [{K}, {K}] for rows "
            f"{list(rows.shape)}"
        )
    alive = torch.nonzero(hessian.diagonal() > 0).flatten()
    if not alive.numel():
        return rows.clone()
    H = hessian[alive[:, None], alive]
    pull = rows.to(H.dtype) @ (cross[:, alive] - hessian[:, alive])  # [N, alive]
    upper = _upper_factor(H, damp)
    shifted = rows.clone()
    shifted[:, alive] += ((pull.to(upper.dtype) @ upper.T) @ upper).to(rows.dtype)
    return shifted


def output_error(rows: Tensor, quantized: QuantizedRows, hessian: Tensor) -> Tensor:
    """Equation (1) of each row, float64 [N]."""
    difference = rows.double() - quantized.dequantize().double()
    return ((difference @ hessian.double()) * difference).sum(dim=1)


def _check(
    rows: Tensor, hessian: Tensor, start: QuantizedRows, bits: int, damp: float, block: int
) -> None:
    if bits not in QMAX:
        raise ConfigError(f"bits: got {bits}, needs 4 or 8")
    if not 0 < damp < float("inf") or block < 1:
        raise ConfigError(f"damp {damp}, block {block}: need more than 0, and at least 1")
    K = rows.shape[1] if rows.dim() == 2 else -1
    if tuple(hessian.shape) != (K, K) or start.w_q.shape != rows.shape:
        raise ShapeError(
            f"rows {list(rows.shape)}, hessian {list(hessian.shape)}, start "
            f"{list(start.w_q.shape)}: need [N, K], [K, K], [N, K]"
        )
    for name, tensor in (("rows", rows), ("hessian", hessian)):
        if not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(f"{name} {list(tensor.shape)} hold NaN or infinite values")


def _scales(quantized: QuantizedRows) -> Tensor:
    """Scale of every weight, float32 [N, K]."""
    scale = quantized.w_scale[:, None]
    if quantized.w_mult is None:
        return scale.expand(quantized.w_q.shape)
    return expand_multipliers(quantized.w_mult).to(torch.float32) * scale


def _upper_factor(hessian: Tensor, damp: float) -> Tensor:
    """U of equation (2) for H + r, float64 or, where that is too large, float32 [K, K].

    r grows tenfold until H + r is positive definite in the arithmetic at hand.
    """
    K = hessian.shape[0]
    dtype = torch.float64 if K <= _LARGEST_DOUBLE else torch.float32
    mean = float(hessian.diagonal().double().mean())
    # scaled so that tiny inputs do not underflow
    reversed_ = (hessian.flip(0, 1).to(dtype) / mean).contiguous()
    diagonal = reversed_.diagonal().clone()
    while damp <= _MOST_DAMP:
        reversed_.diagonal().copy_(diagonal + damp)
        lower, info = torch.linalg.cholesky_ex(reversed_)
        if not int(info):
            eye = torch.eye(K, dtype=dtype, device=hessian.device)
            inverse = torch.linalg.solve_triangular(lower, eye, upper=False)
            return inverse.flip(0, 1) / mean**0.5
        damp *= 10
    raise NonFiniteError(
        f"hessian [{K}, {K}] is not that of any inputs: not positive definite; record inputs again"
    )


def _sweep(rows: Tensor, scale: Tensor, upper: Tensor, bits: int, block: int) -> Tensor:
    """Equation (2) over all columns: int8 [N, K]."""
    rest = rows.clone()
    w_q = torch.empty(rows.shape, dtype=torch.int8, device=rows.device)
    for first in range(0, rows.shape[1], block):
        last = min(first + block, rows.shape[1])
        part, errors = rest[:, first:last], torch.empty_like(rest[:, first:last])
        inside = upper[first:last, first:last]
        for k in range(last - first):
            w, s = part[:, k], scale[:, first + k]
            q = (w / s).round_().clamp_(QMIN[bits], QMAX[bits])
            w_q[:, first + k] = q.to(torch.int8)
            errors[:, k] = (w - q * s) / inside[k, k]
            part[:, k + 1 :].addr_(errors[:, k], inside[k, k + 1 :], alpha=-1)
        rest[:, last:].addmm_(errors, upper[first:last, last:], alpha=-1)
    return w_q
