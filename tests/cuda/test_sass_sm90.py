"""Machine code of the family sm90a, where there is an nvcc: what its loop holds, in which order.

The order decides whether weights are decoded while products run. ptxas moves arithmetic and inserts
waits as it likes, so this is looked at rather than assumed.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from ptq4adm.kernels import inspection

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from build_support import cuda_resources, nvcc  # noqa: E402

# kernels/ lies there as well, under a name that transformers looks for
sys.path.remove(str(ROOT))

KERNEL = """\
#include "{root}/csrc/cuda/matmul_sm90_variants.h"
using namespace ptq4adm;
using Shape = Tile{tile}Sm90;
__global__ void __launch_bounds__(Shape::kBlockThreads, Shape::kBlocks)
    one(const __grid_constant__ ParamsSm90 all) {{
  matmul_warpgroup_tile<Shape, Weight::{weight}>(all);
}}
"""
# what decoding a register ends in: a mask, or an exclusive or with a constant or unknown_zero()
LAST_OF_DECODING = {
    "kInt4": r"0xf0f0f0f0, RZ, 0xc0",
    "kInt4Groups": r"0x80808080, RZ, 0x3c",
    "kInt8": r"R\d+, R\d+, UR\d+, RZ, 0x3c",
}


@pytest.fixture(scope="module")
def compiler() -> Path:
    try:
        found = nvcc.find_nvcc()
    except nvcc.BuildError as error:
        pytest.skip(str(error))
    if found is None:
        pytest.skip(nvcc.missing_nvcc())
    return found


def _events(loop: list[inspection.Instruction]) -> list[str]:
    """What the tensor core sees: arrive, IGMMA, and waits with how many groups they leave."""
    events = []
    for instruction in loop:
        if instruction.mnemonic.startswith("WARPGROUP.DEPBAR"):
            events.append("wait " + instruction.operands.split(",")[1].strip(" ;"))
        elif instruction.mnemonic.startswith("WARPGROUP.ARRIVE"):
            events.append("arrive")
        elif instruction.opcode == "IGMMA":
            events.append("IGMMA")
    return events


@pytest.mark.parametrize(
    ("tile", "weight", "fragments", "registers"),
    [
        ("128x256", "kInt4", 2, 168),
        ("128x128", "kInt8", 2, 128),
        ("128x64", "kInt4Groups", 1, 128),
    ],
)
def test_weights_are_decoded_under_running_products(
    compiler: Path, tmp_path: Path, tile: str, weight: str, fragments: int, registers: int
) -> None:
    """One turn of the loop is two steps of 64 k: two instructions for each 64 channels a step."""
    source = tmp_path / "one_sm90a.cu"
    source.write_text(KERNEL.format(root=ROOT, tile=tile, weight=weight))
    (kernel,), remarks = cuda_resources.compile_for(compiler, source, "90a", tmp_path)
    assert remarks == []
    assert not kernel.is_in_local_memory
    # As in docs/kernels-cuda.md. A block starts with these for every thread: where warpgroups leave
    # registers to each other, one that multiplies would wait forever for what fewer do not hold.
    assert kernel.registers == registers
    cubin = tmp_path / "one_sm90a.sm_90a.cubin"
    code = inspection._run("nvdisasm", "--no-dataflow", "-c", str(cubin))
    (loop,) = inspection.hot_loops(inspection.parse_sass(code))

    step = ["arrive", *["IGMMA"] * (2 * fragments), "wait 0x1"]
    assert _events(loop) == step * 2, "two steps, and a batch in flight after every wait"
    products = [i for i in loop if i.opcode == "IGMMA"]
    assert all(i.mnemonic.endswith(inspection.FROM_REGISTERS) for i in products)
    # only the last of a step closes the group
    assert ["gsb0" in i.operands for i in products] == ([False] * (2 * fragments - 1) + [True]) * 2

    opcodes = [i.opcode for i in loop]
    loads = [i for i in loop if i.mnemonic.startswith("LDG") and ".128" in i.mnemonic]
    assert len(loads) == 2 * fragments * (2 if weight == "kInt8" else 1)
    # descriptors and stages are of the warp; nothing is exchanged, and nothing goes through memory
    assert not {"R2UR", "SHFL", "BAR", "LDL", "STL", "LDS", "STS"} & set(opcodes)

    if weight != "kInt4Groups":  # a copy of a register would wait for its newest load
        assert not [i for i in loop if i.mnemonic.startswith(("MOV", "IMAD.MOV"))]

    waits = [i for i, at in enumerate(loop) if at.mnemonic.startswith("WARPGROUP.DEPBAR")]
    arrives = [i for i, at in enumerate(loop) if at.mnemonic.startswith("WARPGROUP.ARRIVE")]
    between = loop[waits[0] : arrives[1]]
    decoded = [i for i in between if re.search(LAST_OF_DECODING[weight], i.operands)]
    assert len(decoded) == 8 * fragments, "every register of the next step's fragments"
