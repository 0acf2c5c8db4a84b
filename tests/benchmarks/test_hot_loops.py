"""The compiled tiles keep their accumulators in registers."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ptq4adm.ops import cpu

ROOT = Path(__file__).resolve().parents[2]


def test_hot_loops_do_not_spill() -> None:
    if cpu.unavailable_reason() is not None or shutil.which("objdump") is None:
        pytest.skip("needs the compiled module and objdump")
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("these tiles are for x86")
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "hot_loops.py")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"^(\S+) .* (\d+) stack references$", done.stdout, re.MULTILINE)
    assert {"avx2"} <= dict(spills).keys() <= {"avx2", "avx_vnni", "avx512_vnni"}
    assert len(spills) + done.stdout.count("not compiled in") == 3
    assert [isa for isa, count in spills if count != "0"] == []
