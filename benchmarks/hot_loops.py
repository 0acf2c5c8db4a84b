"""The innermost loop of each matrix-product tile as machine code, out of the compiled module.

    python benchmarks/hot_loops.py                # a line a loop: instructions, products, spills
    python benchmarks/hot_loops.py avx512_vnni    # the loop itself

`docs/kernels.md` quotes them. Needs objdump (binutils). A stack reference inside a loop is a spill.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ptq4adm.ops import cpu

# isa -> (part of the tile function's name, instruction that multiplies, how often a step has it)
TILES = {
    "avx512_vnni": ("VnniTile<ptq4adm::(anonymous namespace)::Avx512Vnni, 4", "vpdpbusd", 24),
    "avx_vnni": ("VnniTile<ptq4adm::(anonymous namespace)::AvxVnni, 1", "vpdpbusd", 12),
    "avx2": ("::tile_w4(", "vpmaddubsw", 64),
}
_FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")
_INSTRUCTION = re.compile(r"^\s*([0-9a-f]+):\s+(?:\{vex\}\s+)?(\S+)\s*(.*)$")


@dataclass(frozen=True)
class Loop:
    """One loop.

    Attributes:
        function: the function it is in, demangled.
        body: its instructions, addresses removed, the backward jump last.
    """

    function: str
    body: tuple[str, ...]

    def count(self, instruction: str) -> int:
        """How often an instruction stands in the loop."""
        return sum(line.split()[0] == instruction for line in self.body)

    @property
    def spills(self) -> int:
        """Instructions that touch the stack; rbp is a register like any other here."""
        return sum("(%rsp" in line for line in self.body)


def hot_loop(isa: str, module: Path) -> Loop:
    """The shortest loop of an instruction set's W4A8 tile that holds a whole step.

    Args:
        isa: a key of `TILES`.
        module: the compiled module.

    Raises:
        LookupError: if the module has no such loop.
    """
    function, instruction, products = TILES[isa]
    found = [
        loop
        for loop in loops(module)
        if function in loop.function and loop.count(instruction) == products
    ]
    if not found:
        raise LookupError(f"{module}: no loop with {products} {instruction} in {function}")
    return min(found, key=lambda loop: len(loop.body))


def loops(module: Path) -> Iterator[Loop]:
    """Every stretch of code that ends in a jump back to its beginning."""
    done = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", module],
        capture_output=True,
        text=True,
        check=True,
    )
    function, lines, position = "", [], {}
    for line in done.stdout.splitlines():
        header = _FUNCTION.match(line)
        if header is not None:
            function, lines, position = header.group(1), [], {}
            continue
        code = _INSTRUCTION.match(line)
        if code is None:
            continue
        address, name, operands = code.groups()
        position[address] = len(lines)
        operands = operands.split("#")[0].rstrip()
        lines.append(f"{name:<14}{operands.split('<')[0].rstrip() if name[0] != 'j' else ''}")
        target = operands.split(" ")[0]
        if name.startswith("j") and target in position:
            yield Loop(function, tuple(lines[position[target] :]))


def main() -> int:
    """Print what was asked for."""
    module = Path(cpu.module_file())
    if shutil.which("objdump") is None:
        raise SystemExit("objdump is missing: install binutils")
    if len(sys.argv) > 1:
        print("\n".join(hot_loop(sys.argv[1], module).body))
        return 0
    for isa, (_, instruction, _) in TILES.items():
        if not cpu.is_compiled(isa):
            print(f"{isa:<12} not compiled in: the compiler does not know it")
            continue
        loop = hot_loop(isa, module)
        print(
            f"{isa:<12} {len(loop.body):3} instructions, {loop.count(instruction):2} "
            f"{instruction}, {loop.spills} stack references"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
