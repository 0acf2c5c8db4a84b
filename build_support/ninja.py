"""Compiles a list of files that changed, in parallel where ninja is installed."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """One file to compile.

    Attributes:
        command: compiler and flags, for g++, clang or nvcc.
        source: absolute path.
        output: absolute path of the object file.
    """

    command: Sequence[str]
    source: Path
    output: Path


def compile_objects(folder: Path, jobs: Sequence[Job]) -> None:
    """Compile what changed.

    Args:
        folder: holds build.ninja; made if it is not there.
        jobs: the files; without ninja they are compiled one by one, and always.

    Raises:
        CalledProcessError: if a compiler fails.
        OSError: if there is no such compiler.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.which("ninja") is None:
        for job in jobs:
            subprocess.run([*job.command, "-c", job.source, "-o", job.output], check=True)
        return
    lines = [
        "rule compile",
        "  command = $compiler -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    for job in jobs:
        output, source = (
            str(path).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")
            for path in (job.output, job.source)
        )
        command = shlex.join(job.command).replace("$", "$$")
        lines += [f"build {output}: compile {source}", f"  compiler = {command}"]
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    subprocess.run(["ninja", "-C", folder], check=True)
