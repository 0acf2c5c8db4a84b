"""What the quantized layers share: a packed weight, and the scales of int8 activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import is_
from typing import Any, TypeVar

import torch
from torch import Tensor

from ptq4adm import ops
from ptq4adm.errors import DtypeError, ShapeError
from ptq4adm.nn.options import LayerOptions
from ptq4adm.nn.packed import PackedLayer
from ptq4adm.nn.storage import StorageLayer, tensor_version
from ptq4adm.packing.layout import KLayout

Self = TypeVar("Self", bound="StorageLayer")


@dataclass(frozen=True)
class _Comparison:
    """Two activation scale tables with their steps, as they were compared."""

    compared: tuple[object, ...]
    versions: tuple[int | None, int | None]
    is_equal: bool

    def is_of(self, given: tuple[Tensor, Tensor, object, object]) -> bool:
        """Whether the same objects were compared, and none was changed since."""
        if not all(map(is_, given, self.compared)):
            return False
        # a traced call has no versions: a compiled graph keeps what was found before it
        if torch.compiler.is_compiling():
            return True
        return self.versions == (tensor_version(given[0]), tensor_version(given[1]))


class QuantizedLayer(PackedLayer):
    """Base of the W4A8 and W8A8 layers: packed weight, scales, canonical state dict.

    Buffers: those of `PackedLayer`, and `x_scale` float32 [segments, buckets] if static.

    Args:
        layout: K order of the weight.
        out_features: N.
        has_bias: whether a bias is added.
        options: storage, activation scales, backend.
        kind: what tables of measured times call it; None if they do not know it.
    """

    x_scale: Tensor | None

    def __init__(
        self,
        layout: KLayout,
        out_features: int,
        *,
        has_bias: bool,
        options: LayerOptions,
        kind: str | None = None,
    ) -> None:
        super().__init__(layout, out_features, has_bias=has_bias, options=options, kind=kind)
        self.step = options.step
        self._compared: dict[int, _Comparison] = {}
        x_scale = None
        if options.buckets > 0:
            size = len(layout.segments), options.buckets
            x_scale = torch.ones(size, device=options.device)
        self.register_buffer("x_scale", x_scale)

    @property
    def is_static(self) -> bool:
        """Whether activation scales are calibrated rather than measured."""
        return self.x_scale is not None

    @property
    def buckets(self) -> int:
        """Rows of the activation scale tables; 0 if dynamic."""
        return 0 if self.x_scale is None else int(self.x_scale.shape[1])

    def set_activation_scale(self, x_scale: Tensor) -> None:
        """Take a scalar, or a table [segments, buckets].

        Raises:
            ShapeError: if it does not have the size this layer was made for.
        """
        assert self.x_scale is not None
        if x_scale.numel() != self.x_scale.numel():
            raise ShapeError(
                f"x_scale {list(x_scale.shape)}: needs {list(self.x_scale.shape)}, [segments, "
                "buckets]"
            )
        values = x_scale.detach().to(self.x_scale.device, torch.float32)
        if not bool((torch.isfinite(values) & (values > 0)).all()):
            raise ShapeError(
                "x_scale: got values that are not positive and finite; calibrate again"
            )
        self.x_scale = values.reshape(self.x_scale.shape).clone()

    def quantize_input(self, x: Tensor, segment: int, granularity: str) -> tuple[Tensor, Tensor]:
        """Quantize one segment of the input: int8 of its shape, and its float32 scale."""
        x_scale, step = self.static_scale(segment)
        return ops.quantize_int8(
            x,
            x_scale=x_scale,
            step=step,
            granularity=granularity,
            backend=self.backend,
        )

    def static_scale(self, segment: int = 0) -> tuple[Tensor | None, Tensor | None]:
        """Scale table float32 [buckets] of one segment and the row in use, as the operators ask.

        Returns:
            (table, step) with `step` None for a table of one row; (None, None) if dynamic.
        """
        x_scale = self._buffers["x_scale"]
        if x_scale is None:
            return None, None
        has_rows = x_scale.shape[1] > 1 and self.step is not None
        return x_scale[segment], self.step.index if has_rows and self.step is not None else None

    def quantizes_like(self, other: QuantizedLayer) -> bool:
        """Whether this layer and another turn one input into the same int8 with the same scale.

        Tables are compared anew when a table, its version or a step is another than the last time;
        an inference tensor has no version, so a change in its place goes unseen.
        """
        own, theirs = self._buffers["x_scale"], other._buffers["x_scale"]
        is_same = ops.quantizers_of(self.backend) == ops.quantizers_of(other.backend)
        if not is_same or len(self.layout.segments) != 1:
            return False
        if own is None or theirs is None:
            return own is None and theirs is None
        compared = (own, theirs, self.step, other.step)
        known = self._compared.get(id(other))
        if known is None or not known.is_of(compared):
            is_equal = self.step is other.step and not own.is_meta and torch.equal(own, theirs)
            known = _Comparison(compared, (tensor_version(own), tensor_version(theirs)), is_equal)
            self._compared[id(other)] = known
        return known.is_equal

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: what was compared is known by addresses, which will be others."""
        return {**self.__dict__, "_compared": {}}

    def check_input(self, x: Tensor, channel_dim: int) -> None:
        """Check dtype and channels of an input.

        Raises:
            DtypeError: if it is not float.
            ShapeError: if it has other channels than the layer.
        """
        name = type(self).__name__
        if not x.is_floating_point():
            raise DtypeError(f"{name}: got {x.dtype}, needs float32, float16 or bfloat16")
        if x.shape[channel_dim] != self.layout.in_channels:
            raise ShapeError(
                f"{name}: got input {list(x.shape)} with {x.shape[channel_dim]} channels, "
                f"needs {self.layout.in_channels}"
            )

    def describe_storage(self) -> str:
        """Bits, groups, activation scales and backend, for `extra_repr`."""
        groups = f" in groups of {self.group_size}" if self.group_size else ""
        activation = f"static, {self.buckets} buckets" if self.is_static else "dynamic"
        segments = f", segments={self.layout.segments}" if len(self.layout.segments) > 1 else ""
        bias = self.bias is not None
        if self.is_float:
            activation = "float, weights in float16"
        why = f" ({self.backend_reason})" if self.backend_reason else ""
        return (
            f"bias={bias}{segments}, int{self.bits}{groups}, activation={activation}, "
            f"backend={self.backend}{why}"
        )

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        assert isinstance(self, QuantizedLayer)
        super()._apply(fn, recurse)
        if self.step is not None:
            self.step.move(fn)
        return self
