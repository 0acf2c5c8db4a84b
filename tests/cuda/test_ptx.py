"""The other side of instructions.h: each function is the instruction that its comment names."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
ARCHITECTURES = ("80", "89", "90a")

PARAMETERS = "char* p, const char* q, float x, float y, int* out"

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


COPY = r"cp\.async\.bulk\.tensor\.{}d\.shared::cluster\.global\.tile\.mbarrier::complete_tx::bytes"
# the same with (..., TensorMap map, Barrier* b, uint64_t d), for sm_90a alone
CALLS_SM90 = {
    "barrier_init": (
        "barrier_init(b, 3);",
        [r"mbarrier\.init\.shared::cta\.b64 \[%r\d+\], %r\d+;"],
    ),
    "barrier_init_fence": (
        "barrier_init_fence();",
        [r"fence\.mbarrier_init\.release\.cluster;", r"fence\.proxy\.async\.shared::cta;"],
    ),
    "barrier_arrive": (
        "barrier_arrive(b);",
        [r"mbarrier\.arrive\.release\.cta\.shared::cta\.b64 _, \[%r\d+\];"],
    ),
    "barrier_arrive_expect": (
        "barrier_arrive_expect(b, *out);",
        [r"mbarrier\.arrive\.expect_tx\.release\.cta\.shared::cta\.b64 _, \[%r\d+\], %r\d+;"],
    ),
    "barrier_wait": (
        "barrier_wait(b, *out);",
        [
            r"mbarrier\.try_wait\.parity\.acquire\.cta\.shared::cta\.b64 p, \[%r\d+\], %r\d+;",
            r"@%p\d+ bra",
        ],
    ),
    "warpgroup_barrier": (
        "warpgroup_barrier(1, 128);",
        [r"mov\.[bu]32\s+(%r\d+), 1;[\s\S]*mov\.[bu]32\s+(%r\d+), 128;[\s\S]*bar\.sync \1, \2;"],
    ),
    "async_proxy_fence": ("async_proxy_fence();", [r"fence\.proxy\.async\.shared::cta;"]),
    "prefetch_tensor_map": ("prefetch_tensor_map(&map);", [r"prefetch\.tensormap \[%rd\d+\];"]),
    "copy_box_2d": (
        "copy_box_2d(shared_memory(), &map, out[0], out[1], b);",
        [COPY.format(2) + r" \[%r\d+\], \[%rd\d+, \{(%r\d+(, )?){2}\}\], \[%r\d+\];"],
    ),
    "copy_box_4d": (
        "copy_box_4d(shared_memory(), &map, out[0], out[1], out[2], out[3], b);",
        [COPY.format(4) + r" \[%r\d+\], \[%rd\d+, \{(%r\d+(, )?){4}\}\], \[%r\d+\];"],
    ),
    "wgmma_fence": ("wgmma_fence();", [r"wgmma\.fence\.sync\.aligned;"]),
    "wgmma_commit": ("wgmma_commit();", [r"wgmma\.commit_group\.sync\.aligned;"]),
    "wgmma_wait": (
        "wgmma_wait<0>(); wgmma_wait<7>();",
        [r"wgmma\.wait_group\.sync\.aligned 0;", r"wgmma\.wait_group\.sync\.aligned 7;"],
    ),
    **{
        f"wgmma_s8_64xNx32_{columns}": (
            f"int32_t acc[{columns // 2}]; uint32_t a[4] = {{1, 2, 3, 4}};"
            f"for (int i = 0; i < {columns // 2}; ++i) acc[i] = out[i];"
            f"wgmma_fence(); wgmma_s8_64xNx32<{columns}>(acc, a, d); wgmma_commit();"
            f"wgmma_wait<0>(); for (int i = 0; i < {columns // 2}; ++i) out[i] = acc[i];",
            [
                rf"wgmma\.mma_async\.sync\.aligned\.m64n{columns}k32\.s32\.s8\.s8 "
                rf"\{{(%r\d+(, )?){{{columns // 2}}}\}}, \{{(%r\d+(, )?){{4}}\}}, %rd\d+, p;"
            ],
        )
        for columns in (32, 64, 96, 128, 192, 256)
    },
    "registers_increase": (
        "registers_increase<232>();",
        [r"setmaxnreg\.inc\.sync\.aligned\.u32 232;"],
    ),
    "registers_decrease": (
        "registers_decrease<40>();",
        [r"setmaxnreg\.dec\.sync\.aligned\.u32 40;"],
    ),
    # bits 0-13: address / 16; 1 << 16 | 32 << 32 | 2 << 62, as an unsigned or a signed number
    "matrix_descriptor": (
        "*reinterpret_cast<uint64_t*>(out) = matrix_descriptor(b);",
        [
            r"and\.b32\s+%r\d+, %r\d+, 262128;",
            r"shr\.u(32|64)\s.* 4;",
            r"-9223371899415756800|9223372174293794816",
        ],
    ),
    "shared_address": ("*out = shared_address(b);", [r"cvta\.to\.shared\.u64", r"cvt\.u32\.u64"]),
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


def _ptx_of(folder: Path, header: str, parameters: str, calls: dict, *flags: str) -> dict[str, str]:
    """PTX of every call's kernel, after it was assembled as well."""
    source = folder / "calls.cu"
    source.write_text(
        f'#include "{header}"\nusing namespace ptq4adm;\n'
        + "\n".join(
            f'extern "C" __global__ void call_{name}({parameters}) {{ {body} }}'
            for name, (body, _) in calls.items()
        )
    )
    said = _nvcc(source, folder / "calls.cubin", *flags, "--keep", f"--keep-dir={folder}", "-cubin")
    assert "warning" not in said.lower(), said
    parts = re.split(r"\.visible \.entry call_(\w+)\(", (folder / "calls.ptx").read_text())
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """By call, for one architecture.

    Compiled with the flag that lets a compiler round and flush as it likes.
    """
    flags = (f"-arch=sm_{request.param}", "--use_fast_math")
    folder = tmp_path_factory.mktemp("ptx")
    return _ptx_of(folder, "instructions.h", PARAMETERS, CALLS, *flags)


@pytest.fixture(scope="module")
def kernels_sm90(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    parameters = f"{PARAMETERS}, const __grid_constant__ TensorMap map, Barrier* b, uint64_t d"
    folder = tmp_path_factory.mktemp("ptx_sm90")
    return _ptx_of(folder, "instructions_sm90.h", parameters, CALLS_SM90, "-arch=sm_90a")


@pytest.mark.parametrize("name", CALLS)
def test_function_is_its_instruction(kernels: dict[str, str], name: str) -> None:
    for instruction in CALLS[name][1]:
        assert re.search(instruction, kernels[name]), kernels[name]


@pytest.mark.parametrize("name", CALLS_SM90)
def test_function_of_sm90_is_its_instruction(kernels_sm90: dict[str, str], name: str) -> None:
    for instruction in CALLS_SM90[name][1]:
        assert re.search(instruction, kernels_sm90[name]), kernels_sm90[name]


@pytest.mark.parametrize("columns", [32, 64, 96, 128, 192, 256])
def test_sums_of_a_product_are_in_order(kernels_sm90: dict[str, str], columns: int) -> None:
    """Register i of the instruction is what is loaded from out[i], and stored there."""
    ptx = kernels_sm90[f"wgmma_s8_64xNx32_{columns}"]
    sums = re.findall(r"%r\d+", re.search(r"k32\.s32\.s8\.s8 \{(.*?)\}", ptx).group(1))
    stored = dict(re.findall(r"st\.global\.[bu]32\s+\[%rd\d+(?:\+(\d+))?\], (%r\d+);", ptx))
    assert [stored["" if i == 0 else str(4 * i)] for i in range(columns // 2)] == sums


@pytest.mark.parametrize("name", ["add_rn", "multiply_rn", "divide_rn", "half_from_float"])
def test_fast_math_flushes_nothing(kernels: dict[str, str], name: str) -> None:
    assert ".ftz" not in kernels[name]
    assert "fma" not in kernels[name]


@pytest.mark.parametrize(
    ("header", "calls"),
    [("instructions_emulated.h", CALLS), ("instructions_sm90_emulated.h", CALLS_SM90)],
)
def test_every_function_is_called(header: str, calls: dict[str, tuple[str, list[str]]]) -> None:
    """The lists above hold all that the emulated side offers."""
    offered = set()
    is_inner = False
    for line in (CUDA / header).read_text().splitlines():
        is_inner = line == "namespace emulator {" or (is_inner and not line.startswith("}  // "))
        found = re.match(r"(?:inline )?[\w:]+\*? (\w+)\(", line)
        if found and not is_inner:
            offered.add(found.group(1))
    names = {re.sub(r"_\d+$", "", name) if "xN" in name else name for name in calls}
    assert offered == names - {"matrix_descriptor"}  # the same on both sides: instructions_sm90.h
