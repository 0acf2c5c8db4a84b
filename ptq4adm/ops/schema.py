"""Schema and fake (shape) function of every operator in the namespace ``ptq4adm``.

What the operators compute is in ``reference.py``; which function runs for a backend is decided in
``dispatch.py``. The schemas are the contract of design section 4 and complete from the start.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ptq4adm.errors import ConfigError, DtypeError, ShapeError
from ptq4adm.ops.arguments import (
    Conv2dGeometry,
    Matmul,
    MatmulOptions,
    check_step,
    conv2d_shape,
    linear_shape,
    result_dtype,
    result_shape,
)

LIBRARY = torch.library.Library("ptq4adm", "DEF")

GRANULARITIES = ("tensor", "row")

_MATMUL_ARGUMENTS = "Tensor x_q, Tensor x_scale, Tensor qweight, Tensor w_scale, *, "
_GEOMETRY = (
    "int[2] kernel_size, int[2] stride=1, int[2] padding=0, int[2] dilation=1, "
    "int[2]? upsample=None, "
)
_OPTIONS = (
    "Tensor? bias=None, Tensor? temb=None, Tensor? residual=None, Tensor? x2_q=None, "
    "Tensor? x2_scale=None, Tensor? step=None, Tensor? out_scale=None, bool geglu=False, "
    "ScalarType out_dtype=float32, str backend) -> Tensor"
)
_STATIC = "Tensor? x_scale=None, Tensor? step=None, "
_QUANTIZED = "str backend) -> (Tensor x_q, Tensor scale)"

LIBRARY.define(f"w4a8_linear({_MATMUL_ARGUMENTS}Tensor? w_mult=None, {_OPTIONS}")
LIBRARY.define(f"w4a8_conv2d({_MATMUL_ARGUMENTS}{_GEOMETRY}Tensor? w_mult=None, {_OPTIONS}")
LIBRARY.define(f"w8a8_linear({_MATMUL_ARGUMENTS}{_OPTIONS}")
LIBRARY.define(f"w8a8_conv2d({_MATMUL_ARGUMENTS}{_GEOMETRY}{_OPTIONS}")
LIBRARY.define(f'quantize_int8(Tensor x, *, {_STATIC}str granularity="tensor", {_QUANTIZED}')
LIBRARY.define(
    "groupnorm_silu_quantize(Tensor x, int num_groups, Tensor weight, Tensor bias, float eps, *, "
    f"{_STATIC}bool silu=True, {_QUANTIZED}"
)
LIBRARY.define(
    f"layernorm_quantize(Tensor x, Tensor weight, Tensor bias, float eps, *, {_STATIC}{_QUANTIZED}"
)
LIBRARY.define(f"geglu_quantize(Tensor x, *, {_STATIC}{_QUANTIZED}")
LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, int heads, *, Tensor? bias=None, float? scale=None, "
    "str backend) -> Tensor"
)

OPERATORS = (
    "w4a8_linear",
    "w4a8_conv2d",
    "w8a8_linear",
    "w8a8_conv2d",
    "quantize_int8",
    "groupnorm_silu_quantize",
    "layernorm_quantize",
    "geglu_quantize",
    "attention",
)


def pop_geometry(keywords: dict[str, Any]) -> Conv2dGeometry:
    """Take the geometry out of a convolution's keyword arguments."""
    geometry: dict[str, Any] = {}
    for name in Conv2dGeometry.__dataclass_fields__:
        if name in keywords:
            pair = keywords.pop(name)
            geometry[name] = None if pair is None else tuple(pair)
    return Conv2dGeometry(**geometry)


def scale_shape(x: Tensor, x_scale: Tensor | None, granularity: str) -> tuple[int, ...]:
    """Return the shape of the scale that a quantizing operator gives back.

    Raises:
        ConfigError: if the granularity is unknown.
        ShapeError: if rows are asked for and ``x`` has none.
    """
    if granularity not in GRANULARITIES:
        raise ConfigError(f"granularity {granularity!r}: expected one of {GRANULARITIES}")
    if x_scale is not None or granularity == "tensor":
        return ()
    if x.dim() < 1:
        raise ShapeError("x has no dimension, so no rows; use granularity 'tensor'")
    return tuple(x.shape[:-1])


def check_static_scale(x_scale: Tensor | None, step: Tensor | None) -> None:
    """Check a static activation scale: one element, or a table [T] with its ``step``.

    Raises:
        ShapeError: if it is neither.
    """
    if x_scale is None or x_scale.numel() == 1:
        return
    if step is None or x_scale.dim() != 1:
        raise ShapeError(
            f"x_scale {list(x_scale.shape)}: expected one scale, or a table [T] with step"
        )
    check_step(step)


def check_group_norm(x: Tensor, num_groups: int) -> None:
    """Check the input of a group norm.

    Raises:
        ConfigError: if there is no group.
        ShapeError: if ``x`` is not NCHW or its channels do not split into the groups.
    """
    if num_groups < 1:
        raise ConfigError(f"num_groups = {num_groups}: expected at least 1")
    if x.dim() != 4 or x.shape[1] % num_groups:
        raise ShapeError(f"x {list(x.shape)}: expected NCHW with C a multiple of {num_groups}")


def check_glu(x: Tensor) -> None:
    """Check the input of a gated unit.

    Raises:
        ShapeError: if ``x`` is not [M, 2 K].
    """
    if x.dim() != 2 or x.shape[1] % 2:
        raise ShapeError(f"x {list(x.shape)}: expected [M, 2 K]")


def check_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None) -> None:
    """Check the tensors of an attention.

    Raises:
        ShapeError: if they do not fit together.
        DtypeError: if they are not of one float dtype.
    """
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or k.shape[::2] != q.shape[::2]:
        raise ShapeError(
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}: expected [B, Tq, C] and "
            "twice [B, Tk, C]"
        )
    if heads < 1 or q.shape[2] % heads or q.shape[2] == 0 or k.shape[1] == 0:
        raise ShapeError(
            f"q {list(q.shape)}, k {list(k.shape)}: expected at least one key and channels that "
            f"split into {heads} heads"
        )
    if not q.is_floating_point() or q.dtype != k.dtype or q.dtype != v.dtype:
        raise DtypeError(f"q {q.dtype}, k {k.dtype}, v {v.dtype}: expected one float dtype")
    if bias is None:
        return
    if tuple(bias.shape) != (k.shape[0], k.shape[1]):
        raise ShapeError(f"bias {list(bias.shape)}: expected {[k.shape[0], k.shape[1]]}, [B, Tk]")
    if not bias.is_floating_point():
        raise DtypeError(
            f"bias {bias.dtype}: expected float, added to the scores; not a mask of bool"
        )


# --- fake functions: shapes only ---------------------------------------------------------------


def _fake_linear(bits: int) -> Any:
    def fake(
        x_q: Tensor,
        x_scale: Tensor,
        qweight: Tensor,
        w_scale: Tensor,
        *,
        backend: str,
        **keywords: Any,
    ) -> Tensor:
        options = MatmulOptions(**keywords)
        shape = linear_shape(Matmul(bits, x_q, x_scale, qweight, w_scale, options), backend)
        return x_q.new_empty(result_shape(shape, options), dtype=result_dtype(options))

    return fake


def _fake_conv2d(bits: int) -> Any:
    def fake(
        x_q: Tensor,
        x_scale: Tensor,
        qweight: Tensor,
        w_scale: Tensor,
        *,
        backend: str,
        **keywords: Any,
    ) -> Tensor:
        geometry = pop_geometry(keywords)
        options = MatmulOptions(**keywords)
        call = Matmul(bits, x_q, x_scale, qweight, w_scale, options)
        shape = result_shape(conv2d_shape(call, geometry, backend), options)
        return x_q.new_empty(shape, dtype=result_dtype(options))

    return fake


def _fake_quantized(
    x: Tensor, shape: tuple[int, ...], x_scale: Tensor | None, step: Tensor | None, granularity: str
) -> tuple[Tensor, Tensor]:
    check_static_scale(x_scale, step)
    scale = x.new_empty(scale_shape(x, x_scale, granularity), dtype=torch.float32)
    return x.new_empty(shape, dtype=torch.int8), scale


def _fake_quantize_int8(
    x: Tensor,
    *,
    x_scale: Tensor | None = None,
    step: Tensor | None = None,
    granularity: str = "tensor",
    backend: str,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    return _fake_quantized(x, tuple(x.shape), x_scale, step, granularity)


def _fake_groupnorm_silu_quantize(
    x: Tensor,
    num_groups: int,
    weight: Tensor,  # noqa: ARG001
    bias: Tensor,  # noqa: ARG001
    eps: float,  # noqa: ARG001
    *,
    x_scale: Tensor | None = None,
    step: Tensor | None = None,
    silu: bool = True,  # noqa: ARG001
    backend: str,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    check_group_norm(x, num_groups)
    batch, channels, height, width = x.shape
    return _fake_quantized(x, (batch, height, width, channels), x_scale, step, "tensor")


def _fake_layernorm_quantize(
    x: Tensor,
    weight: Tensor,  # noqa: ARG001
    bias: Tensor,  # noqa: ARG001
    eps: float,  # noqa: ARG001
    *,
    x_scale: Tensor | None = None,
    step: Tensor | None = None,
    backend: str,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    return _fake_quantized(x, tuple(x.shape), x_scale, step, "row")


def _fake_geglu_quantize(
    x: Tensor,
    *,
    x_scale: Tensor | None = None,
    step: Tensor | None = None,
    backend: str,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    check_glu(x)
    return _fake_quantized(x, (x.shape[0], x.shape[1] // 2), x_scale, step, "row")


def _fake_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,  # noqa: ARG001
    backend: str,  # noqa: ARG001
) -> Tensor:
    check_attention(q, k, v, heads, bias)
    return q.new_empty(q.shape)


_FAKES = {
    "w4a8_linear": _fake_linear(4),
    "w4a8_conv2d": _fake_conv2d(4),
    "w8a8_linear": _fake_linear(8),
    "w8a8_conv2d": _fake_conv2d(8),
    "quantize_int8": _fake_quantize_int8,
    "groupnorm_silu_quantize": _fake_groupnorm_silu_quantize,
    "layernorm_quantize": _fake_layernorm_quantize,
    "geglu_quantize": _fake_geglu_quantize,
    "attention": _fake_attention,
}

for _name in OPERATORS:
    torch.library.register_fake(f"ptq4adm::{_name}", _FAKES[_name], lib=LIBRARY)
