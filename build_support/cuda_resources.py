"""`make cuda`: compile every .cu file for every architecture and list what each kernel needs.

A kernel that spills registers, or keeps an array in local memory, is an error: both go through
memory in the inner loop. So is a remark of ptxas with a number (C7510 and its neighbours): it has
put waits between asynchronous products, or ignored an exchange of registers, and such a kernel runs
at a fraction of its speed. Shared memory is the static part; what a launch adds is not the
compiler's to know.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from build_support import nvcc as toolkit
from build_support.nvcc import BuildError

FOLDER = toolkit.ROOT / "build" / "cuda"
_ENTRY = re.compile(r"Compiling entry function '(\S+)' for 'sm_(\w+)'")
_LOCAL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_REMARK = re.compile(r"^ptxas \w+ *: (\(C\d+\) .*)$", re.MULTILINE)


@dataclass(frozen=True)
class Resources:
    """What one kernel needs on one architecture.

    Attributes:
        kernel: the name, as the linker sees it until ``demangled`` turns it into C++.
        arch: such as ``80`` or ``90a``.
        registers: a thread.
        stack_bytes: local memory a thread: arrays that are indexed at run time.
        spill_bytes: registers stored to and loaded from local memory.
        shared_bytes: static shared memory a block.
    """

    kernel: str
    arch: str
    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int

    @property
    def is_in_local_memory(self) -> bool:
        """Whether anything that should be in registers is not."""
        return self.stack_bytes > 0 or self.spill_bytes > 0


def parse_resources(log: str) -> list[Resources]:
    """Return what ptxas reports with -v, kernel by kernel.

    Raises:
        BuildError: if a kernel was announced and its numbers did not follow, as when the form of
            the report has changed.
    """
    found = []
    parts = _ENTRY.split(log)
    for kernel, arch, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        # of the kernel, and of every function that was not inlined into it
        local = [tuple(map(int, sizes)) for sizes in _LOCAL.findall(text)]
        used, shared = _USED.search(text), _SHARED.search(text)
        if not local or used is None:
            raise BuildError(f"ptxas' report on {kernel} for sm_{arch} was not understood:\n{text}")
        stack = sum(size for size, _, _ in local)
        spilled = sum(stores + loads for _, stores, loads in local)
        shared_bytes = int(shared.group(1)) if shared else 0
        found.append(Resources(kernel, arch, int(used.group(1)), stack, spilled, shared_bytes))
    return found


def parse_remarks(log: str) -> list[str]:
    """Return what ptxas says beside its report, each line once: losses of speed, by number."""
    return list(dict.fromkeys(_REMARK.findall(log)))


def demangled(names: Sequence[str]) -> dict[str, str]:
    """Return the C++ names, short, without parameters; as they are where c++filt is missing."""
    if not names or shutil.which("c++filt") is None:
        return {name: name for name in names}
    done = subprocess.run(
        ["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    noise = re.compile(r"^void |\(anonymous namespace\)::|ptq4adm::")
    readable = (noise.sub("", line) for line in done.stdout.splitlines())
    return dict(zip(names, readable, strict=True))


def table(resources: Sequence[Resources]) -> str:
    """Return one line a kernel and architecture."""
    names = demangled(sorted({r.kernel for r in resources}))
    width = max([len("kernel"), *(len(name) for name in names.values())])
    lines = [f"{'kernel':<{width}}  arch  registers  stack B  spilled B  static shared B"]
    for r in sorted(resources, key=lambda r: (names[r.kernel], toolkit.number(r.arch))):
        lines.append(
            f"{names[r.kernel]:<{width}}  {r.arch:<4}  {r.registers:>9}  {r.stack_bytes:>7}  "
            f"{r.spill_bytes:>9}  {r.shared_bytes:>15}" + ("  <-" if r.is_in_local_memory else "")
        )
    return "\n".join(lines)


def compile_for(
    nvcc: Path, source: Path, arch: str, folder: Path
) -> tuple[list[Resources], list[str]]:
    """Compile one file for one architecture.

    Returns:
        What each kernel needs, and the remarks of ptxas with the file's name.

    Raises:
        BuildError: with the compiler's text if it fails.
    """
    output = folder / f"{source.stem}.sm_{arch}.cubin"
    command = [
        *toolkit.compile_command(nvcc, source),
        f"-gencode=arch=compute_{arch},code=sm_{arch}",
        "-Xptxas=-v",
        *("-cubin", str(source), "-o", str(output)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(
            f"{source.name} does not compile for sm_{arch}:\n{done.stdout}{done.stderr}"
        )
    log = done.stdout + done.stderr
    remarks = [f"{source.name}, sm_{arch}: {remark}" for remark in parse_remarks(log)]
    return parse_resources(log), remarks


def main() -> int:
    """Compile, print, and return 1 for local memory, a remark, or what does not compile."""
    start = time.monotonic()
    try:
        nvcc = toolkit.find_nvcc()
        if nvcc is None:
            raise BuildError(toolkit.missing_nvcc())
        release = toolkit.nvcc_release(nvcc)
        archs = toolkit.wanted_archs()
        FOLDER.mkdir(parents=True, exist_ok=True)
        work = [(s, a) for s in toolkit.cuda_sources() for a in toolkit.archs_of(s, archs)]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            jobs = [pool.submit(compile_for, nvcc, s, a, FOLDER) for s, a in work]
            results = [job.result() for job in jobs]
        resources = [kernel for kernels, _ in results for kernel in kernels]
        remarks = [remark for _, found in results for remark in found]
        if not resources:
            raise BuildError("no kernel was compiled; is csrc/cuda empty?")
    except BuildError as error:
        _print(str(error))
        return 1
    _print(table(resources))
    in_memory = [r for r in resources if r.is_in_local_memory]
    _print(
        f"{len(resources)} kernels from {len(work)} compilations for {', '.join(archs)} by CUDA "
        f"{release[0]}.{release[1]} in {time.monotonic() - start:.0f} s; {len(in_memory)} use "
        f"local memory{' (marked <-): that is an error' if in_memory else ''}"
    )
    for remark in remarks:
        _print(f"error: ptxas: {remark}")
    return 1 if in_memory or remarks else 0


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
