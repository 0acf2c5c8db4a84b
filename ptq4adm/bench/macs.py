"""How many multiply-adds of one step each backend does: counted at the operators, as they run.

Counted are products with weights: this package's operators by their backend, and PyTorch's own
products and convolutions as ``float`` (layers that stay float, weight-only ones, layers that run in
float16). Attention, which is a product of activations and float everywhere, is not counted, and
neither is what was done ahead of the step (`ptq4adm.nn.prepared`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ptq4adm.ops import dispatch as _registered  # noqa: F401  (the operators)

FLOAT = "float"
BACKENDS = ("cuda", "triton", "cpu", "reference", FLOAT)
_aten = torch.ops.aten


def count_macs(step: Callable[[], Any]) -> dict[str, int]:
    """Multiply-adds with weights of one step, by backend.

    Args:
        step: runs once, in inference mode; it has to call the operators, so neither a replayed CUDA
            graph nor a compiled module.

    Returns:
        Backend, or ``float``, to multiply-adds; only those that did some.
    """
    counting = _Counting()
    # inference mode shows linear layers whole; without it, some would be products of batches, which
    # attention has, too
    with torch.inference_mode(), counting:
        step()
    return dict(counting.macs)


def mac_shares(macs: Mapping[str, int] | None) -> dict[str, float | str]:
    """Columns of a row: ``macs_cuda`` and so on, shares of all multiply-adds with weights.

    Args:
        macs: of `count_macs`; None where they were not counted: the columns are empty.
    """
    if not macs:
        return {f"macs_{name}": "" for name in BACKENDS}
    total = sum(macs.values())
    return {f"macs_{name}": round(macs.get(name, 0) / total, 4) for name in BACKENDS}


def describe_shares(row: Mapping[str, Any]) -> str:
    """Like ``cuda 81 %, triton 12 %, float 7 %``; empty where nothing was counted."""
    shares = {name: row.get(f"macs_{name}", "") for name in BACKENDS}
    return ", ".join(
        f"{name} {100 * float(share):.1f} %"
        for name, share in shares.items()
        if share not in ("", "0.0") and float(share) > 0
    )


class _Counting(TorchDispatchMode):
    """Sees every operator that a step calls."""

    def __init__(self) -> None:
        super().__init__()
        self.macs: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        keywords = kwargs or {}
        packet = getattr(func, "overloadpacket", None)
        if func.namespace != "ptq4adm" and packet not in _PRODUCTS:
            if packet is _aten.scaled_dot_product_attention or not _is_composite(func):
                return func(*args, **keywords)
            with self:
                return func.decompose(*args, **keywords)
        result = func(*args, **keywords)
        if packet in _PRODUCTS:
            self.macs[FLOAT] += _PRODUCTS[packet](result, args)
        elif func._opname in _KERNELS:
            self.macs[keywords["backend"]] += _packed_macs(func._opname, args, keywords, result)
        return result


def _is_composite(func: Any) -> bool:
    """Whether an operator is made of others, which is how inference mode shows it: whole."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    is_composite: bool = func.has_kernel_for_dispatch_key(key)
    return is_composite


_KERNELS = ("w4a8_linear", "w8a8_linear", "w4a8_conv2d", "w8a8_conv2d")


def _packed_macs(name: str, args: tuple[Any, ...], keywords: dict[str, Any], y: Tensor) -> int:
    x_q, w_scale = args[0], args[3]
    x2_q = keywords.get("x2_q")
    channels = x_q.shape[-1] + (0 if x2_q is None else x2_q.shape[-1])
    taps = math.prod(keywords["kernel_size"]) if name.endswith("conv2d") else 1
    # rows of the output, times N before gating, times K
    return y.numel() // y.shape[-1] * w_scale.shape[0] * channels * taps


def _convolution_macs(y: Tensor, args: tuple[Any, ...]) -> int:
    weight = args[1]  # [N, C / groups, kh, kw]; of a transposed one, [C, N / groups, kh, kw]
    is_transposed = len(args) > 6 and args[6]
    rows = args[0] if is_transposed else y
    return rows.numel() * math.prod(weight.shape[1:])


_PRODUCTS: dict[Any, Callable[[Tensor, tuple[Any, ...]], int]] = {
    _aten.linear: lambda y, args: y.numel() * args[0].shape[-1],
    _aten.mm: lambda y, args: y.numel() * args[0].shape[-1],
    _aten.addmm: lambda y, args: y.numel() * args[1].shape[-1],
    _aten.convolution: _convolution_macs,
    _aten._convolution: _convolution_macs,
}
