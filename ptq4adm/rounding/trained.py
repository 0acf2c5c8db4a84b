"""A copy of the denoiser whose 4-bit weights are trained through their rounding."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ptq4adm.packing.layout import expand_multipliers, rows_to_weight, weight_to_rows
from ptq4adm.quant.affine import QMAX, QMIN, QuantizedRows
from ptq4adm.rounding.replay import Batch, Replay
from ptq4adm.rounding.straight_through import round_input, round_positions, round_weight
from ptq4adm.rounding.task import LayerTask

# how far beyond the last integer a position may go: it still rounds to it, and is soon back
_REACH = 0.49


class TrainedWeight:
    """Positions of one weight between integers, and its channels' scales.

    It starts as plain rounding: positions are the float weight in steps of the start's scale.

    Args:
        task: the layer.

    Attributes:
        position: float32 [N, Kp], trained.
        log_scale: float32 [N], trained: of the scale over that of the start.
    """

    def __init__(self, task: LayerTask) -> None:
        self.task = task
        rows = weight_to_rows(task.layer.weight.detach().to(torch.float32), task.layout)
        start = task.start
        self._mult: Tensor | None = None
        if start.w_mult is not None:
            self._mult = expand_multipliers(start.w_mult).to(torch.float32)
        step = start.w_scale[:, None] * (1.0 if self._mult is None else self._mult)
        self.position = (rows / step).requires_grad_()
        self.log_scale = torch.zeros_like(start.w_scale).requires_grad_()
        self.keep_in_reach()

    def scale(self) -> Tensor:
        """Of each channel, float32 [N], above 0."""
        return self.task.start.w_scale * self.log_scale.exp()

    def weight(self) -> Tensor:
        """The rounded weight in the layer's shape, with gradients."""
        rows = round_weight(self.position, self.scale(), self._mult, self.task.bits)
        return _layer_weight(rows, self.task)

    @torch.no_grad()
    def keep_in_reach(self) -> None:
        """Clamp positions to those that a step brings back into the integers' range."""
        bits = self.task.bits
        self.position.clamp_(QMIN[bits] - _REACH, QMAX[bits] + _REACH)

    @torch.no_grad()
    def rows(self) -> QuantizedRows:
        """What it has become."""
        w_q = round_positions(self.position, self.task.bits).to(torch.int8)
        return QuantizedRows(w_q, self.scale(), self.task.start.w_mult)


class TrainedTwin:
    """A copy whose layers quantize their inputs, and whose 4-bit weights are trained.

    Layers of 8 bits compute with the integers of plain rounding.

    Args:
        denoiser: the float model; it is copied.
        tasks: layers that will be quantized.

    Attributes:
        weights: name to what is trained.
    """

    def __init__(self, denoiser: nn.Module, tasks: Sequence[LayerTask]) -> None:
        self.module = copy.deepcopy(denoiser).requires_grad_(False)
        self.weights = {t.name: TrainedWeight(t) for t in tasks if t.bits == 4}
        self._made: dict[str, Tensor] = {}
        self._timestep = 0.0
        for task in tasks:
            layer = self.module.get_submodule(task.name)
            if task.name not in self.weights:
                self._made[task.name] = _layer_weight(task.start.dequantize(), task)
            layer.forward = self._forward(task, layer)

    def round(self) -> None:
        """Make the weights that calls compute with, from what is trained."""
        self._made |= {name: weight.weight() for name, weight in self.weights.items()}

    def call(self, replay: Replay, batch: Batch) -> Tensor:
        """The prediction for a batch, with gradients for what is trained."""
        self._timestep = batch.timestep
        return replay.call(self.module, batch)

    def _forward(self, task: LayerTask, layer: nn.Module) -> Any:
        def forward(x: Tensor) -> Tensor:
            y = round_input(task, x, self._timestep)
            # trained in float32, whatever the model computes in
            weight = self._made[task.name].to(y.dtype)
            if isinstance(layer, nn.Conv2d):
                return functional.conv2d(
                    y, weight, layer.bias, layer.stride, layer.padding, layer.dilation
                )
            assert isinstance(layer, nn.Linear)
            return functional.linear(y, weight, layer.bias)

        return forward


def _layer_weight(rows: Tensor, task: LayerTask) -> Tensor:
    return rows_to_weight(rows, task.layout).reshape(task.layer.weight.shape)
