"""Builds host modules of the CUDA sources, which run on the emulator (docs/emulation.md)."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # modules that hold no tests

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
# ffp-contract: the emulated add_rn and multiply_rn must not fuse
FLAGS = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-fPIC"]


def _compiler() -> list[str]:
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no C++ compiler: {compiler[0]}")
    return compiler


def _compile(*arguments: str | Path) -> None:
    done = subprocess.run(
        [*_compiler(), *FLAGS, "-fvisibility=hidden", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="session")
def emulator_objects(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Path]]:
    """Function that compiles the emulator, once for every set of flags, and returns its objects."""
    built: dict[tuple[str, ...], list[Path]] = {}

    def build(flags: Sequence[str] = ()) -> list[Path]:
        key = tuple(flags)
        if key not in built:
            folder = tmp_path_factory.mktemp("emulator")
            built[key] = []
            for source in sorted(CUDA.glob("emulator*.cpp")):
                built[key].append(folder / f"{source.stem}.o")
                _compile(*flags, "-c", source, "-o", built[key][-1])
        return built[key]

    return build


@pytest.fixture(scope="session")
def build_emulated(
    tmp_path_factory: pytest.TempPathFactory, emulator_objects: Callable[..., list[Path]]
) -> Callable[..., ModuleType]:
    """Function that compiles a pybind11 module of files of csrc/cuda, the emulator linked in.

    ``build_emulated("matmul_emulated")`` compiles csrc/cuda/matmul_emulated.cpp and returns the
    module; further sources and flags follow the name.
    """
    pybind11 = pytest.importorskip("pybind11")

    def build(name: str, *sources: str, flags: Sequence[str] = ()) -> ModuleType:
        target = tmp_path_factory.mktemp("emulated") / f"{name}.so"
        includes = [sysconfig.get_paths()["include"], pybind11.get_include()]
        _compile(
            *flags,
            "-shared",
            *(f"-I{folder}" for folder in includes),
            *(CUDA / source for source in (f"{name}.cpp", *sources)),
            *emulator_objects(flags),
            *("-o", target),
        )
        spec = importlib.util.spec_from_file_location(name, target)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return build


@pytest.fixture(scope="session")
def instructions(build_emulated: Callable[..., ModuleType]) -> ModuleType:
    """The instructions one by one, and programs of them: csrc/cuda/instruction_tests.cpp."""
    return build_emulated("instruction_tests")


@pytest.fixture(scope="session")
def instructions_sm90(build_emulated: Callable[..., ModuleType]) -> ModuleType:
    """The same for sm_90a: csrc/cuda/instruction_tests_sm90.cpp."""
    return build_emulated("instruction_tests_sm90")


@pytest.fixture(scope="session")
def matmul_emulated(build_emulated: Callable[..., ModuleType]) -> ModuleType:
    """The matrix products: csrc/cuda/matmul_emulated.cpp."""
    return build_emulated("matmul_emulated")


@pytest.fixture(scope="session")
def matmul_sm90_emulated(build_emulated: Callable[..., ModuleType]) -> ModuleType:
    """The matrix products of the family sm90a: csrc/cuda/matmul_sm90_emulated.cpp."""
    return build_emulated("matmul_sm90_emulated")
