"""What a compiled kernel costs and which instructions it runs: read from its machine code.

Owns reading a cubin with the tools of Triton's own wheel; it compiles nothing (``launch.py`` does)
and judges nothing (``tests/kernels/test_compile.py`` does). Machine code is counted for the whole
kernel and, apart, for each innermost loop that holds a tensor-core instruction: one iteration of
it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import triton

from ptq4adm.errors import BackendUnavailableError
from ptq4adm.kernels.launch import LANES, CompiledKernel

TENSOR_CORE = frozenset({"IMMA", "IGMMA", "HMMA", "HGMMA", "QGMMA"})
FROM_REGISTERS, FROM_SHARED = "RS", "SS"

# of a multiprocessor, by compute capability: bytes of shared memory, threads, programs
# (CUDA programming guide, table of compute capabilities)
_CAPACITY = {
    80: (167_936, 2048, 32),
    86: (102_400, 1536, 16),
    89: (102_400, 1536, 24),
    90: (233_472, 2048, 32),
}
_REGISTERS = 65_536  # of a multiprocessor
_REGISTER_UNIT = 8  # registers of a thread are handed out in these
_SYSTEM_SHARED_BYTES = 1024  # that every program has besides its own

_LABEL = re.compile(r"^\s*(\.?[\w$.]+):\s*$")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_TARGET = re.compile(r"`\((\.?[\w$.]+)\)")
_PTX_INSTRUCTION = re.compile(r"^\s*(?:@!?%p\d+\s+)?([a-z]\w*(?:[.:]+\w+)*)\s[^;]*;")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


@dataclass(frozen=True)
class Counts:
    """How often each instruction stands in a stretch of code.

    Attributes:
        of_mnemonic: by whole mnemonic, such as ``LDGSTS.E.BYPASS.128``. A wgmma has one modifier
            more than the disassembler writes: ``RS`` if its first operand comes from registers,
            ``SS`` if it comes from shared memory. What can never execute (``@!PT``) is left out.
    """

    of_mnemonic: dict[str, int]

    @property
    def total(self) -> int:
        """All instructions."""
        return sum(self.of_mnemonic.values())

    def count(self, *parts: str) -> int:
        """Instructions whose mnemonic begins with the first part and has all the others."""
        return sum(
            count
            for mnemonic, count in self.of_mnemonic.items()
            if mnemonic.split(".")[0] == parts[0] and set(parts[1:]) <= set(mnemonic.split("."))
        )


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses, and its instructions.

    Attributes:
        registers: of a thread.
        stack_bytes: of a thread.
        local_bytes: of a thread; spilled registers lie there.
        shared_bytes: of a program.
        threads: of a program.
        kernel: machine instructions of the whole kernel.
        loops: of one iteration of each innermost loop with a tensor-core instruction, in order.
        ptx: instructions of the PTX, before registers were assigned.
    """

    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    threads: int
    kernel: Counts
    loops: tuple[Counts, ...]
    ptx: Counts

    @property
    def spills(self) -> int:
        """Loads from and stores to local memory."""
        return self.kernel.count("LDL") + self.kernel.count("STL")


def resources(compiled: CompiledKernel) -> Resources:
    """Read what a kernel uses out of its cubin.

    Raises:
        BackendUnavailableError: if Triton's wheel lacks the tools, or they fail.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.kernel.asm["cubin"])
        usage = _USAGE.search(_run("cuobjdump", "-res-usage", str(cubin)))
        code = parse_sass(_run("nvdisasm", "--no-dataflow", "-c", str(cubin)))
    assert usage is not None, "cuobjdump -res-usage printed no usage"
    registers, stack_bytes, local_bytes = map(int, usage.groups())
    return Resources(
        registers,
        stack_bytes,
        local_bytes,
        compiled.kernel.metadata.shared,
        compiled.kernel.metadata.num_warps * LANES,
        count_instructions(i for block in code for i in block.instructions),
        tuple(count_instructions(loop) for loop in hot_loops(code)),
        count_ptx(compiled.kernel.asm["ptx"]),
    )


def programs_at_once(used: Resources, capability: int) -> int:
    """Return how many programs of a kernel one multiprocessor holds: the occupancy.

    Args:
        used: of the kernel.
        capability: 80, 86, 89 or 90.
    """
    shared_bytes, threads, programs = _CAPACITY[capability]
    registers = -(-used.registers // _REGISTER_UNIT) * _REGISTER_UNIT * used.threads
    return min(
        _REGISTERS // registers,
        shared_bytes // (used.shared_bytes + _SYSTEM_SHARED_BYTES),
        threads // used.threads,
        programs,
    )


def _run(tool: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    if not path.is_file():
        raise BackendUnavailableError(
            f"{path.name} is not in Triton {triton.__version__} ({path.parent}): machine code "
            "cannot be read; install the wheel of triton from PyPI"
        )
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BackendUnavailableError(
            f"{tool} {' '.join(arguments[:-1])} failed ({done.returncode}): {done.stderr.strip()}"
        )
    return done.stdout


# --- machine code -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instruction:
    """One machine instruction.

    Attributes:
        mnemonic: with its modifiers, see ``Counts``.
        predicate: such as ``P0`` or ``!P0``; None if it always executes.
        operands: as the disassembler writes them.
    """

    mnemonic: str
    predicate: str | None
    operands: str

    @property
    def opcode(self) -> str:
        """The mnemonic without modifiers."""
        return self.mnemonic.split(".")[0]

    @property
    def target(self) -> str | None:
        """Label that a branch goes to."""
        found = _TARGET.search(self.operands) if self.opcode == "BRA" else None
        return found.group(1) if found else None

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may follow."""
        if self.predicate is not None:
            return True
        # `BRA.U UP0, target` and `BRA.DIV UR4, target` carry their condition as an operand
        is_jump = self.opcode == "BRA" and self.operands.startswith("`")
        return not is_jump and self.opcode not in {"EXIT", "RET", "BRX", "JMP"}


@dataclass
class Block:
    """Instructions that only the first of can be jumped to, and the blocks that may follow."""

    instructions: list[Instruction]
    successors: list[int]


def parse_sass(text: str) -> list[Block]:
    """Split the output of ``nvdisasm -c`` into basic blocks; the first is the kernel's entry."""
    blocks = [Block([], [])]
    first_of_label: dict[str, int] = {}
    for line in text.splitlines():
        label, instruction = _LABEL.match(line), _INSTRUCTION.match(line)
        if label:
            if blocks[-1].instructions:
                blocks.append(Block([], []))
            first_of_label[label.group(1)] = len(blocks) - 1
        elif instruction:
            parsed = _instruction(*instruction.groups())
            blocks[-1].instructions.append(parsed)
            if parsed.target or not parsed.falls_through:
                blocks.append(Block([], []))
    for index, block in enumerate(blocks[:-1]):
        last = block.instructions[-1]
        if last.falls_through:
            block.successors.append(index + 1)
        if last.target:
            block.successors.append(first_of_label[last.target])
    return blocks


def _instruction(predicate: str | None, mnemonic: str, operands: str) -> Instruction:
    if mnemonic.split(".")[0].endswith("GMMA"):
        first_operand = operands.split(",")[1].strip()
        mnemonic += f".{FROM_REGISTERS if first_operand.startswith('R') else FROM_SHARED}"
    return Instruction(mnemonic, predicate, operands)


def hot_loops(blocks: list[Block]) -> list[list[Instruction]]:
    """Return the instructions of each innermost loop that has a tensor-core instruction."""
    loops = [
        loop
        for loop in natural_loops(blocks)
        if any(i.opcode in TENSOR_CORE for block in loop for i in blocks[block].instructions)
    ]
    innermost = [loop for loop in loops if not any(other < loop for other in loops)]
    return [
        [i for block in sorted(loop) for i in blocks[block].instructions]
        for loop in sorted(innermost, key=min)
    ]


def natural_loops(blocks: list[Block]) -> list[frozenset[int]]:
    """Return the blocks of each loop: those that reach a jump back without passing its target."""
    predecessors: list[list[int]] = [[] for _ in blocks]
    for index, block in enumerate(blocks):
        for successor in block.successors:
            predecessors[successor].append(index)
    members: dict[int, set[int]] = {}
    for tail, header in _back_edges(blocks):
        loop = members.setdefault(header, {header})
        open_blocks = [tail]
        while open_blocks:
            block_index = open_blocks.pop()
            if block_index not in loop:
                loop.add(block_index)
                open_blocks.extend(predecessors[block_index])
    return [frozenset(loop) for loop in members.values()]


def _back_edges(blocks: list[Block]) -> list[tuple[int, int]]:
    """Edges to a block on the path from the entry, by a depth-first walk."""
    found: list[tuple[int, int]] = []
    on_path, seen = {0}, {0}
    path = [(0, iter(blocks[0].successors))]
    while path:
        index, successors = path[-1]
        successor = next(successors, None)
        if successor is None:
            on_path.discard(index)
            path.pop()
        elif successor in on_path:
            found.append((index, successor))
        elif successor not in seen:
            seen.add(successor)
            on_path.add(successor)
            path.append((successor, iter(blocks[successor].successors)))
    return found


def count_instructions(instructions: Iterable[Instruction]) -> Counts:
    """Count instructions by mnemonic."""
    return Counts(dict(Counter(i.mnemonic for i in instructions if i.predicate != "!PT")))


def count_ptx(text: str) -> Counts:
    """Count the instructions of a PTX text by mnemonic."""
    found = (_PTX_INSTRUCTION.match(line) for line in text.splitlines())
    return Counts(dict(Counter(match.group(1) for match in found if match)))
