"""A packed weight as float16 and back: the third form a quantized layer's weight may be kept in.

    weight[n, k] = float16(w_q[n, k] * w_mult[n, k / 64] * w_scale[n])

float16 keeps 11 bits of a product whose integer has 8 at most, so dividing by the scale and
rounding gives the integers back: the packed weight need not be kept beside. Where that fails (a
scale that leaves the range of float16), the weight is refused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq4adm.errors import RangeError
from ptq4adm.packing.layout import BLOCK_K, KLayout, pack_int4, rows_to_weight, weight_to_rows
from ptq4adm.quant.affine import QuantizedRows

_LIMITS = {4: (-8, 7), 8: (-128, 127)}


def decode_half(rows: QuantizedRows, layout: KLayout, bits: int) -> Tensor:
    """The weight that integers stand for, in float16.

    Args:
        rows: canonical.
        layout: of the layer.
        bits: 4 or 8.

    Returns:
        float16 [N, C, kh, kw] in channels_last memory.

    Raises:
        RangeError: if the integers could not be found again.
    """
    weight = rows_to_weight(rows.dequantize().to(torch.float16), layout)
    weight = weight.contiguous(memory_format=torch.channels_last)
    found = _integers(weight, rows.w_scale, rows.w_mult, layout, bits)
    if not torch.equal(found, rows.w_q):
        raise RangeError(
            f"weight {list(weight.shape)}: its integers cannot be found again from float16 (scales "
            f"{float(rows.w_scale.min()):.3g} to {float(rows.w_scale.max()):.3g}); keep it packed"
        )
    return weight


def encode_half(
    weight: Tensor, w_scale: Tensor, w_mult: Tensor | None, layout: KLayout, bits: int
) -> Tensor:
    """Undo `decode_half`, bit for bit.

    Args:
        weight: float16 [N, C, kh, kw].
        w_scale: float32 [N].
        w_mult: None, or uint8 [N, Kp / 64].
        layout: of the layer.
        bits: 4 or 8.

    Returns:
        The canonical weight, uint8 [N, Kp / 2] or int8 [N, Kp].
    """
    found = _integers(weight, w_scale, w_mult, layout, bits)
    return pack_int4(found) if bits == 4 else found


def _integers(
    weight: Tensor, w_scale: Tensor, w_mult: Tensor | None, layout: KLayout, bits: int
) -> Tensor:
    """int8 [N, Kp]."""
    rows = weight_to_rows(weight.to(torch.float32), layout) / w_scale[:, None]
    if w_mult is not None:
        rows = rows / w_mult.to(torch.float32).repeat_interleave(BLOCK_K, dim=1)
    low, high = _LIMITS[bits]
    return torch.round(torch.nan_to_num(rows)).clamp(low, high).to(torch.int8)
