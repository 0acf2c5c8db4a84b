"""Instructions of sm_90a against the text of the PTX manual, and against CuTe's layouts."""

from __future__ import annotations

import re
from types import ModuleType

import numpy as np
import pytest
from cute_layouts import cute_text, layout_of, place_of

THREADS = range(128)
SIZES = (32, 64, 96, 128, 192, 256)
ATOM = 512  # bytes after which the 64-byte swizzle repeats


def _swizzled(address: np.ndarray) -> np.ndarray:
    """The 64-byte swizzle: bits 4 and 5 of an address, exchanged by its bits 7 and 8."""
    return address ^ ((address >> 7) & 3) << 4


# --- products -------------------------------------------------------------------------------------


def _manual_a(thread: int, i: int) -> tuple[int, int]:
    """(m, k) of a_i, i < 16, of wgmma m64k32: the figure for 8-bit A in registers."""
    warp, group, thread_in_group = thread // 32, thread % 32 >> 2, thread % 4
    row = 16 * warp + group + (8 if 4 <= i < 8 or i >= 12 else 0)
    return row, thread_in_group * 4 + (i & 3) + (0 if i < 8 else 16)


def _manual_d(thread: int, i: int) -> tuple[int, int]:
    """(m, n) of d_i, i < N / 2: the figure for D of m64nN."""
    warp, group, thread_in_group = thread // 32, thread % 32 >> 2, thread % 4
    row = 16 * warp + group + (8 if i % 4 >= 2 else 0)
    return row, 8 * (i // 4) + thread_in_group * 2 + (i & 1)


def _positions(source: str, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """(m, k) of A's and (m, n) of D's elements, [thread, i, 2]."""
    if source == "manual":
        maps = ((_manual_a, 16), (_manual_d, columns // 2))
        of_a, of_d = (np.array([[f(t, i) for i in range(n)] for t in THREADS]) for f, n in maps)
        return of_a, of_d
    text = cute_text("atom/mma_traits_sm90_gmma.hpp", "using CLayout_64xN ")
    traits = text[text.index(f"struct MMA_Traits<SM90_64x{columns}x32_S32S8S8_RS_TN>") :]
    traits = traits[: traits.index("};")]
    assert "using ALayout = GMMA::ALayout_64x32;" in traits
    assert f"using CLayout = GMMA::CLayout_64x{columns};" in traits
    found = []
    for name, values in (("ALayout_64x32", 16), ("CLayout_64xN", columns // 2)):
        layout = layout_of(text, name, N=columns)
        places = np.array([[place_of(layout, t, i, 128) for i in range(values)] for t in THREADS])
        found.append(np.stack([places % 64, places // 64], axis=-1))  # CuTe counts down the columns
    return found[0], found[1]


@pytest.mark.parametrize("columns", SIZES)
def test_cute_agrees_with_the_manual_on_the_product(columns: int) -> None:
    for manual, cute, size in zip(
        _positions("manual", columns),
        _positions("cute", columns),
        (64 * 32, 64 * columns),
        strict=True,
    ):
        assert np.array_equal(manual, cute)
        assert len(np.unique(manual.reshape(-1, 2), axis=0)) == size


@pytest.mark.parametrize("kind", ["random", "lowest", "wraps"])
@pytest.mark.parametrize("columns", SIZES)
def test_wgmma(instructions_sm90: ModuleType, columns: int, kind: str) -> None:
    """Both halves of the 64 k of a tile, which begins somewhere in shared memory."""
    of_a, of_d = _positions("manual", columns)
    rng = np.random.default_rng(columns)
    start = ATOM * int(rng.integers(0, 4))
    matrix_b = rng.integers(-128, 128, (columns, 64), dtype=np.int8)
    a = rng.integers(-128, 128, (128, 16), dtype=np.int8)
    if kind == "lowest":
        matrix_b[:], a[:] = -128, -128
    acc = rng.integers(-(2**31), 2**31, (128, columns // 2)).astype(np.int32)
    if kind == "wraps":
        acc[::2], acc[1::2] = 2**31 - 1, -(2**31)

    memory = rng.integers(0, 256, start + 64 * columns + 100, dtype=np.uint8)
    plain = start + np.arange(64 * columns)
    memory[_swizzled(plain)] = matrix_b.reshape(-1).view(np.uint8)
    matrix_a = np.zeros((64, 32), np.int64)
    matrix_a[of_a[..., 0], of_a[..., 1]] = a
    for half in (0, 1):
        product = matrix_a @ matrix_b[:, 32 * half : 32 * half + 32].astype(np.int64).T
        wanted = acc.astype(np.int64) + product[of_d[..., 0], of_d[..., 1]]
        got = instructions_sm90.wgmma(columns, acc, a.view(np.uint32), memory, start + 32 * half)
        assert np.array_equal(got, wanted.astype(np.int32))  # modulo 2^32
        assert kind != "wraps" or (wanted != got).any()


# --- the descriptor of B --------------------------------------------------------------------------


def _descriptor_fields() -> dict[str, tuple[int, int]]:
    """First bit and the bit after the last of every field, as CuTe's comments name them."""
    text = cute_text("arch/mma_sm90_desc.hpp", "union GmmaDescriptor")
    text = text[: text.index("} bitfield;")]
    pattern = r"// [^\n]*bit \[(\d+),\s*(\d+)\)(?:(?!bit \[).)*?(\w+)_ : (\d+)"
    found = re.findall(pattern, text, re.S)
    fields = {name: (int(first), int(last)) for first, last, name, _ in found}
    assert all(int(last) - int(first) == int(width) for first, last, _, width in found)
    return fields


# matrix descriptor of the manual: bits 13-0, 29-16, 45-32, 51-49, 63-62
MANUAL_FIELDS = {
    "start_address": (0, 14),
    "leading_byte_offset": (16, 30),
    "stride_byte_offset": (32, 46),
    "base_offset": (49, 52),
    "layout_type": (62, 64),
}


def test_cute_agrees_on_the_fields_of_the_descriptor() -> None:
    assert _descriptor_fields() == MANUAL_FIELDS


@pytest.mark.parametrize("place", [0, 32, 512, 3 * 512 + 32, 2**17 - 512])
def test_matrix_descriptor(instructions_sm90: ModuleType, place: int) -> None:
    descriptor = instructions_sm90.matrix_descriptor(place)
    fields = {
        name: descriptor >> first & ((1 << (last - first)) - 1)
        for name, (first, last) in MANUAL_FIELDS.items()
    }
    assert fields == {
        "start_address": place >> 4,  # matrix-descriptor-encode(x) = (x & 0x3ffff) >> 4
        "leading_byte_offset": 1,  # unused by swizzled layouts along K
        "stride_byte_offset": 8 * 64 >> 4,  # from eight rows to the next
        "base_offset": 0,
        "layout_type": 2,  # 64-byte swizzle
    }
    assert descriptor == sum(fields[name] << MANUAL_FIELDS[name][0] for name in fields)


def test_cute_agrees_on_the_swizzle() -> None:
    """Swizzle<bits, base, shift> of CuTe's atom for 64 bytes along K, on addresses of bytes."""
    text = cute_text("atom/mma_traits_sm90_gmma.hpp", "using Layout_K_SW64_Atom_Bits")
    match = re.search(
        r"Swizzle<(\d+),(\d+),(\d+)>, smem_ptr_flag, Layout<Shape<_8, _512>,Stride< _512,_1>>", text
    )
    assert match is not None
    bits, base, shift = (int(n) for n in match.groups())
    address = np.arange(4096)
    mask = ((1 << bits) - 1) << (base + shift)
    assert np.array_equal(address ^ (address & mask) >> shift, _swizzled(address))


# --- boxes ----------------------------------------------------------------------------------------


def _box(tensor: np.ndarray, box: tuple[int, ...], start: tuple[int, ...]) -> np.ndarray:
    """The bytes of a box in the order of shared memory; outermost dimension first everywhere."""
    full = np.zeros(box, np.uint8)
    sources, targets = [], []
    for size, extent, first in zip(tensor.shape, box, start, strict=True):
        low, high = max(first, 0), min(first + extent, size)
        if low >= high:
            return full.reshape(-1)
        sources.append(slice(low, high))
        targets.append(slice(low - first, high - first))
    full[tuple(targets)] = tensor[tuple(sources)]
    landed = np.zeros(full.size, np.uint8)
    landed[_swizzled(np.arange(full.size))] = full.reshape(-1)
    return landed


@pytest.mark.parametrize("is_backward", [False, True])
@pytest.mark.parametrize(
    "start", [(0, 0), (5, 64), (-3, 64), (-3, -16), (17, 128), (19, 0), (-40, 0), (0, 150), (30, 0)]
)
def test_boxes_of_rows(
    instructions_sm90: ModuleType, start: tuple[int, int], is_backward: bool
) -> None:
    """Rows [21, 150] in memory of 160 a row: what lies outside is zero, the padding too."""
    memory = np.random.default_rng(1).integers(1, 256, (21, 160), dtype=np.uint8)
    wanted = _box(memory[:, :150], (24, 64), start)
    got = instructions_sm90.copy_box(
        memory, [150, 21], [160], [64, 24], start[::-1], 1024, is_backward
    )
    assert np.array_equal(got, wanted)
    assert (wanted == 0).any()


@pytest.mark.parametrize("is_backward", [False, True])
@pytest.mark.parametrize(
    "start", [(0, 0, 0, 0), (1, -1, -1, 64), (0, 3, 2, 64), (2, 0, 0, 0), (1, 5, -1, 128)]
)
def test_boxes_of_pixels(
    instructions_sm90: ModuleType, start: tuple[int, ...], is_backward: bool
) -> None:
    """A pixel tensor [N, H, W, C] of 3 x 5 x 4 x 112 and tiles of 2 x 4 x 4 pixels."""
    memory = np.random.default_rng(2).integers(1, 256, (3, 5, 4, 112), dtype=np.uint8)
    wanted = _box(memory, (2, 4, 4, 64), start)
    strides = [112, 4 * 112, 5 * 4 * 112]
    got = instructions_sm90.copy_box(
        memory, [112, 4, 5, 3], strides, [64, 4, 4, 2], start[::-1], 512, is_backward
    )
    assert np.array_equal(got, wanted)


# --- tensor maps that cannot be -------------------------------------------------------------------

GOOD = {"base": 4096, "sizes": [128, 40], "strides": [128], "box": [64, 16]}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"base": 4104}, "the tensor's address is no multiple of 16 bytes"),
        ({"base": 0}, "the tensor's address is no multiple of 16 bytes"),
        ({"sizes": [0, 40]}, r"sizes\[0\] = 0; needed: 1 to 2\^32"),
        ({"sizes": [128, 2**32 + 1]}, r"sizes\[1\] = 4294967297; needed"),
        ({"strides": [136]}, r"strides\[1\] = 136 bytes; needed: a multiple of 16"),
        ({"strides": [0]}, r"strides\[1\] = 0 bytes; needed"),
        ({"strides": [2**40]}, r"strides\[1\] = 1099511627776 bytes; needed.*under 2\^40"),
        ({"box": [64, 257]}, r"box\[1\] = 257; needed: 1 to 256"),
        ({"box": [64, 0]}, r"box\[1\] = 0; needed: 1 to 256"),
        ({"box": [32, 16]}, r"box\[0\] = 32; needed: 64, the span of the swizzle"),
        ({"sizes": [64] * 3, "strides": [64] * 2, "box": [64] * 3}, "rank = 3; .* 2 or 4"),
    ],
)
def test_impossible_tensor_maps_are_refused(
    instructions_sm90: ModuleType, changes: dict[str, object], reason: str
) -> None:
    assert instructions_sm90.refuse_tensor_map(*GOOD.values()) == ""
    refused = instructions_sm90.refuse_tensor_map(*(GOOD | changes).values())
    assert re.match(f"tensor map: {reason}", refused), refused


def test_the_largest_tensor_map(instructions_sm90: ModuleType) -> None:
    sizes = [2**32, 2**32, 2**32, 2**32]
    strides = [2**40 - 16] * 3
    assert (
        instructions_sm90.refuse_tensor_map(2**47 - 16, sizes, strides, [64, 256, 256, 256]) == ""
    )
