"""CuTe's layouts, read as text from CUTLASS's headers: a second opinion on the PTX manual."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

CUTE = Path(sys.prefix) / "cutlass/cutlass_library/source/include/cute"

# shape and stride, flattened: the first index runs fastest
Layout = tuple[list[int], list[int]]


def cute_text(header: str, begin: str) -> str:
    """Text of a header from the first place that holds `begin`."""
    path = CUTE / header
    if not path.is_file():
        pytest.skip("no CuTe: `make setup` puts constraints-cutlass.txt into .venv/cutlass")
    text = path.read_text()
    return text[text.index(begin) :]


def layout_of(text: str, name: str, **sizes: int) -> Layout:
    """Shape and stride of ``using NAME = Layout<Shape<...>, Stride<...>>``.

    ``sizes``: values of the expressions that the template leaves open, as ``N`` for ``Int<N/8>``.
    """
    match = re.search(rf"using {name}\s*=\s*Layout<Shape(.*?)Stride(.*?);", text, re.S)
    assert match is not None, name
    parts = [re.sub(r"Int<N/8>", f"_{sizes.get('N', 0) // 8}", part) for part in match.groups()]
    shape, stride = ([int(n) for n in re.findall(r"_(\d+)", part)] for part in parts)
    assert len(shape) == len(stride)
    return shape, stride


def place_of(layout: Layout, lane: int, i: int, lanes: int = 32) -> int:
    """Where a (thread, value) layout puts value i of the lane."""
    place, index = 0, lane + lanes * i
    for extent, stride in zip(*layout, strict=True):
        place += index % extent * stride
        index //= extent
    assert index == 0
    return place
