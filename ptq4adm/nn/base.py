"""What all replacement layers share: storage whose dtype never changes, and one copy of the weight.

Owns the state dict contract: what is saved and loaded is always canonical
(`ptq4adm.packing.layout`), what is resident is the backend's order, and only one of them exists at
a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from operator import is_
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ptq4adm import ops
from ptq4adm.errors import ConfigError, DtypeError, RangeError, ShapeError, UnsupportedLayerError
from ptq4adm.nn.options import LayerOptions
from ptq4adm.ops.prepack import packed_shape
from ptq4adm.packing.layout import (
    BLOCK_K,
    KLayout,
    pack_int4,
    rows_to_weight,
    unpack_int4,
    weight_to_rows,
)
from ptq4adm.quant.affine import MAX_MULT, QuantizedRows, quantize_rows

Self = TypeVar("Self", bound="StorageLayer")
TensorSpec = tuple[tuple[int, ...], torch.dtype]


class StorageLayer(nn.Module):
    """A layer whose buffers keep their dtypes, whatever `.half()`, `.float()` or `.to(dtype)` asks.

    A float32 scale rounded to float16 would change the model; computation follows the input's
    dtype. Those that stand for an `nn.Linear` are one, so that PEFT adapts them.
    """

    def __init__(self) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would allocate a weight

    def stored_tensors(self) -> dict[str, TensorSpec]:
        """Name, shape and dtype of each tensor of the state dict."""
        return {
            name: (tuple(buffer.shape), buffer.dtype)
            for name, buffer in self._buffers.items()
            if buffer is not None
        }

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != buffer.dtype:
                # from the original: a detour over the smaller dtype would lose digits
                self._buffers[name] = buffer.to(moved.device)
        return self


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
        if torch.compiler.is_compiling():  # a traced call has no versions: the graph keeps it
            return True
        return self.versions == (tensor_version(given[0]), tensor_version(given[1]))


class QuantizedLayer(StorageLayer):
    """Base of the W4A8 and W8A8 layers: packed weight, scales, canonical state dict.

    Buffers: `qweight` in the backend's order, `w_scale` float32 [N], `w_mult` uint8 [N, Kp / 64] in
    group mode, `x_scale` float32 [segments, buckets] if static, `bias` float32 [N] if there is one.

    Args:
        layout: K order of the weight.
        out_features: N.
        has_bias: whether a bias is added.
        options: storage, activation scales, backend.
    """

    bits: ClassVar[int]
    qweight: Tensor
    w_scale: Tensor
    w_mult: Tensor | None
    x_scale: Tensor | None
    bias: Tensor | None

    def __init__(
        self, layout: KLayout, out_features: int, *, has_bias: bool, options: LayerOptions
    ) -> None:
        super().__init__()
        if options.group_size is not None and self.bits != 4:
            raise ConfigError(
                f"group_size {options.group_size}: groups are for 4-bit weights; use None"
            )
        self.layout = layout
        self.out_features = out_features
        self.group_size = options.group_size
        self.requested_backend = options.backend
        self.backend = ops.resolve_backend(options.backend, options.device)
        self.step = options.step
        self._compared: dict[int, _Comparison] = {}
        device = options.device
        shape = packed_shape(self.bits, out_features, layout.k_padded, self.backend)
        dtype = torch.uint8 if self.bits == 4 else torch.int8
        self.register_buffer("qweight", torch.zeros(shape, dtype=dtype, device=device))
        self.register_buffer("w_scale", torch.ones(out_features, device=device))
        groups = layout.k_padded // BLOCK_K
        w_mult, x_scale = None, None
        if options.group_size is not None:
            w_mult = torch.ones(out_features, groups, dtype=torch.uint8, device=device)
        if options.buckets > 0:
            x_scale = torch.ones(len(layout.segments), options.buckets, device=device)
        self.register_buffer("w_mult", w_mult)
        self.register_buffer("x_scale", x_scale)
        self.register_buffer("bias", torch.zeros(out_features, device=device) if has_bias else None)

    @property
    def is_static(self) -> bool:
        """Whether activation scales are calibrated rather than measured."""
        return self.x_scale is not None

    @property
    def buckets(self) -> int:
        """Rows of the activation scale tables; 0 if dynamic."""
        return 0 if self.x_scale is None else int(self.x_scale.shape[1])

    def stored_tensors(self) -> dict[str, TensorSpec]:
        """Name, canonical shape and dtype of each tensor of the state dict."""
        specs = super().stored_tensors()
        columns = self.layout.k_padded // (2 if self.bits == 4 else 1)
        specs["qweight"] = ((self.out_features, columns), self.qweight.dtype)
        return specs

    def canonical_qweight(self) -> Tensor:
        """The weight in canonical order; a copy unless the backend uses that order itself."""
        return ops.to_canonical(
            self.qweight,
            bits=self.bits,
            layout=self.layout,
            out_features=self.out_features,
            backend=self.backend,
        )

    def quantized_rows(self) -> QuantizedRows:
        """Integers and scales of the weight, canonical."""
        qweight = self.canonical_qweight()
        w_q = unpack_int4(qweight) if self.bits == 4 else qweight
        return QuantizedRows(w_q, self.w_scale, self.w_mult)

    def float_weight(self) -> Tensor:
        """The weight that the integers stand for, float32 [N, C, kh, kw]."""
        return rows_to_weight(self.quantized_rows().dequantize(), self.layout)

    def set_weight(self, weight: Tensor, *, observer: str = "squared_error") -> None:
        """Quantize a float weight [N, C, kh, kw] or [N, C] into this layer."""
        rows = weight_to_rows(weight.detach().to(torch.float32), self.layout)
        self.set_rows(
            quantize_rows(rows, bits=self.bits, observer=observer, group_size=self.group_size)
        )

    def set_rows(self, quantized: QuantizedRows) -> None:
        """Take integers and scales that were found elsewhere, in canonical K order.

        Raises:
            ShapeError: if they are not of this layer's size, or their groups are not its groups.
            RangeError: if a multiplier is not in 1 .. 15.
        """
        expected = (self.out_features, self.layout.k_padded)
        has_groups = quantized.w_mult is not None
        if tuple(quantized.w_q.shape) != expected or has_groups != (self.w_mult is not None):
            raise ShapeError(
                f"rows {list(quantized.w_q.shape)} {'with' if has_groups else 'without'} groups: "
                f"needs {list(expected)} and group_size = {self.group_size}"
            )
        wrong = None if quantized.w_mult is None else find_wrong_multiplier(quantized.w_mult)
        if wrong is not None:
            raise RangeError(f"w_mult: {wrong}")
        device = self.w_scale.device
        self._set_qweight(pack_int4(quantized.w_q) if self.bits == 4 else quantized.w_q)
        self.w_scale = quantized.w_scale.to(device)
        self.w_mult = None if quantized.w_mult is None else quantized.w_mult.to(device)

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

    def set_backend(self, name: str) -> None:
        """Run on another backend, "auto" or one that can run where the weight is."""
        self._use_backend(ops.resolve_backend(name, self.w_scale.device))
        self.requested_backend = name

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

    def weight_tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """`qweight`, `w_scale`, `w_mult` and `bias`, four times faster than by attribute."""
        buffers = self._buffers
        qweight, w_scale = buffers["qweight"], buffers["w_scale"]
        assert qweight is not None
        assert w_scale is not None
        return qweight, w_scale, buffers["w_mult"], buffers["bias"]

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
        if self.backend != other.backend or len(self.layout.segments) != 1:
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
        return (
            f"bias={bias}{segments}, int{self.bits}{groups}, activation={activation}, "
            f"backend={self.backend}"
        )

    def _set_qweight(self, canonical: Tensor) -> None:
        packed = ops.prepack(canonical, bits=self.bits, layout=self.layout, backend=self.backend)
        self.qweight = packed.contiguous().to(self.w_scale.device)

    def _use_backend(self, backend: str) -> None:
        if backend != self.backend:
            canonical = self.canonical_qweight()
            self.backend = backend
            self._set_qweight(canonical)

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        assert isinstance(self, QuantizedLayer)
        device = fn(torch.empty(0, dtype=torch.int64, device=self.w_scale.device)).device
        self._use_backend(ops.resolve_backend(self.requested_backend, device))
        super()._apply(fn, recurse)
        if self.step is not None:
            self.step.move(fn)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "qweight"] = self.canonical_qweight()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],  # noqa: ARG002 - torch's signature
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        device, specs = self.w_scale.device, self.stored_tensors()
        for name, (shape, dtype) in specs.items():
            key = prefix + name
            if key not in state_dict:
                missing_keys.append(key)
                continue
            value = state_dict[key]
            if tuple(value.shape) != shape or value.dtype != dtype:
                error_msgs.append(
                    f"{key}: got {value.dtype} {list(value.shape)}, needs {dtype} {list(shape)}"
                )
            elif name == "w_mult" and (wrong := find_wrong_multiplier(value)) is not None:
                error_msgs.append(f"{key}: {wrong}")
            elif name == "qweight":
                self._set_qweight(value.detach().clone())
            else:
                setattr(self, name, value.detach().to(device, copy=True))
        if strict:
            known = {prefix + name for name in specs}
            unexpected_keys += [k for k in state_dict if k.startswith(prefix) and k not in known]


def tensor_version(tensor: Tensor) -> int | None:
    """Number of changes in place; None where torch does not count them."""
    return None if tensor.is_inference() else tensor._version


def find_wrong_multiplier(w_mult: Tensor) -> str | None:
    """What is wrong with group multipliers; None if nothing is, or a meta tensor has no values.

    0 would silence a group, and the product of a larger one and a weight need not fit int8.
    """
    if w_mult.is_meta or not w_mult.numel():
        return None
    low, high = int(w_mult.min()), int(w_mult.max())
    if 1 <= low and high <= MAX_MULT:
        return None
    return f"got values in {low} .. {high}, needs 1 .. {MAX_MULT}; quantize the weight again"


def check_float_layer(layer: nn.Module, kind: type[nn.Module], name: str) -> None:
    """Refuse anything but a plain layer of the kind.

    Raises:
        UnsupportedLayerError: for another class, a subclass included: its forward may differ.
    """
    if type(layer) is not kind:
        raise UnsupportedLayerError(
            f"{name}.from_float: got {type(layer).__name__}, needs a torch.nn.{kind.__name__}"
        )


def resident_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers of a module, each storage counted once."""
    storages = {}
    for tensor in chain(module.parameters(), module.buffers()):
        storage = tensor.untyped_storage()
        # storages without memory (meta tensors) have no address: count them one by one
        storages[storage.data_ptr() or id(tensor)] = storage.nbytes()
    return sum(storages.values())
