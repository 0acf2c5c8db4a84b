"""The build's wishes: what PTQ4ADM_BUILD accepts, and that an impossible wish is an error."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytest.importorskip("setuptools", minversion="77")


def _setup(wish: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "PTQ4ADM_BUILD": wish},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ("cuda", "PTQ4ADM_BUILD=cuda: this version has no CUDA sources yet; use cpu or auto"),
        ("fast", "PTQ4ADM_BUILD=fast: expected one of auto, python, cpu, cuda"),
    ],
)
def test_wish_that_cannot_be_met_is_an_error(wish: str, message: str) -> None:
    result = _setup(wish, "--version")
    assert result.returncode != 0
    assert message in result.stderr


def test_python_build_says_what_it_leaves_out() -> None:
    result = _setup("python", "--version")
    assert result.returncode == 0, result.stderr
    assert "no compiled kernels" in result.stderr


@pytest.mark.parametrize(("wish", "is_error"), [("cpu", True), ("auto", False)])
def test_missing_compiler(wish: str, is_error: bool, tmp_path: Path) -> None:
    """Named, it is an error; ``auto`` goes on without and says so."""
    compiler = str(tmp_path / "no-such-compiler")
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "-t", tmp_path / "temp", "-b", tmp_path / "lib"],
        cwd=ROOT,
        env={**os.environ, "PTQ4ADM_BUILD": wish, "CC": compiler, "CXX": compiler},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode != 0) == is_error, result.stderr
    assert "the CPU kernels cannot be compiled" in result.stdout + result.stderr
    assert not list((tmp_path).rglob("_cpu*.so"))


def test_source_distribution_holds_every_file_of_csrc(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", f"--dist-dir={tmp_path}"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.*")}
    assert files
    assert files <= packed
