"""The ``cuda`` backend without a GPU, for rehearsals: its kernels on the emulator, on CPU tensors.

``csrc/cuda/matmul_emulated.cpp`` is compiled once for each state of the sources, into
``build/emulated``; that needs a checkout, g++ and pybind11. The emulator computes what the GPU
does, checks every access, and takes milliseconds a block (docs/emulation.md).

    python -m ptq4adm.bench.gpu_emulation        # compiles it, and prints where the module is
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

from ptq4adm.errors import BackendUnavailableError
from ptq4adm.ops import backends, cuda_backend, cuda_matmul, lazy

_ROOT = Path(__file__).resolve().parents[2]
_NAME = "matmul_emulated"
_SOURCE = f"{_NAME}.cpp"
_EMULATOR = "emulator*.cpp"
_FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-fvisibility=hidden"]
# types of their own: pybind11 refuses those of another build of the same classes in the process
_FLAGS += ["-Dptq4adm=ptq4adm_rehearsal"]
_WRITTEN = ("out0", "out1", "slabs")
_SHOWN = 300  # characters of the compiler's text


@contextmanager
def emulated() -> Iterator[None]:
    """Let the backend ``cuda`` run on CPU tensors, on the emulator, inside the block.

    Raises:
        BackendUnavailableError: if the emulator cannot be compiled, with the reason.
    """
    module = load()
    launch = cuda_matmul._launch

    def launch_emulated(compiled: Any, arguments: Any, *rest: Any) -> None:
        _register(module, arguments.tensors)
        nowhere = SimpleNamespace(cuda_stream=0)
        with (
            mock.patch.object(torch.cuda, "current_device", return_value=0),
            mock.patch.object(torch.cuda, "current_stream", return_value=nowhere),
        ):
            launch(compiled, arguments, *rest)

    with (
        mock.patch.object(cuda_backend, "_import", return_value=module),
        mock.patch.object(cuda_backend, "unavailable_reason", return_value=None),
        mock.patch.object(cuda_backend, "describe", return_value="emulated on the CPU: for tests"),
        mock.patch.object(cuda_matmul, "_launch", launch_emulated),
    ):
        try:
            yield
        finally:  # what was found out inside does not hold outside
            backends._resolve.cache_clear()
            lazy.load.cache_clear()


def _register(module: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Tell the emulator what memory a kernel may use, and how."""
    kinds = dict.fromkeys(_WRITTEN, module.Access.uninitialized)
    kinds["counters"] = module.Access.read_write
    module.forget_memory()
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * tensor.element_size()
        kind = kinds.get(name, module.Access.read)
        module.register_memory(tensor.data_ptr(), nbytes, kind, name)


@cache
def load() -> ModuleType:
    """Return the emulator's module, compiled if it has to be.

    Raises:
        BackendUnavailableError: if it cannot be compiled, with the reason.
    """
    path = build()
    spec = importlib.util.spec_from_file_location(_NAME, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build() -> Path:
    """Compile the emulator, unless it is there for these sources; returns the module's file.

    Raises:
        BackendUnavailableError: if it cannot be compiled, with the reason.
    """
    folder = _ROOT / "csrc" / "cuda"
    if not folder.is_dir():
        raise _unavailable("it is compiled from a checkout of ptq4adm, and this is none")
    if importlib.util.find_spec("pybind11") is None:
        raise _unavailable("pybind11 is not installed: pip install pybind11")
    import pybind11

    compiler = [*shlex.split(os.environ.get("CXX", "g++")), *_FLAGS]
    includes = [f"-I{path}" for path in (sysconfig.get_path("include"), pybind11.get_include())]
    command = [*compiler, *includes, *_source_files(folder)]
    target = _ROOT / "build" / "emulated" / _key(command) / f"{_NAME}.so"
    if target.exists():
        return target
    temporary = target.with_suffix(f".{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            [*command, "-o", str(temporary)], capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise _unavailable(
            f"{compiler[0]} cannot be run, or {target.parent} written: {error}"
        ) from error
    if done.returncode:
        raise _unavailable(f"it does not compile: {' '.join(done.stderr.split())[:_SHOWN]}")
    temporary.replace(target)
    return target


def _source_files(folder: Path) -> list[str]:
    return [str(folder / _SOURCE), *(str(path) for path in sorted(folder.glob(_EMULATOR)))]


def _key(command: list[str]) -> str:
    """A name for the module that this command makes of the sources as they are."""
    digest = hashlib.sha256("\0".join([sys.version, *command]).encode())
    for path in sorted(_ROOT.glob("csrc/*/*")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _unavailable(reason: str) -> BackendUnavailableError:
    return BackendUnavailableError(f"the emulator of backend 'cuda' is not available: {reason}")


if __name__ == "__main__":
    sys.stdout.write(f"{build().relative_to(_ROOT)}\n")
