"""From accumulators to outputs: the float32 formula, bit for bit, with each optional term."""

from __future__ import annotations

import pytest
import torch

from ptq4adm.errors import NonFiniteError, UncalibratedStepError
from ptq4adm.ops import cpu, reference
from ptq4adm.ops.arguments import Conv2dGeometry
from ptq4adm.ops.prepack import prepack

N = 37  # two whole panels of 16 channels and a ragged one
GEOMETRY = Conv2dGeometry((3, 3), padding=(1, 1))

LINEAR_OPTIONS = {
    "scalar scale": lambda: {},
    "bias": lambda: {"bias": torch.randn(N)},
    "float16 bias": lambda: {"bias": torch.randn(N).half()},
    "temb": lambda: {"temb": torch.randn(3, N)},
    "residual": lambda: {"residual": torch.randn(12, N)},
    "all": lambda: {
        "bias": torch.randn(N),
        "temb": torch.randn(3, N),
        "residual": torch.randn(12, N).bfloat16(),
    },
    "float16 out": lambda: {"bias": torch.randn(N), "out_dtype": torch.float16},
    "bfloat16 out": lambda: {"out_dtype": torch.bfloat16},
    "int8 out": lambda: {"bias": torch.randn(N), "out_scale": torch.tensor(0.37)},
    "int8 out, clamped": lambda: {"out_scale": torch.tensor(0.001)},
}


def _linear_case(make_case, bits, segments=(100,), n=N):
    case = make_case(bits, (12,), segments, n)
    return case.with_scales(torch.tensor(0.0123), torch.rand(n) * 0.01)


@pytest.mark.parametrize("options", LINEAR_OPTIONS)
@pytest.mark.parametrize("bits", [4, 8])
def test_cpu_equals_reference_bit_for_bit(make_case, isa, bits, options) -> None:
    case = _linear_case(make_case, bits).with_options(**LINEAR_OPTIONS[options]())
    expected = reference.linear(case.call)
    got = cpu.linear(case.native, isa)
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)


def test_formula_in_float64(make_case) -> None:
    bias, temb, residual = torch.randn(N), torch.randn(3, N), torch.randn(12, N)
    case = _linear_case(make_case, 4, (100, 70))
    case = case.with_options(x2_scale=torch.tensor(0.5), bias=bias, temb=temb, residual=residual)
    acc1, acc2 = (acc.double() for acc in case.oracle())
    y = (acc1 * case.call.x_scale.double() + acc2 * 0.5) * case.call.w_scale.double()
    for m in range(12):
        y[m] += bias.double() + temb[m // 4].double() + residual[m].double()
    error = (reference.linear(case.call).double() - y).norm() / y.norm()
    assert error < 1e-6, f"y: relative error {error}"


@pytest.mark.parametrize("bits", [4, 8])
def test_two_segments_have_their_own_scales(make_case, isa, bits) -> None:
    case = _linear_case(make_case, bits, (64, 40))
    for x_scale, x2_scale in (
        (torch.tensor(0.01), torch.tensor(2.5)),
        (torch.rand(12), torch.tensor([0.3])),
        (torch.rand(12), torch.rand(12)),
    ):
        this = case.with_scales(x_scale, case.call.w_scale).with_options(x2_scale=x2_scale)
        assert torch.equal(cpu.linear(this.native, isa), reference.linear(this.call))
        acc1, acc2 = (acc.double() for acc in case.oracle())
        first, second = (s.double().reshape(-1, 1) for s in (x_scale, x2_scale))
        y = (acc1 * first + acc2 * second) * case.call.w_scale.double()
        torch.testing.assert_close(reference.linear(this.call).double(), y, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_have_their_own_scales(make_case, isa, bits) -> None:
    """300 rows: several row blocks, each of which must find its own part of the vector."""
    case = make_case(bits, (300,), (64,), N).with_scales(torch.rand(300), torch.rand(N))
    assert torch.equal(cpu.linear(case.native, isa), reference.linear(case.call))
    expected = case.oracle()[0].double() * case.call.x_scale.double()[:, None]
    expected = (expected * case.call.w_scale.double()).float()
    torch.testing.assert_close(reference.linear(case.call), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_conv2d_epilogue_follows_pixels_and_samples(make_case, isa, bits) -> None:
    case = make_case(bits, (3, 9, 11), (40, 24), N, GEOMETRY)
    case = case.with_scales(torch.tensor(0.02), torch.rand(N)).with_options(
        x2_scale=torch.tensor(0.7),
        bias=torch.randn(N),
        temb=torch.randn(3, N),
        residual=torch.randn(3, 9, 11, N),
    )
    options = case.call.options
    acc1, acc2 = (acc.double() for acc in case.oracle())
    y = (acc1 * 0.02 + acc2 * 0.7) * case.call.w_scale.double() + options.bias.double()
    y = y + options.temb.double()[:, None, None] + options.residual.double()
    expected = reference.conv2d(case.call, GEOMETRY)
    torch.testing.assert_close(expected.double(), y, rtol=1e-5, atol=1e-3)
    assert torch.equal(cpu.conv2d(case.native, GEOMETRY, isa), expected)


@pytest.mark.parametrize("out_scale", [None, 0.05])
@pytest.mark.parametrize("bits", [4, 8])
def test_geglu_gates_with_the_second_half(make_case, isa, bits, out_scale) -> None:
    case = _linear_case(make_case, bits, n=38).with_options(geglu=True, bias=torch.randn(38))
    plain = reference.linear(case.with_options(geglu=False).call)
    gated = plain[:, :19] * torch.nn.functional.gelu(plain[:, 19:])
    if out_scale is not None:
        case = case.with_options(out_scale=torch.tensor(out_scale))
        gated = reference.quantize_int8(gated, x_scale=torch.tensor(out_scale))[0]
    assert torch.equal(reference.linear(case.call), gated)
    assert torch.equal(cpu.linear(case.native, isa), gated)


def test_step_selects_the_row_of_every_table(make_case, isa) -> None:
    tables = [torch.rand(10) + 0.1 for _ in range(3)]
    case = _linear_case(make_case, 4, (64, 40))
    for index in (0, 9):
        step = torch.tensor(index)
        by_table = case.with_scales(tables[0], case.call.w_scale).with_options(
            x2_scale=tables[1], out_scale=tables[2], step=step
        )
        by_hand = case.with_scales(tables[0][index], case.call.w_scale).with_options(
            x2_scale=tables[1][index], out_scale=tables[2][index]
        )
        assert torch.equal(reference.linear(by_table.call), reference.linear(by_hand.call))
        assert torch.equal(cpu.linear(by_table.native, isa), reference.linear(by_hand.call))


@pytest.mark.parametrize("index", [-1, 10])
def test_step_outside_the_table_is_refused(make_case, isa, index) -> None:
    case = _linear_case(make_case, 4).with_scales(torch.rand(10), torch.rand(N))
    case = case.with_options(step=torch.tensor(index))
    message = rf"step = {index}: the scale table has rows 0\.\.9"
    with pytest.raises(UncalibratedStepError, match=message):
        reference.linear(case.call)
    with pytest.raises(UncalibratedStepError, match=message):
        cpu.linear(case.native, isa)


def test_non_finite_int8_output_is_refused(make_case, isa) -> None:
    bias = torch.zeros(N)
    bias[N - 1] = float("nan")
    case = _linear_case(make_case, 4).with_options(bias=bias, out_scale=torch.tensor(0.1))
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        reference.linear(case.call)
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        cpu.linear(case.native, isa)


def test_large_accumulators_round_like_the_reference(make_case, isa) -> None:
    """Sums above 2^24 do not fit float32: both sides must round the same way."""
    case = make_case(8, (4,), (4001,), 16)
    case.native.x_q.fill_(127)
    case.call.x_q.fill_(127)
    weight = case.weight.abs().clamp(min=100).to(torch.int8)[:, :, 0, 0]
    acc = (127 * weight.long().sum(1)).expand(4, 16)
    assert int(acc.min()) > 2**24
    padded = torch.nn.functional.pad(weight, (0, 4032 - 4001))
    case.call.qweight.copy_(padded)
    case.native.qweight.copy_(prepack(padded, bits=8, layout=case.layout, backend="cpu"))
    assert torch.equal(reference.linear(case.call), acc.float())
    assert torch.equal(cpu.linear(case.native, isa), acc.float())


@pytest.mark.parametrize("is_int8", [False, True], ids=["float32", "int8"])
@pytest.mark.parametrize("size", [(1, 64, 32), (7, 100, 96), (131, 1100, 224), (9, 70, 40)])
def test_gated_result_equals_the_reference(make_case, isa, size, is_int8) -> None:
    """Panels of 16 are gated in the kernel, 40 channels outside; gates lie N / 2 from values."""
    M, K, N = size
    case = make_case(4, (M,), (K,), N)
    case = case.with_scales(torch.tensor(1e-3), 0.5 + torch.rand(N))
    options = {"bias": torch.randn(N), "residual": torch.randn(M, N), "geglu": True}
    if is_int8:
        options["out_scale"] = torch.tensor(0.02)
    case = case.with_options(**options)
    expected, got = reference.linear(case.call), cpu.linear(case.native, isa)
    assert got.shape == expected.shape == (M, N // 2)
    assert got.dtype == expected.dtype
    if is_int8:
        steps = (got.int() - expected.int()).abs()
        assert int(steps.max()) <= 1
        assert int(steps.sum()) <= max(1, steps.numel() // 1000)
    else:
        assert float((got - expected).abs().max()) <= 2e-6 * float(expected.abs().max())


def test_gate_that_is_not_finite_is_refused(make_case, isa) -> None:
    """gelu turns minus infinity into 0, which would hide it."""
    case = make_case(4, (3,), (64,), 64)
    bias = torch.zeros(64)
    bias[50] = -float("inf")
    case = case.with_options(bias=bias, geglu=True, out_scale=torch.tensor(0.1))
    with pytest.raises(NonFiniteError):
        cpu.linear(case.native, isa)


def test_gate_that_is_not_finite_shows_in_a_float_result(make_case, isa) -> None:
    case = make_case(4, (5,), (64,), 64)
    bias = torch.zeros(64)
    bias[40], bias[50] = float("nan"), -float("inf")
    case = case.with_options(bias=bias, geglu=True)
    expected, got = reference.linear(case.call), cpu.linear(case.native, isa)
    assert torch.equal(torch.isnan(got), torch.isnan(expected))
    assert bool(torch.isnan(got[:, 8]).all())
