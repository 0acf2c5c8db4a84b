"""Builds the compiled modules, ``ptq4adm._cpu`` and ``_cuda``; the rest is in pyproject.toml.

``PTQ4ADM_BUILD`` says what to build: ``python`` nothing, ``cpu`` the CPU kernels, ``cuda`` the CUDA
kernels as well, ``auto`` (the default) what this machine can build and use. An explicit wish that
cannot be met is an error; ``auto`` says plainly what it left out. No torch header is used, so torch
is not needed to build. ``docs/building.md`` has the variables.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))  # a build of pyproject.toml does not put it there

from build_support import nvcc as cuda_toolkit  # noqa: E402
from build_support.ninja import Job, compile_objects  # noqa: E402
from build_support.nvcc import BuildError  # noqa: E402

CHOICES = ("auto", "python", "cpu", "cuda")


def files(*patterns: str) -> list[str]:
    """Return the files of some patterns, relative to the root."""
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern))


CUDA_BINDINGS = files("csrc/bindings/cuda_*.cpp")
CPU_SOURCES = [f for f in files("csrc/cpu/*.cpp", "csrc/bindings/*.cpp") if f not in CUDA_BINDINGS]
# host files under csrc/cuda emulate the kernels: the tests compile them, no module holds them
CUDA_SOURCES = [*files("csrc/cuda/*.cu"), *CUDA_BINDINGS]
HEADERS = files("csrc/*/*.h")
# ffp-contract: a fused multiply-add would make the float epilogue differ between instruction sets
FLAGS = ["-std=c++17", "-O3", "-Wall", "-Wextra", "-ffp-contract=off", "-fvisibility=hidden"]
FLAGS += ["-g0"]  # Python's own flags may ask for debug symbols: 4 MB instead of 0.3
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX512_FLAGS = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
# a file whose flags the compiler does not know is compiled without them, and holds nothing then
FILE_FLAGS = {
    "activation_avx2.cpp": ["-mavx2", "-mfma"],
    "activation_avx512.cpp": AVX512_FLAGS,
    "attention_avx2.cpp": ["-mavx2", "-mfma"],
    "attention_avx512.cpp": AVX512_FLAGS,
    "kernels_avx2.cpp": ["-mavx2"],
    # gcc 12 warns about its own header's undefined registers
    "kernels_avx512_vnni.cpp": [
        *AVX512_FLAGS,
        "-mavx512vnni",
        "-Wno-uninitialized",
        "-Wno-maybe-uninitialized",
    ],
    "kernels_avx_vnni.cpp": ["-mavx2", "-mavxvnni"],
}


def say(message: str) -> None:
    """Print to the build's log."""
    print(f"ptq4adm build: {message}", file=sys.stderr, flush=True)  # noqa: T201


def wanted_build() -> str:
    """Return the checked value of PTQ4ADM_BUILD."""
    wanted = os.environ.get("PTQ4ADM_BUILD", "auto").lower()
    if wanted not in CHOICES:
        raise SystemExit(f"PTQ4ADM_BUILD={wanted}: expected one of {', '.join(CHOICES)}")
    return wanted


def plan_cuda(wanted: str) -> tuple[Path, list[str]] | None:
    """Return nvcc and the architectures to build for, or None for no CUDA kernels.

    ``auto`` builds them only where they can be used or were asked for: someone who has nvcc and no
    GPU should not wait minutes for them.
    """
    if wanted not in ("auto", "cuda"):
        return None
    try:
        archs = cuda_toolkit.wanted_archs()
    except BuildError as error:  # also under auto: the variable is an explicit wish
        raise SystemExit(str(error)) from error
    try:
        nvcc = cuda_toolkit.find_nvcc()
        if nvcc is None:
            raise BuildError(cuda_toolkit.missing_nvcc())
        if wanted == "auto" and not (
            os.environ.get("PTQ4ADM_CUDA_ARCHS") or cuda_toolkit.has_driver()
        ):
            raise BuildError(
                f"{nvcc} is here, but no NVIDIA driver (libcuda.so.1); to build them all the same, "
                "set PTQ4ADM_BUILD=cuda, or PTQ4ADM_CUDA_ARCHS"
            )
        cuda_toolkit.nvcc_release(nvcc)
    except BuildError as error:
        if wanted == "cuda":
            raise SystemExit(f"PTQ4ADM_BUILD=cuda: {error}") from error
        say(f"no CUDA kernels: {error}")
        return None
    return nvcc, archs


class BuildExtension(build_ext):
    """Compiles every file with its own flags, through ninja where it is installed."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link one extension.

        Raises:
            CompileError: if a compiler is missing or fails. Setuptools turns this into a warning
                for an optional extension, which is what ``auto`` builds.
        """
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        build = self._build_cuda if ext.name.endswith("._cuda") else self._build_cpu
        build(ext, output)

    def _build_cpu(self, ext: Extension, output: Path) -> None:
        compiler = self._compiler()
        try:
            threads = self._thread_flags(compiler)
            command = [*compiler, *FLAGS, *threads, *self._includes()]
            folder = Path(self.build_temp).resolve()
            jobs = [
                Job([*command, *self._known_flags(command, FILE_FLAGS.get(source.name, []))],
                    source.resolve(), _object(folder, source))
                for source in map(Path, ext.sources)
            ]  # fmt: skip
            compile_objects(folder, jobs)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(
                f"the CPU kernels cannot be compiled ({error}): install a C++17 compiler and "
                "reinstall; without them only the slow backend 'reference' runs"
            ) from error
        self.compiler.link_shared_object(
            [str(job.output) for job in jobs],
            str(output),
            extra_postargs=threads,
            target_lang="c++",
        )
        say(f"built {output.name}: CPU kernels, threads by {threads[0]}")

    def _build_cuda(self, ext: Extension, output: Path) -> None:
        assert cuda is not None
        nvcc, archs = cuda
        host = [*self._compiler(), *FLAGS, *cuda_toolkit.defines(archs), *self._includes()]
        folder = (Path(self.build_temp) / "cuda").resolve()
        jobs = []
        for source in map(Path, ext.sources):
            command = host
            if source.suffix == ".cu":
                chosen = cuda_toolkit.archs_of(source, archs)
                if not chosen:  # a family that was not asked for
                    continue
                command = [
                    *cuda_toolkit.compile_command(nvcc, source),
                    *cuda_toolkit.code_flags(chosen),
                ]
            jobs.append(Job(command, source.resolve(), _object(folder, source)))
        try:
            compile_objects(folder, jobs)
            self.compiler.link_shared_object(
                [str(job.output) for job in jobs],
                str(output),
                # the runtime inside, and hidden: another one in the process, such as torch's, may
                # be of another version
                libraries=["cudart_static", "rt", "pthread", "dl"],
                library_dirs=[str(path) for path in cuda_toolkit.library_folders(nvcc)],
                extra_postargs=["-Wl,--exclude-libs,ALL"],
                target_lang="c++",
            )
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(
                f"the CUDA kernels cannot be compiled ({error}): see the messages above; "
                "PTQ4ADM_BUILD=cpu leaves them out"
            ) from error
        say(f"built {output.name}: CUDA kernels for {', '.join(archs)} by {nvcc}")

    def _compiler(self) -> list[str]:
        return list(getattr(self.compiler, "compiler_so_cxx", self.compiler.compiler_so))

    def _includes(self) -> list[str]:
        import pybind11  # a build requirement: not there when only metadata is asked for

        return [f"-I{f}" for f in (sysconfig.get_paths()["include"], pybind11.get_include())]

    def _known_flags(self, compiler: list[str], flags: list[str]) -> list[str]:
        """Return the instruction set's flags if this compiler takes them all, else none."""
        if not flags or not IS_X86:
            return []
        probe = [*compiler, *flags, "-x", "c++", "-fsyntax-only", os.devnull]
        if subprocess.run(probe, capture_output=True, check=False).returncode == 0:
            return flags
        say(f"this compiler does not know {' '.join(flags)}: built without that instruction set")
        return []

    def _thread_flags(self, compiler: list[str]) -> list[str]:
        """Return -fopenmp if the compiler can link it, else -pthread."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "probe.cpp"
            source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }")
            probe = [*compiler, "-fopenmp", source, "-o", source.with_suffix("")]
            if subprocess.run(probe, capture_output=True, check=False).returncode == 0:
                return ["-fopenmp"]
        return ["-pthread"]


def _object(folder: Path, source: Path) -> Path:
    """The object file of a source: names repeat between folders."""
    return folder / f"{source.parent.name}-{source.stem}.o"


wanted = wanted_build()
cuda = plan_cuda(wanted)
extensions = []
if wanted == "python":
    say("PTQ4ADM_BUILD=python: no compiled kernels; only the slow backend 'reference' will run")
else:
    # depends puts the headers into the source distribution
    extensions.append(
        Extension("ptq4adm._cpu", CPU_SOURCES, depends=HEADERS, optional=wanted == "auto")
    )
if cuda is not None:
    extensions.append(
        Extension("ptq4adm._cuda", CUDA_SOURCES, depends=HEADERS, optional=wanted == "auto")
    )
setup(ext_modules=extensions, cmdclass={"build_ext": BuildExtension})
