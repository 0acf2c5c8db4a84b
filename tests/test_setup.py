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
sys.path.append(str(ROOT))

from build_support.nvcc import has_driver  # noqa: E402

# kernels/ lies there as well, under a name that transformers looks for
sys.path.remove(str(ROOT))


def _environment() -> dict[str, str]:
    """This process's variables, without those that choose what is compiled for GPUs."""
    chosen = ("CUDA_HOME", "PTQ4ADM_CUDA_ARCHS")
    return {name: value for name, value in os.environ.items() if name not in chosen}


def _setup(wish: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=ROOT,
        env={**_environment(), "PTQ4ADM_BUILD": wish, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("wish", "variables", "message"),
    [
        ("fast", {}, "PTQ4ADM_BUILD=fast: expected one of auto, python, cpu, cuda"),
        ("cuda", {"CUDA_HOME": "/none"}, "PTQ4ADM_BUILD=cuda: CUDA_HOME=/none: there is no bin/"),
        ("cuda", {"PTQ4ADM_CUDA_ARCHS": "8.0"}, "'8.0' is no architecture; expected such as 80;"),
        # a list of architectures is a wish, whatever is built
        ("auto", {"PTQ4ADM_CUDA_ARCHS": "75"}, "the kernels need 80 or newer, 75 is older"),
    ],
)
def test_wish_that_cannot_be_met_is_an_error(
    wish: str, variables: dict[str, str], message: str
) -> None:
    result = _setup(wish, "--version", **variables)
    assert result.returncode != 0
    assert message in result.stderr


def test_auto_says_why_there_are_no_cuda_kernels() -> None:
    result = _setup("auto", "--version", CUDA_HOME="/none")
    assert result.returncode == 0, result.stderr
    assert "no CUDA kernels: CUDA_HOME=/none" in result.stderr


def test_auto_does_not_compile_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    """Nor does it run nvcc, which here would fail."""
    if has_driver():
        pytest.skip("there is an NVIDIA driver here")
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    result = _setup("auto", "--version", CUDA_HOME=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert f"no CUDA kernels: {nvcc} is here, but no NVIDIA driver" in result.stderr
    asked = _setup("auto", "--version", CUDA_HOME=str(tmp_path), PTQ4ADM_CUDA_ARCHS="80")
    assert f"no CUDA kernels: {nvcc} --version failed" in asked.stderr
    named = _setup("cuda", "--version", CUDA_HOME=str(tmp_path))
    assert named.returncode != 0
    assert f"PTQ4ADM_BUILD=cuda: {nvcc} --version failed" in named.stderr


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
        env={**_environment(), "PTQ4ADM_BUILD": wish, "CC": compiler, "CXX": compiler},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode != 0) == is_error, result.stderr
    assert "the CPU kernels cannot be compiled" in result.stdout + result.stderr
    assert not list((tmp_path).rglob("_cpu*.so"))


def test_source_distribution_holds_every_file_of_the_build(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", f"--dist-dir={tmp_path}"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    files = {
        path.relative_to(ROOT).as_posix()
        for folder in ("csrc", "build_support")
        for path in (ROOT / folder).rglob("*.*")
        if path.suffix != ".pyc"
    }
    assert "csrc/cuda/device_info.cu" in files
    assert "build_support/nvcc.py" in files
    assert files <= packed
