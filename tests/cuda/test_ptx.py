"""The other side of instructions.h: each function is the instruction that its comment names."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
ARCHITECTURES = ("80", "89", "90a")

# kernel of one call: what it does with (char* p, const char* q, float x, float y, int* out), and
# the instruction, or several, that its PTX must hold
CALLS = {
    "thread_index": ("*out = thread_index();", [r"mov\.u32 .*%tid\.x;"]),
    "lane_index": ("*out = lane_index();", [r"mov\.u32 .*%tid\.x;", r"and\.b32 .*, 31;"]),
    "warp_index": ("*out = warp_index();", [r"mov\.u32 .*%tid\.x;", r"shr\.u32 .*, 5;"]),
    "block_index": (
        "*out = block_index(0) + block_index(1) + block_index(2);",
        [r"%ctaid\.x;", r"%ctaid\.y;", r"%ctaid\.z;"],
    ),
    "grid_size": (
        "*out = grid_size(0) + grid_size(1) + grid_size(2);",
        [r"%nctaid\.x;", r"%nctaid\.y;", r"%nctaid\.z;"],
    ),
    "block_barrier": ("block_barrier();", [r"bar\.sync\s+0;|barrier\.sync\s+0;"]),
    "copy_async_16": (
        "copy_async_16(shared_memory(), q, x > y);",
        [
            r"cp\.async\.cg\.shared\.global \[%r\d+\], \[%rd\d+\], 16, %r\d+;",
            r"selp\.b32 .*(16, 0|0, 16),",
        ],
    ),
    "copy_async_commit": ("copy_async_commit();", [r"cp\.async\.commit_group;"]),
    "copy_async_wait": (
        "copy_async_wait<0>(); copy_async_wait<3>();",
        [r"cp\.async\.wait_group 0;", r"cp\.async\.wait_group 3;"],
    ),
    "load_matrix_x4": (
        "uint32_t f[4]; load_matrix_x4(f, shared_memory() + 16 * thread_index());"
        "for (int i = 0; i < 4; ++i) out[i] = f[i];",
        [r"ldmatrix\.sync\.aligned\.m8n8\.x4\.shared\.b16 \{(%r\d+,? ?){4}\}, \[%r\d+\];"],
    ),
    "multiply_s8_16x8x32": (
        "int32_t c[4] = {1, 2, 3, 4}; const uint32_t a[4] = {5, 6, 7, 8}, b[2] = {9, 10};"
        "multiply_s8_16x8x32(c, a, b); for (int i = 0; i < 4; ++i) out[i] = c[i];",
        [r"mma\.sync\.aligned\.m16n8k32\.row\.col\.s32\.s8\.s8\.s32 \{"],
    ),
    "load": ("*out = load(q);", [r"ld\.global(\.nc)?\.[us]8"]),
    "store": ("store(out, 3);", [r"st\.global\.[bu]32"]),
    "shared_memory": (
        "store_16(shared_memory(), load_16(q)); block_barrier();"
        "*out = load(reinterpret_cast<int*>(shared_memory() + 4 * thread_index()));",
        [r"st\.shared\.v4\.[bu]32", r"ld\.shared\.[bu]32"],
    ),
    "load_16": ("store_16(p, load_16(q));", [r"ld\.global(\.nc)?\.v4\.[bu]32"]),
    "store_16": ("store_16(p, load_16(q));", [r"st\.global\.v4\.[bu]32"]),
    "load_stream_16": (
        "store_16(p, load_stream_16(q));",
        [r"ld\.global\.nc\.L1::no_allocate\.v4\.u32 \{(%r\d+,? ?){4}\}, \[%rd\d+\];"],
    ),
    "load_l2_16": ("store_16(p, load_l2_16(q));", [r"ld\.global\.cg\.v4\.u32"]),
    "store_l2_16": ("store_l2_16(p, load_16(q));", [r"st\.global\.cg\.v4\.u32"]),
    "count_arrival": (
        "*out = count_arrival(out + 1);",
        [r"atom\.global\.acq_rel\.gpu\.add\.s32 %r\d+, \[%rd\d+\], 1;"],
    ),
    "add_rn": ("out[0] = __float_as_int(add_rn(x, y));", [r"add\.rn\.f32"]),
    "multiply_rn": ("out[0] = __float_as_int(multiply_rn(x, y));", [r"mul\.rn\.f32"]),
    "divide_rn": ("out[0] = __float_as_int(divide_rn(x, y));", [r"div\.rn\.f32"]),
    "round_half_even": ("out[0] = round_half_even(x);", [r"cvt\.rni\.s32\.f32"]),
    "erf_f32": ("out[0] = __float_as_int(erf_f32(x));", [r"ex2\.approx"]),
    "nan_f32": ("out[0] = __float_as_int(nan_f32());", [r"2147483647|0x7FFFFFFF|0f7FFFFFFF"]),
    "half_from_float": ("out[0] = half_from_float(x);", [r"cvt\.rn\.f16\.f32"]),
    "float_from_half": (
        "out[0] = __float_as_int(float_from_half(static_cast<uint16_t>(out[1])));",
        [r"cvt\.f32\.f16"],
    ),
    "bfloat16_from_float": ("out[0] = bfloat16_from_float(x);", [r"cvt\.rn\.bf16\.f32"]),
    "float_from_bfloat16": (
        "out[0] = __float_as_int(float_from_bfloat16(static_cast<uint16_t>(out[1])));",
        [r"shl\.b32 .*, 16;"],
    ),
}


def _nvcc(source: Path, output: Path, *flags: str) -> str:
    """Compile; returns what the compiler said, which an error is part of."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH")
    done = subprocess.run(
        [nvcc, "-std=c++17", f"-I{CUDA}", *flags, source, "-o", output],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module", params=ARCHITECTURES)
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """PTX of every call's kernel for one architecture, after it was assembled as well.

    Compiled with the flag that lets a compiler round and flush as it likes.
    """
    folder = tmp_path_factory.mktemp("ptx")
    source = folder / "calls.cu"
    signature = "(char* p, const char* q, float x, float y, int* out)"
    source.write_text(
        '#include "instructions.h"\nusing namespace ptq4adm;\n'
        + "\n".join(
            f'extern "C" __global__ void call_{name}{signature} {{ {body} }}'
            for name, (body, _) in CALLS.items()
        )
    )
    architecture = f"-arch=sm_{request.param}"
    flags = ("--use_fast_math", "--keep", f"--keep-dir={folder}", "-cubin")
    said = _nvcc(source, folder / "calls.cubin", architecture, *flags)
    assert "warning" not in said.lower(), said
    parts = re.split(r"\.visible \.entry call_(\w+)\(", (folder / "calls.ptx").read_text())
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_function_is_its_instruction(kernels: dict[str, str], name: str) -> None:
    for instruction in CALLS[name][1]:
        assert re.search(instruction, kernels[name]), kernels[name]


@pytest.mark.parametrize("name", ["add_rn", "multiply_rn", "divide_rn", "half_from_float"])
def test_fast_math_flushes_nothing(kernels: dict[str, str], name: str) -> None:
    assert ".ftz" not in kernels[name]
    assert "fma" not in kernels[name]


def test_every_function_is_called() -> None:
    """The list above holds all that the emulated side offers."""
    text = (CUDA / "instructions_emulated.h").read_text()
    offered = set()
    is_inner = False
    for line in text.splitlines():
        is_inner = line == "namespace emulator {" or (is_inner and not line.startswith("}  // "))
        found = re.match(r"(?:inline )?[\w:]+\*? (\w+)\(", line)
        if found and not is_inner:
            offered.add(found.group(1))
    assert offered == set(CALLS)
