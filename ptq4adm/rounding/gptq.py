"""GPTQ over a denoiser: layers in the order of their calls, in groups that share a replay.

Every layer is rounded for the inputs that it has in the float model, quantized to 8 bits. With
`is_asymmetric` they are those of a copy in which the layers before it are rounded already
(`ptq4adm.rounding.twin`), while what it is to come close to stays the float layer's output on the
float model's inputs; inside of a group the copy still has float weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm

from ptq4adm.errors import ConfigError
from ptq4adm.packing.layout import weight_to_rows
from ptq4adm.quant.affine import QuantizedRows
from ptq4adm.quant.gptq import gptq_rows, shift_target
from ptq4adm.rounding.hessian import Moments, collect, groups_within
from ptq4adm.rounding.replay import Replay
from ptq4adm.rounding.task import LayerTask, ShiftedRows
from ptq4adm.rounding.twin import Twin, call_order


@dataclass(frozen=True)
class GptqSettings:
    """How `gptq` works.

    Args:
        damp: added to the diagonal of H, as a share of its mean.
        act_order: weights of large inputs first.
        block: columns after which the rest is updated.
        is_asymmetric: whether a layer makes up for what the layers before it changed; twice the
            time, and not better (docs/quality.md).
        has_bias_shift: whether the mean of a layer's output error goes into its bias, where it has
            one; the weights are then rounded for the moments about the mean.
        positions: kept of every sample and layer.
        budget: bytes of moments at once.

    Raises:
        ConfigError: if a number is out of range.
    """

    damp: float = 0.01
    act_order: bool = True
    block: int = 128
    is_asymmetric: bool = False
    has_bias_shift: bool = True
    positions: int = 64
    budget: int = 1 << 30

    def __post_init__(self) -> None:
        for name in ("damp", "block", "positions", "budget"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}: got {getattr(self, name)}, needs more than 0")


def gptq(
    denoiser: nn.Module,
    tasks: Sequence[LayerTask],
    replay: Replay,
    *,
    progress: bool = True,
    settings: GptqSettings | None = None,
) -> dict[str, QuantizedRows]:
    """Integers of every layer by GPTQ; a `ptq4adm.rounding.Rounder`.

    Args:
        denoiser: the float model; it is not changed.
        tasks: layers.
        replay: the model's inputs.
        progress: show a bar on a terminal.
        settings: None for the default.

    Raises:
        NonFiniteError: if a replayed activation is NaN or infinite.
        UncalibratedStepError: if inputs are of a timestep whose bucket has no scales.
    """
    chosen = settings or GptqSettings()
    twin = Twin(denoiser, tasks) if chosen.is_asymmetric else None
    order = call_order(denoiser, tasks, replay)
    per_layer = 2 if chosen.is_asymmetric else 1
    found: dict[str, QuantizedRows] = {}
    bar = tqdm(total=len(order), desc="gptq", unit="layer", disable=None if progress else True)
    with bar:
        for group in groups_within(order, chosen.budget, per_layer=per_layer):
            sums = collect(group, denoiser, twin, replay, most=chosen.positions)
            for task in group:
                moments = sums.pop(task.name).result()
                found[task.name] = round_layer(task, moments, chosen)
                if twin is not None:
                    twin.set_rows(task, found[task.name])
                bar.update()
    return found


def round_layer(task: LayerTask, moments: Moments, settings: GptqSettings) -> QuantizedRows:
    """One layer's integers; those of plain rounding if no call reached it."""
    if moments.count == 0:
        return task.start
    has_shift = settings.has_bias_shift and task.layer.bias is not None
    if has_shift:
        moments = moments.centred()
    rows = float_rows = weight_to_rows(task.layer.weight.detach().to(torch.float32), task.layout)
    if moments.cross is not None:
        rows = shift_target(rows, moments.hessian, moments.cross, damp=settings.damp)
    found = gptq_rows(
        rows,
        moments.hessian,
        task.start,
        bits=task.bits,
        damp=settings.damp,
        block=settings.block,
        act_order=settings.act_order,
    )
    if not has_shift:
        return found
    shift = float_rows @ moments.given_mean - found.dequantize() @ moments.mean
    return ShiftedRows(found.w_q, found.w_scale, found.w_mult, shift)
