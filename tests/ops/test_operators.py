"""The operators as torch sees them: schema, fake functions, compilation, refused arguments."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from ptq4adm import ops
from ptq4adm.errors import ConfigError, DtypeError, ShapeError, UnknownBackendError
from ptq4adm.ops import cpu, reference, triton_backend
from ptq4adm.ops.arguments import Conv2dGeometry, MatmulOptions
from ptq4adm.ops.schema import OPERATORS

GEOMETRY = {"kernel_size": [3, 3], "stride": [2, 1], "padding": [1, 1], "upsample": [5, 9]}
OPTIONS = [name for name in MatmulOptions.__dataclass_fields__ if name != "w_mult"]


@pytest.fixture(params=["reference", "cpu", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    reason = cpu.unavailable_reason()
    if request.param == "cpu" and reason is not None:
        pytest.skip(reason)
    reason = triton_backend.unavailable_reason("cpu")
    if request.param == "triton" and reason is not None:
        pytest.skip(f"these tests use CPU tensors: {reason}")
    return str(request.param)


def _arguments(case, backend, **extra):
    call = case.native if backend == "cpu" else case.call
    options = {name: getattr(call.options, name) for name in OPTIONS}
    if call.bits == 4:
        options["w_mult"] = call.options.w_mult
    return (call.x_q, call.x_scale, call.qweight, call.w_scale), {
        **options,
        **extra,
        "backend": backend,
    }


def _operator(name: str):
    return getattr(torch.ops.ptq4adm, name).default


@pytest.mark.parametrize("bits", [4, 8])
def test_opcheck_linear(make_case, backend, bits) -> None:
    operator = _operator(f"w{bits}a8_linear")
    plain = make_case(bits, (6,), (70,), 20)
    opcheck(operator, *_arguments(plain, backend))
    full = make_case(bits, (6,), (70, 64), 20, is_grouped=bits == 4)
    full = full.with_scales(torch.rand(3), torch.rand(20)).with_options(
        x2_scale=torch.rand(3),
        step=torch.tensor(2),
        bias=torch.randn(20),
        temb=torch.randn(2, 20),
        residual=torch.randn(6, 20),
        geglu=True,
        out_dtype=torch.bfloat16,
    )
    opcheck(operator, *_arguments(full, backend))
    opcheck(operator, *_arguments(full.with_options(out_scale=torch.tensor(0.1)), backend))


@pytest.mark.parametrize("bits", [4, 8])
def test_opcheck_conv2d(make_case, backend, bits) -> None:
    operator = _operator(f"w{bits}a8_conv2d")
    geometry = Conv2dGeometry(**{name: tuple(pair) for name, pair in GEOMETRY.items()})
    case = make_case(bits, (2, 4, 7), (70, 3), 20, geometry, is_grouped=bits == 4)
    case = case.with_options(
        bias=torch.randn(20), temb=torch.randn(2, 20), residual=torch.randn(2, 3, 9, 20)
    )
    opcheck(operator, *_arguments(case, backend, **GEOMETRY))


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_opcheck_quantize_int8(backend, granularity) -> None:
    operator = _operator("quantize_int8")
    x = torch.randn(3, 5, 7)
    opcheck(operator, (x,), {"granularity": granularity, "backend": backend})
    static = {"x_scale": torch.rand(4), "step": torch.tensor(1), "backend": backend}
    opcheck(operator, (x.half(),), static)


def test_opcheck_fused_operators(backend) -> None:
    static = {"x_scale": torch.tensor(0.1), "backend": backend}
    dynamic = {"backend": backend}
    weight, bias = torch.randn(8), torch.randn(8)
    for keywords in (static, dynamic):
        image = (torch.randn(2, 8, 3, 5), 4, weight, bias, 1e-5)
        opcheck(_operator("groupnorm_silu_quantize"), image, keywords)
        rows = (torch.randn(6, 8), weight, bias, 1e-5)
        opcheck(_operator("layernorm_quantize"), rows, keywords)
        opcheck(_operator("geglu_quantize"), (torch.randn(6, 8),), keywords)


def test_every_operator_of_the_contract_is_registered() -> None:
    for name in OPERATORS:
        schema = _operator(name)._schema
        assert schema.arguments[-1].name == "backend"


@pytest.mark.parametrize("bits", [4, 8])
def test_compiled_linear_and_conv2d_are_one_graph(make_case, backend, bits) -> None:
    linear_case = make_case(bits, (6,), (70,), 20)
    geometry = Conv2dGeometry((3, 3), padding=(1, 1))
    conv2d_case = make_case(bits, (2, 5, 7), (70,), 20, geometry)
    weights = [
        (case.native if backend == "cpu" else case.call) for case in (linear_case, conv2d_case)
    ]

    def network(x: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x_q, x_scale = ops.quantize_int8(x * 2, granularity="row", backend=backend)
        linear = weights[0]
        y = ops.linear(x_q, x_scale, linear.qweight, linear.w_scale, bits=bits, backend=backend)
        x_q, x_scale = ops.quantize_int8(image, backend=backend)
        conv = weights[1]
        z = ops.conv2d(
            x_q,
            x_scale,
            conv.qweight,
            conv.w_scale,
            bits=bits,
            kernel_size=(3, 3),
            padding=(1, 1),
            backend=backend,
        )
        return y + 1, z + 1

    inputs = torch.randn(6, 70), torch.randn(2, 5, 7, 70)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(*inputs), network(*inputs), strict=True):
        assert torch.equal(got, expected)


def test_python_calls_reach_the_operators(make_case, backend) -> None:
    for bits in (4, 8):
        case = make_case(bits, (6,), (70,), 20, is_grouped=bits == 4)
        args, keywords = _arguments(case, backend)
        expected = reference.linear(case.call)
        assert torch.equal(ops.linear(*args, bits=bits, **keywords), expected)
    with pytest.raises(ConfigError, match="bits = 3: expected 4 or 8"):
        ops.linear(*args, bits=3, backend=backend)


def test_unknown_backend_is_refused(make_case) -> None:
    args, keywords = _arguments(make_case(4, (6,), (70,), 20), "reference")
    with pytest.raises(UnknownBackendError, match="w4a8_linear: backend 'gpu' is unknown"):
        torch.ops.ptq4adm.w4a8_linear(*args, **{**keywords, "backend": "gpu"})


BAD_LINEAR = {
    "float activations": ({"x_q": torch.zeros(6, 70)}, DtypeError, r"x_q: expected torch\.int8"),
    "three dimensions": (
        {"x_q": torch.zeros(1, 6, 70, dtype=torch.int8)},
        ShapeError,
        r"x_q \[1, 6, 70\]: expected \[M, K\]",
    ),
    "another K": (
        {"x_q": torch.zeros(6, 129, dtype=torch.int8)},
        ShapeError,
        r"expected .* for 20 channels and K = 192 \(padded\)",
    ),
    "half scale": ({"x_scale": torch.ones((), dtype=torch.half)}, DtypeError, "x_scale: expected"),
    "scales of other rows": ({"x_scale": torch.ones(5)}, ShapeError, r"x_scale \[5\]: expected"),
    "bias of other channels": (
        {"bias": torch.ones(19)},
        ShapeError,
        r"bias \[19\]: expected \[20\]",
    ),
    "temb that does not divide": ({"temb": torch.ones(4, 20)}, ShapeError, "B dividing the 6 rows"),
    "residual": (
        {"residual": torch.ones(5, 20)},
        ShapeError,
        r"residual \[5, 20\]: expected \[6, 20\]",
    ),
    "x2_q alone": (
        {"x2_q": torch.zeros(6, 3, dtype=torch.int8)},
        ShapeError,
        "one was given without the other",
    ),
    "x2_scale alone": ({"x2_scale": torch.ones(())}, ShapeError, "one was given without the other"),
    "int32 step": (
        {"x_scale": torch.ones(4), "step": torch.tensor(1, dtype=torch.int32)},
        DtypeError,
        r"step: expected torch\.int64",
    ),
    "two steps": (
        {"x_scale": torch.ones(4), "step": torch.tensor([1, 2])},
        ShapeError,
        r"step \[2\]: expected one int64",
    ),
    "w_mult": (
        {"w_mult": torch.ones(20, 3, dtype=torch.uint8)},
        ShapeError,
        r"w_mult \[20, 3\]: expected \[20, 2\]",
    ),
    "integer output": ({"out_dtype": torch.int32}, DtypeError, r"out_dtype = torch\.int32"),
    "unpacked weight": (
        {"qweight": torch.zeros(20, 70, dtype=torch.int8)},
        DtypeError,
        r"qweight: expected torch\.uint8, got torch\.int8",
    ),
}


@pytest.mark.parametrize("name", BAD_LINEAR)
def test_linear_refuses(make_case, backend, name) -> None:
    change, error, message = BAD_LINEAR[name]
    case = make_case(4, (6,), (70,), 20)
    call = case.native if backend == "cpu" else case.call
    arguments = {
        "x_q": call.x_q,
        "x_scale": call.x_scale,
        "qweight": call.qweight,
        "w_scale": call.w_scale,
        "backend": backend,
        **change,
    }
    with pytest.raises(error, match=message):
        torch.ops.ptq4adm.w4a8_linear(**arguments)


def test_odd_channels_do_not_split_for_geglu(make_case, backend) -> None:
    args, keywords = _arguments(make_case(4, (6,), (70,), 21), backend)
    with pytest.raises(ShapeError, match="21 output channels do not split"):
        torch.ops.ptq4adm.w4a8_linear(*args, **{**keywords, "geglu": True})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel_size": [3, 9]}, "smaller than the kernel"),
        ({"stride": [0, 1]}, r"stride = \(0, 1\): expected two positive sizes"),
        ({"padding": [-1, 0]}, r"padding = \(-1, 0\): expected two sizes, zero or more"),
        ({"x_scale": torch.ones(2)}, r"x_scale \[2\]: expected one scale for the tensor"),
        ({"kernel_size": [1, 1]}, "call prepack first"),
    ],
)
def test_conv2d_refuses(make_case, backend, change, message) -> None:
    geometry = Conv2dGeometry((3, 3))
    case = make_case(4, (2, 5, 7), (70,), 20, geometry)
    call = case.native if backend == "cpu" else case.call
    arguments = {
        "x_q": call.x_q,
        "x_scale": call.x_scale,
        "qweight": call.qweight,
        "w_scale": call.w_scale,
        "kernel_size": [3, 3],
        "backend": backend,
        **change,
    }
    with pytest.raises(ShapeError, match=message):
        torch.ops.ptq4adm.w4a8_conv2d(**arguments)


def test_inputs_without_channels_or_pixels_are_refused(backend: str) -> None:
    x, w, one = torch.zeros(2, 0, dtype=torch.int8), torch.ones(16), torch.ones(())
    packed = (1, 0) if backend == "cpu" else (16, 0)
    empty = torch.zeros(packed, dtype=torch.uint8)
    with pytest.raises(ShapeError, match="at least one channel"):
        ops.linear(x, one, empty, w, bits=4, backend=backend)
    image = torch.zeros(1, 3, 3, 0, dtype=torch.int8)
    with pytest.raises(ShapeError, match="at least one channel"):
        ops.conv2d(image, one, empty, w, bits=4, kernel_size=(3, 3), backend=backend)
    packed = (1, 512) if backend == "cpu" else (16, 32)
    weight = torch.zeros(packed, dtype=torch.uint8)
    with pytest.raises(ShapeError, match="leave it out"):
        ops.linear(
            torch.zeros(2, 64, dtype=torch.int8), one, weight, w, bits=4, backend=backend,
            x2_q=x, x2_scale=one,
        )  # fmt: skip
    flat = torch.zeros(1, 0, 3, 64, dtype=torch.int8)
    with pytest.raises(ShapeError, match="nothing to enlarge"):
        ops.conv2d(
            flat, one, weight, w, bits=4, kernel_size=(1, 1), backend=backend, upsample=(4, 4)
        )


def test_more_k_than_an_int32_sum_holds_is_refused(backend: str) -> None:
    K = 131072
    packed = (1, 8 * K) if backend == "cpu" else (16, K // 2)
    x, weight = torch.zeros(1, K, dtype=torch.int8), torch.zeros(packed, dtype=torch.uint8)
    with pytest.raises(ShapeError, match=r"K = 131072 .*needs K < 131072"):
        ops.linear(x, torch.ones(()), weight, torch.ones(16), bits=4, backend=backend)
