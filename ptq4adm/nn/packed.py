"""A layer's weight: packed in a backend's order, or in float16 where someone asked for it.

Owns the state dict contract: what is saved and loaded is always canonical
(`ptq4adm.packing.layout`), what is resident is the order of the backend that was chosen, or
float16 (`ptq4adm.nn.floating`), and only one of them exists at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ptq4adm import ops
from ptq4adm.dispatch import Choice, LayerKey
from ptq4adm.errors import ConfigError, RangeError, ShapeError
from ptq4adm.nn.half_weights import decode_half, encode_half
from ptq4adm.nn.options import LayerOptions
from ptq4adm.nn.storage import StorageLayer, TensorSpec
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
FLOAT = "float"  # in the place of a backend: the layer computes in float, its weight is float16


class PackedLayer(StorageLayer):
    """A weight as integers with scales, a bias, and the backend they are kept for.

    Buffers: `qweight` in the backend's order, `w_scale` float32 [N], `w_mult` uint8 [N, Kp / 64] in
        group mode, `bias` float32 [N] if there is one. With float16 weights, `qweight` is float16
        [N, C, kh, kw], and `bias_half`, which is not saved, is the bias in float16.

    Args:
        layout: K order of the weight.
        out_features: N.
        has_bias: whether a bias is added.
        options: storage, backend.
        kind: what tables of measured times call it; None if they do not know it.

    Attributes:
        backend: what it runs on, a backend's name or `FLOAT`.
        backend_reason: why, where there was something to choose.
        key: what it is looked up by in tables; None if they do not know it.
        rows: M of one call, where a calibration knows it.
    """

    bits: ClassVar[int]
    qweight: Tensor
    w_scale: Tensor
    w_mult: Tensor | None
    bias: Tensor | None
    bias_half: Tensor | None

    def __init__(
        self,
        layout: KLayout,
        out_features: int,
        *,
        has_bias: bool,
        options: LayerOptions,
        kind: str | None = None,
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
        self.rows: int | None = None
        self.key: LayerKey | None = None
        # products with groups have other kernels, which tables do not speak of
        if kind is not None and options.group_size is None:
            self.key = LayerKey(kind, self.bits, out_features, layout.k)
        device = options.device
        choice = self._choose(torch.device(device))
        self.backend, self.backend_reason = choice.backend, choice.reason
        shape = packed_shape(self.bits, out_features, layout.k_padded, self.backend)
        dtype = torch.uint8 if self.bits == 4 else torch.int8
        self.register_buffer("qweight", torch.zeros(shape, dtype=dtype, device=device))
        self.register_buffer("w_scale", torch.ones(out_features, device=device))
        w_mult = None
        if options.group_size is not None:
            groups = layout.k_padded // BLOCK_K
            w_mult = torch.ones(out_features, groups, dtype=torch.uint8, device=device)
        self.register_buffer("w_mult", w_mult)
        self.register_buffer("bias", torch.zeros(out_features, device=device) if has_bias else None)

    @property
    def is_float(self) -> bool:
        """Whether it computes in float, from float16 weights."""
        return self.backend == FLOAT

    def stored_tensors(self) -> dict[str, TensorSpec]:
        """Name, canonical shape and dtype of each tensor of the state dict."""
        specs = super().stored_tensors()
        specs.pop("bias_half", None)
        per_byte = 2 if self.bits == 4 else 1
        shape = (self.out_features, self.layout.k_padded // per_byte)
        specs["qweight"] = (shape, torch.uint8 if self.bits == 4 else torch.int8)
        return specs

    def canonical_qweight(self) -> Tensor:
        """The weight in canonical order; a copy unless the backend uses that order itself."""
        if self.is_float:
            return encode_half(self.qweight, self.w_scale, self.w_mult, self.layout, self.bits)
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
        self.w_scale = quantized.w_scale.to(device)
        self.w_mult = None if quantized.w_mult is None else quantized.w_mult.to(device)
        self._set_qweight(pack_int4(quantized.w_q) if self.bits == 4 else quantized.w_q)

    def expect_rows(self, rows: int | None) -> None:
        """Say how many rows M one call has: `auto` then looks at the times of that many.

        Args:
            rows: 1 or more; None if it is not known.
        """
        self.rows = rows
        if not self.is_float:
            self._take(self._choose(self.w_scale.device))

    def set_backend(self, name: str) -> None:
        """Run on another backend, "auto" or one that can run where the weight is."""
        device = self.w_scale.device
        self._take(ops.choose_backend(name, device, key=self.key, rows=self.rows))
        self.requested_backend = name

    def use_float(self, reason: str) -> None:
        """Keep the weight in float16 in the place of the packed one, and compute in float.

        The numbers are those of the quantized weight, rounded to float16; activations are not
        quantized. The state dict stays the packed one.

        Args:
            reason: why, for `repr`.

        Raises:
            RangeError: if the packed weight could not be found again from float16.
        """
        rows = self.quantized_rows()
        self.qweight = decode_half(rows, self.layout, self.bits)
        bias = None if self.bias is None else self.bias.to(torch.float16)
        self.register_buffer("bias_half", bias, persistent=False)
        self.backend, self.backend_reason = FLOAT, reason

    def use_packed(self) -> None:
        """Undo `use_float`."""
        if self.is_float:
            self._take(self._choose(self.w_scale.device))

    def float_tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Weight [N, C, kh, kw] and bias of a layer that computes in float, in a dtype."""
        bias = self.bias_half if dtype == torch.float16 else self.bias
        return self.qweight.to(dtype), None if bias is None else bias.to(dtype)

    def weight_tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """`qweight`, `w_scale`, `w_mult` and `bias`, four times faster than by attribute."""
        buffers = self._buffers
        qweight, w_scale = buffers["qweight"], buffers["w_scale"]
        assert qweight is not None
        assert w_scale is not None
        return qweight, w_scale, buffers["w_mult"], buffers["bias"]

    def _choose(self, device: torch.device) -> Choice:
        return ops.choose_backend(self.requested_backend, device, key=self.key, rows=self.rows)

    def _take(self, choice: Choice) -> None:
        """Bring the weight into the order of another backend."""
        if choice.backend != self.backend:
            canonical = self.canonical_qweight()
            if self.is_float:
                del self.bias_half
            self.backend = choice.backend
            self._set_qweight(canonical)
        self.backend_reason = choice.reason

    def _set_qweight(self, canonical: Tensor) -> None:
        device = self.w_scale.device
        if self.is_float:
            w_q = unpack_int4(canonical) if self.bits == 4 else canonical
            rows = QuantizedRows(w_q.to(device), self.w_scale, self.w_mult)
            self.qweight = decode_half(rows, self.layout, self.bits)
            return
        packed = ops.prepack(canonical, bits=self.bits, layout=self.layout, backend=self.backend)
        self.qweight = packed.contiguous().to(device)

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        assert isinstance(self, PackedLayer)
        device = fn(torch.empty(0, dtype=torch.int64, device=self.w_scale.device)).device
        # float16 was chosen for the device where the layer is: elsewhere it is packed again
        if not self.is_float or device != self.w_scale.device:
            self._take(self._choose(device))
        super()._apply(fn, recurse)
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
        # the weight last: as float16 it depends on the scales
        for name in sorted(specs, key=lambda name: name == "qweight"):
            shape, dtype = specs[name]
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
                try:
                    self._set_qweight(value.detach().clone())
                except RangeError as error:
                    error_msgs.append(f"{key}: {error}")
            else:
                setattr(self, name, value.detach().to(device, copy=True))
        if self.is_float and self.bias is not None:
            self.bias_half = self.bias.to(torch.float16)
        if strict:
            known = {prefix + name for name in specs}
            unexpected_keys += [k for k in state_dict if k.startswith(prefix) and k not in known]


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
