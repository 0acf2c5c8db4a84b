"""Device functions: decoding every byte, rounding, scales; and their assembly, read as text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from ptq4adm.kernels import device as device_functions
from ptq4adm.kernels.device import (
    absmax_bits,
    decode_int4,
    decode_int4_groups,
    gelu,
    load_scale,
    quantize,
    round_to_int8,
    scale_of,
)
from ptq4adm.kernels.launch import launch
from ptq4adm.ops import reference

BYTES = torch.arange(256, dtype=torch.uint8)
NIBBLES = torch.tensor([n - 16 if n > 7 else n for n in range(16)])  # value of each code
INF, NAN = float("inf"), float("nan")


def _run(kernel: Any, device: str, *args: Any, **keywords: Any) -> None:
    launch(kernel, (1,), torch.device(device), *args, num_warps=1, **keywords)


# --- decoding -----------------------------------------------------------------------------------


@triton.jit
def _decode_kernel(packed_ptr, low_ptr, high_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    low, high = decode_int4(tl.load(packed_ptr + offs))
    tl.store(low_ptr + offs, low)
    tl.store(high_ptr + offs, high)


@triton.jit
def _decode_groups_kernel(packed_ptr, multiplier, low_ptr, high_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    packed = tl.load(packed_ptr + offs)
    multipliers = tl.full((SIZE,), 0, tl.int32) + multiplier
    offsets = (128 - 8 * multipliers) * 0x01010101
    low, high = decode_int4_groups(packed, multipliers, offsets)
    tl.store(low_ptr + offs, low)
    tl.store(high_ptr + offs, high)


def test_every_byte_gives_sixteen_times_its_nibbles(device) -> None:
    low, high = (torch.full((256,), 99, dtype=torch.int8, device=device) for _ in range(2))
    _run(_decode_kernel, device, BYTES.to(device), low, high, SIZE=256)
    assert low.tolist() == (16 * NIBBLES[BYTES.long() % 16]).tolist()
    assert high.tolist() == (16 * NIBBLES[BYTES.long() // 16]).tolist()


@pytest.mark.parametrize("multiplier", range(1, 16))
def test_every_byte_times_every_multiplier(device, multiplier) -> None:
    low, high = (torch.full((256,), 99, dtype=torch.int8, device=device) for _ in range(2))
    packed = BYTES.to(device)
    _run(_decode_groups_kernel, device, packed, multiplier, low, high, SIZE=256)
    expected = multiplier * NIBBLES
    assert low.tolist() == expected[BYTES.long() % 16].to(torch.int8).tolist()
    assert high.tolist() == expected[BYTES.long() // 16].to(torch.int8).tolist()


# --- the assembly of decoding, where no GPU runs it ---------------------------------------------

_MASK = 0xFFFFFFFF


def _lop3(a: int, b: int, c: int, table: int) -> int:
    """Bitwise function of three: bit i of the table is its value at i = 4 a + 2 b + c."""
    result = 0
    for bit in range(32):
        index = (a >> bit & 1) * 4 + (b >> bit & 1) * 2 + (c >> bit & 1)
        result |= (table >> index & 1) << bit
    return result


# PTX ISA, integer and logic instructions on .b32 and .u32
_PTX = {
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "lop3.b32": _lop3,
}


def _assembly(function: str) -> str:
    """The text of a function's inline assembly."""
    source = Path(device_functions.__file__).read_text()
    body = source.split(f"def {function}(")[1].split("\ndef ")[0]
    found = re.search(r'inline_asm_elementwise\(\s*"""(.*?)"""', body, re.DOTALL)
    assert found is not None
    return found.group(1)


def _execute(text: str, operands: dict[int, int]) -> dict[str, int]:
    """Run PTX on 32-bit registers ``$i``."""
    registers = {f"${number}": value for number, value in operands.items()}
    for line in filter(None, (line.strip().rstrip(";") for line in text.splitlines())):
        if line in "{}" or line.startswith(".reg"):
            continue
        opcode, rest = line.split(maxsplit=1)
        target, *sources = (part.strip() for part in rest.split(","))
        values = [registers[s] if s in registers else int(s, 0) for s in sources]
        registers[target] = _PTX[opcode](*values) & _MASK
    return registers


def _signed(word: int) -> list[int]:
    return [(byte ^ 128) - 128 for byte in word.to_bytes(4, "little")]


def _words() -> list[int]:
    """Every byte, beside others."""
    bytes_ = torch.cat([torch.randperm(256), torch.arange(256), torch.tensor([0, 255] * 64)])
    return [int.from_bytes(bytes(word), "little") for word in bytes_.reshape(-1, 4).tolist()]


def test_assembly_decodes_every_byte() -> None:
    text = _assembly("decode_int4")
    for word in _words():
        registers = _execute(text, {2: word})
        codes = word.to_bytes(4, "little")
        assert _signed(registers["$0"]) == [16 * int(NIBBLES[c % 16]) for c in codes]
        assert _signed(registers["$1"]) == [16 * int(NIBBLES[c // 16]) for c in codes]


@pytest.mark.parametrize("multiplier", range(1, 16))
def test_assembly_multiplies_four_bytes_without_carries(multiplier) -> None:
    """A byte of the group's range: the product of a weight with its multiplier fits in it."""
    text = _assembly("decode_int4_groups")
    offset = (128 - 8 * multiplier) * 0x01010101 & _MASK
    for word in _words():
        # four elements share a register of bytes, and have one each of multipliers and offsets
        operands = (
            {2: word} | {3 + i: multiplier for i in range(4)} | {7 + i: offset for i in range(4)}
        )
        registers = _execute(text, operands)
        codes = word.to_bytes(4, "little")
        assert _signed(registers["$0"]) == [multiplier * int(NIBBLES[c % 16]) for c in codes]
        assert _signed(registers["$1"]) == [multiplier * int(NIBBLES[c // 16]) for c in codes]


# --- rounding and scales ------------------------------------------------------------------------


@triton.jit
def _round_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    tl.store(y_ptr + offs, round_to_int8(tl.load(x_ptr + offs)))


@triton.jit
def _quantize_kernel(x_ptr, scale_ptr, y_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    tl.store(y_ptr + offs, quantize(tl.load(x_ptr + offs), tl.load(scale_ptr)))


@triton.jit
def _absmax_kernel(x_ptr, scale_ptr, SIZE: tl.constexpr):
    bits = tl.max(absmax_bits(tl.load(x_ptr + tl.arange(0, SIZE))))
    tl.store(scale_ptr, scale_of(bits))


@triton.jit
def _load_scale_kernel(scale_ptr, step_ptr, out_ptr, table_size):
    tl.store(out_ptr, load_scale(scale_ptr, step_ptr, table_size))


@triton.jit
def _gelu_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    tl.store(y_ptr + offs, gelu(tl.load(x_ptr + offs)))


def _next(value: float, towards: float) -> float:
    return float(torch.nextafter(torch.tensor(value), torch.tensor(towards)))


def test_rounding_is_to_even_and_clamps(device) -> None:
    values = [
        *(half / 2 for half in range(-260, 261)),
        *(_next(0.5, 0), _next(0.5, 1), _next(-0.5, 0), _next(126.5, 127), _next(126.5, 126)),
        *(INF, -INF, 3e38, -3e38, 1e-40, -0.0),
    ]
    x = torch.zeros(1024)
    x[: len(values)] = torch.tensor(values)
    got = torch.full((1024,), 99, dtype=torch.int8, device=device)
    _run(_round_kernel, device, x.to(device), got, SIZE=1024)
    expected = x.round().clamp(-127, 127).to(torch.int8)
    assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("scale", [0.0123, 1.0, 3e-38, 1e-8 / 127, 7e4])
def test_quantize_equals_the_reference(device, scale) -> None:
    x = torch.randn(1024) * scale * 60
    got = torch.full((1024,), 99, dtype=torch.int8, device=device)
    step = torch.tensor([scale])
    _run(_quantize_kernel, device, x.to(device), step.to(device), got, SIZE=1024)
    expected, _ = reference.quantize_int8(x, x_scale=step)
    assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize(
    "values", [[0.0], [-3.0, 2.0], [1e-9], [1e-8], [2e-8, -1e-9], [1e38, -3e38], [1e-45]]
)
def test_dynamic_scale_equals_the_reference(device, values) -> None:
    x = torch.zeros(16)
    x[: len(values)] = torch.tensor(values)
    got = torch.full((1,), NAN, device=device)
    _run(_absmax_kernel, device, x.to(device), got, SIZE=16)
    assert got.item() == reference.quantize_int8(x)[1].item()


@pytest.mark.parametrize("where", [0, 7, 15])
@pytest.mark.parametrize("values", [(NAN, 1.0), (NAN, INF), (-NAN, INF)])
def test_nan_is_the_greatest_of_all(device, where, values) -> None:
    x = torch.full((16,), values[1])
    x[where] = values[0]
    got = torch.zeros(1, device=device)
    _run(_absmax_kernel, device, x.to(device), got, SIZE=16)
    assert bool(got.isnan())


@pytest.mark.parametrize(
    ("step", "expected"), [(None, 0), (0, 0), (3, 3), (4, None), (-1, None), (2**33, None)]
)
def test_the_scale_of_a_step(device, step, expected) -> None:
    table = torch.rand(4, device=device)
    index = None if step is None else torch.tensor([step], device=device)
    got = torch.zeros(1, device=device)
    _run(_load_scale_kernel, device, table, index, got, 4)
    if expected is None:
        assert bool(got.isnan())
    else:
        assert got.item() == table[expected].item()


def test_gelu_is_the_exact_one(device) -> None:
    x = torch.cat([torch.linspace(-12, 12, 1021), torch.tensor([0.0, INF, NAN])])
    got = torch.zeros(1024, device=device)
    _run(_gelu_kernel, device, x.to(device), got, SIZE=1024)
    exact = torch.nn.functional.gelu(x.double())
    error = (got.cpu().double() - exact)[:1021].abs()
    # 1 + erf(x) cancels where x is negative: relative to x, not to the result
    assert bool((error <= 2.5e-7 * (1 + x[:1021].abs())).all())
    assert got[1021:].cpu().tolist()[:2] == [0.0, INF]
    assert bool(got[1023].isnan())
