"""Run tests in several processes that share one GPU and Triton's cache; nothing but pytest needed.

    python benchmarks/gpu_tests.py --results DIR --deadline 200 -- -m gpu tests/kernels tests/ops

Each process compiles its own kernels, which is most of what such a test takes. DIR/gpu-tests.csv
gets a line a test, also of those that ran before the deadline.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
TABLE = "gpu-tests.csv"
MOST_PROCESSES = 12  # each holds a context of the GPU, about half a gigabyte
_NO_TESTS = 5  # pytest's exit code: a share may be empty
_SHOWN_LINES = 40


@dataclass(frozen=True)
class Share:
    """One process.

    Attributes:
        process: pytest.
        output: what it prints.
        log: a line a test.
    """

    process: subprocess.Popen[bytes]
    output: Path
    log: Path


def start(arguments: Sequence[str], count: int, folder: Path) -> list[Share]:
    """Start pytest in several processes.

    Args:
        arguments: of pytest.
        count: processes.
        folder: for their output.
    """
    path = os.pathsep.join(filter(None, (str(FOLDER), os.environ.get("PYTHONPATH", ""))))
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "gpu_shard", *arguments]
    shares = []
    for i in range(count):
        output, log = folder / f"share{i}.out", folder / f"share{i}.log"
        log.touch()
        environment = {"PTQ4ADM_SHARD": f"{i}/{count}", "PTQ4ADM_SHARD_LOG": str(log)}
        with output.open("w") as file:
            process = subprocess.Popen(
                command,
                cwd=FOLDER.parent,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        shares.append(Share(process, output, log))
    return shares


def wait(shares: Sequence[Share], seconds: float | None) -> int:
    """Wait for the processes; returns how many had to be killed at the deadline."""
    ends = None if seconds is None else time.monotonic() + seconds
    killed = 0
    for share in shares:
        try:
            left = None if ends is None else max(0.0, ends - time.monotonic())
            share.process.wait(timeout=left)
        except subprocess.TimeoutExpired:
            share.process.kill()
            share.process.wait()
            killed += 1
    return killed


def read_results(shares: Sequence[Share]) -> list[dict[str, str]]:
    """One row a test: the worst of what was written down of it."""
    found: dict[str, dict[str, str]] = {}
    for share in shares:
        for line in share.log.read_text().splitlines():
            outcome, seconds, name = line.split(" ", 2)
            if name not in found or found[name]["outcome"] == "passed":
                found[name] = {"test": name, "outcome": outcome, "seconds": seconds}
    return list(found.values())


def save(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Add rows to a table."""
    is_new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, ["test", "outcome", "seconds"], lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def main() -> int:
    """Run the tests; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--results", type=Path, required=True, help="folder of the table")
    parser.add_argument("--deadline", type=float, default=None, help="seconds of all tests")
    parser.add_argument("--processes", type=int, default=max(1, min(MOST_PROCESSES, cores - 2)))
    parser.add_argument("pytest", nargs="+", help="after --: arguments of pytest")
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ptq4adm-tests-") as folder:
        shares = start(arguments.pytest, arguments.processes, Path(folder))
        try:
            killed = wait(shares, arguments.deadline)
        finally:
            for share in shares:
                share.process.kill()
        rows = read_results(shares)
        save(arguments.results / TABLE, rows)
        broken = [share for share in shares if share.process.returncode not in (0, _NO_TESTS)]
        for share in broken:
            lines = share.output.read_text(errors="replace").splitlines()
            print("\n".join([f"--- {share.output.stem}", *lines[-_SHOWN_LINES:]]))
    failed = [row["test"] for row in rows if row["outcome"] == "failed"]
    print("\n".join(f"FAILED {name}" for name in failed))
    counts = Counter(row["outcome"] for row in rows)
    told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
    late = f"; {killed} processes had not finished at the deadline" if killed else ""
    seconds = time.monotonic() - started
    print(f"{told or 'no tests'} in {seconds:.0f} s, {len(shares)} processes{late}")
    return int(bool(broken or not rows))


if __name__ == "__main__":
    sys.exit(main())
