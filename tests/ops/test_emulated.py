"""The VNNI templates on any processor: built with their instructions spelled out, then tested."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ptq4adm.ops import cpu

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def emulating_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a copy of the package whose compiled module emulates VNNI."""
    reason = cpu.unavailable_reason()
    if reason is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("emulated")
    define = "-DPTQ4ADM_EMULATE_VNNI"
    command = [sys.executable, "setup.py", "-q", "build", f"--build-base={folder}"]
    done = subprocess.run(
        [*command, f"--build-lib={folder / 'lib'}"],
        cwd=ROOT,
        env={**os.environ, "PTQ4ADM_BUILD": "cpu", "CFLAGS": define, "CXXFLAGS": define},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "lib"


def test_kernels_are_exact_without_the_instructions(emulating_build: Path) -> None:
    tests = [ROOT / "tests/ops" / name for name in ("test_accumulate.py", "test_epilogue.py")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "emulated", *tests],
        cwd=emulating_build,
        env={**os.environ, "PYTHONPATH": str(emulating_build)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed.group(1)) > 250
    assert "skipped" not in done.stdout


def test_shipped_module_holds_no_emulation() -> None:
    if cpu.unavailable_reason() is not None:
        pytest.skip("no compiled module")
    reason = cpu.isa_unavailable_reason("emulated_avx_vnni")
    if reason is None:
        pytest.skip("this is the emulating build")
    assert "unknown" in reason
