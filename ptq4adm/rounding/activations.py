"""A layer's input as its packed form reads it, and as the columns that its weight multiplies."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptq4adm.errors import NonFiniteError
from ptq4adm.ops.reference import quantize_int8
from ptq4adm.packing.layout import weight_to_rows
from ptq4adm.quant.layers import conv_padding
from ptq4adm.rounding.task import LayerTask


def fake_quantize(task: LayerTask, x: Tensor, timestep: float) -> Tensor:
    """The input that the packed layer computes with: int8 of each segment, times its scale.

    Args:
        task: the layer.
        x: its input, channels in the second place for a convolution, in the last for a linear.
        timestep: of the call.

    Raises:
        NonFiniteError: if the input is NaN or infinite; names the layer.
        UncalibratedStepError: if the timestep's bucket has no scales.
    """
    is_conv = isinstance(task.layer, nn.Conv2d)
    row = 0 if task.buckets is None else task.buckets.check(timestep)
    dim = 1 if is_conv else -1
    parts = []
    for i, part in enumerate(x.split(task.layout.segments, dim=dim)):
        scale = None if task.x_scale is None else task.x_scale[i, row]
        try:
            x_q, used = quantize_int8(
                part, x_scale=scale, granularity="tensor" if is_conv else "row"
            )
        except NonFiniteError as error:
            raise NonFiniteError(
                f"layer {task.name!r} at timestep {timestep:g}: {error}"
            ) from error
        parts.append(x_q.to(x.dtype) * (used.unsqueeze(-1) if used.dim() else used))
    return torch.cat(parts, dim=dim)


def columns(task: LayerTask, x: Tensor, most: int, seed: int) -> Tensor:
    """Inputs that one output sees, float32 [M, K] in the order of `weight.flatten(1)`.

    Args:
        task: the layer.
        x: its input.
        most: positions kept of every sample, drawn by `seed`.
        seed: of the draw.
    """
    layer = task.layer
    if isinstance(layer, nn.Linear):
        found = x.reshape(x.shape[0], -1, x.shape[-1])  # [B, L, K]
        return found[:, _kept(found.shape[1], most, seed, x.device)].flatten(0, 1)
    unfolded = nn.functional.unfold(
        x,
        layer.kernel_size,
        dilation=layer.dilation,
        padding=conv_padding(layer),
        stride=layer.stride,
    )  # [B, K, L]
    kept = unfolded[:, :, _kept(unfolded.shape[2], most, seed, x.device)]
    return kept.transpose(1, 2).flatten(0, 1)


def packed_positions(task: LayerTask) -> Tensor:
    """Where each k of the packed order is in `weight.flatten(1)`; -1 for padding, int64 [Kp]."""
    K = task.layout.k
    shape = (1, task.layout.in_channels, *task.layout.kernel_size)
    return weight_to_rows(torch.arange(1, K + 1).reshape(shape), task.layout)[0] - 1


def _kept(count: int, most: int, seed: int, device: torch.device) -> Tensor:
    if count <= most:
        return torch.arange(count, device=device)
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator)[:most].sort().values.to(device)
