"""Hooks that show every quantizable layer's input, with the step and the prompts it belongs to.

Owns how a batch is taken apart: segments of a concatenated input, and samples of which prompt and
guidance half. What is kept of an input is the subclasses' own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ptq4adm.errors import CalibrationError
from ptq4adm.quant.buckets import find_timestep, single_timestep
from ptq4adm.quant.layers import quantizable_layers


class LayerHooks(ABC):
    """Hooks on a denoiser and its layers; use it as a context.

    Args:
        denoiser: the float model.
        segments: module name to the channels of the two parts of its input.

    Raises:
        CalibrationError: if the model has no float layer to look at.
    """

    def __init__(self, denoiser: nn.Module, segments: dict[str, tuple[int, int]]) -> None:
        self.denoiser = denoiser
        self.layers = quantizable_layers(denoiser)
        if not self.layers:
            raise CalibrationError(
                f"{type(denoiser).__name__} has no float linear or convolution to record; "
                "calibrate a model before it is quantized"
            )
        self.segments = segments
        self.prompts: Sequence[str] = ()
        self.calls = 0
        self.timestep = 0.0
        self._handles: list[Any] = []

    def __enter__(self) -> LayerHooks:
        self._handles.append(
            self.denoiser.register_forward_pre_hook(self._on_call, with_kwargs=True)
        )
        for name, layer in self.layers.items():
            self._handles.append(layer.register_forward_pre_hook(self._layer_hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def step(self) -> int:
        """Index of the step that is running, from 0."""
        return self.calls - 1

    def start_batch(self, prompts: Sequence[str]) -> None:
        """Name the prompts of the run that follows."""
        self.prompts, self.calls = prompts, 0

    @abstractmethod
    def see(self, name: str, x: Tensor, parts: Sequence[Tensor]) -> None:
        """One layer's input.

        Args:
            name: of the layer.
            x: the input.
            parts: its segments along the channels; `x` alone if it has none.
        """

    def begin_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The denoiser is called with these arguments; `step` and `timestep` are known."""
        del args, kwargs

    def halves(self, name: str, x: Tensor) -> int:
        """How often the batch holds every prompt: twice with guidance.

        One whole half lies after the other.

        Raises:
            CalibrationError: if samples cannot be told apart.
        """
        rows, count = int(x.shape[0]), len(self.prompts)
        if count == 0 or rows % count:
            raise CalibrationError(
                f"layer {name!r} read {rows} rows for {count} prompts: which row belongs to which "
                "prompt cannot be told; run with batch=1"
            )
        return rows // count

    def describe_failure(self, name: str, x: Tensor) -> str:
        """What to say of an input that is not finite: layer, step and prompts."""
        return (
            f"layer {name!r}: its input holds NaN or infinite values at step {self.calls} "
            f"(timestep {self.timestep:g}) of prompt {self._failed_prompts(x)}; "
            "look for broken weights before this layer, or run the model in float32"
        )

    def _on_call(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.timestep = single_timestep(find_timestep(args, kwargs))
        self.calls += 1
        self.begin_step(args, kwargs)

    def _layer_hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        widths = self.segments.get(name)

        def observe(layer: nn.Module, args: tuple[Any, ...]) -> None:
            x: Tensor = args[0]
            channel_dim = 1 if isinstance(layer, nn.Conv2d) else -1
            self.see(name, x, (x,) if widths is None else x.split(widths, dim=channel_dim))

        return observe

    def _failed_prompts(self, x: Tensor) -> str:
        """The prompts of the samples that are not finite; all if they cannot be told apart."""
        count = len(self.prompts)
        if count == 0 or x.dim() < 2 or x.shape[0] % count:
            return ", ".join(repr(p) for p in self.prompts)
        is_finite = torch.isfinite(x).flatten(1).all(dim=1)
        # with guidance the batch holds every prompt twice, one whole half after the other
        failed = sorted({int(i) % count for i in torch.nonzero(~is_finite)})
        return ", ".join(repr(self.prompts[i]) for i in failed or range(count))
