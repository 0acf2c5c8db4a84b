"""A copy of the denoiser that computes as the packed one will, in float and layer by layer."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ptq4adm.packing.layout import rows_to_weight
from ptq4adm.quant.affine import QuantizedRows
from ptq4adm.rounding.activations import fake_quantize
from ptq4adm.rounding.replay import Batch, Replay
from ptq4adm.rounding.task import LayerTask, ShiftedRows


class Twin:
    """A copy whose layers take their quantized input and weight one after the other.

    Args:
        denoiser: the float model; it is copied.
        tasks: layers that will be quantized.
    """

    def __init__(self, denoiser: nn.Module, tasks: Sequence[LayerTask]) -> None:
        self.module = copy.deepcopy(denoiser)
        self.layers: dict[str, nn.Module] = {
            t.name: self.module.get_submodule(t.name) for t in tasks
        }
        self.timestep = 0.0
        for task in tasks:
            self.layers[task.name].register_forward_pre_hook(self._quantizer(task))

    def call(self, replay: Replay, batch: Batch) -> Tensor:
        """The prediction for a batch."""
        self.timestep = batch.timestep
        return replay.call(self.module, batch)

    def set_rows(self, task: LayerTask, rows: QuantizedRows) -> None:
        """Give a layer its quantized weight."""
        weight = rows_to_weight(rows.dequantize(), task.layout)
        target = self.layers[task.name].weight
        assert isinstance(target, Tensor)
        with torch.no_grad():
            target.copy_(weight.reshape(target.shape))
            if isinstance(rows, ShiftedRows) and rows.bias_shift is not None:
                bias = self.layers[task.name].bias
                assert isinstance(bias, Tensor)
                bias += rows.bias_shift.to(bias.dtype)

    def _quantizer(self, task: LayerTask) -> Any:
        def quantize(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (fake_quantize(task, args[0], self.timestep), *args[1:])

        return quantize


class Watch:
    """Keeps the inputs of some layers of one call; use it as a context.

    Args:
        layers: name to layer.

    Attributes:
        seen: name to input, in the order of the layers' first calls.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers = layers
        self.seen: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Watch:
        for name, layer in self.layers.items():
            # after the hooks that quantize: what is kept is what the weight multiplies
            self._handles.append(layer.register_forward_hook(self._keeper(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def call(self, run: Callable[[], object]) -> dict[str, Tensor]:
        """The inputs of one call, which ends at the last of the layers."""
        self.seen = {}
        with contextlib.suppress(_AllSeen):
            run()
        return self.seen

    def _keeper(self, name: str) -> Any:
        def keep(_: nn.Module, args: tuple[Any, ...], __: Any) -> None:
            self.seen.setdefault(name, args[0])
            if len(self.seen) == len(self.layers):
                raise _AllSeen

        return keep


class _AllSeen(Exception):  # noqa: N818 - no error: nothing after the last layer is asked for
    pass


def call_order(denoiser: nn.Module, tasks: Sequence[LayerTask], replay: Replay) -> list[LayerTask]:
    """Tasks in the order in which a call reaches their layers; those it does not reach last."""
    first = replay.make(torch.tensor([0]), next(denoiser.parameters()).device)
    with torch.no_grad(), Watch({t.name: denoiser.get_submodule(t.name) for t in tasks}) as watch:
        seen = watch.call(lambda: replay.call(denoiser, first))
    place = {name: i for i, name in enumerate(seen)}
    return sorted(tasks, key=lambda task: place.get(task.name, len(place)))
