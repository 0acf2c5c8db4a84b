"""Builds the compiled module ``ptq4adm._cpu``; everything else is in pyproject.toml.

``PTQ4ADM_BUILD`` says what to build: ``python`` nothing, ``cpu`` the CPU kernels, ``cuda`` the CUDA
kernels as well, ``auto`` (the default) what this machine can build. An explicit wish that cannot be
met is an error; ``auto`` says plainly what it left out. No torch header is used, so torch is not
needed to build.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CHOICES = ("auto", "python", "cpu", "cuda")
ROOT = Path(__file__).parent
SOURCES = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/*/*.cpp"))
HEADERS = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/*/*.h"))
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
    if wanted == "cuda":
        raise SystemExit(
            "PTQ4ADM_BUILD=cuda: this version has no CUDA sources yet; use cpu or auto"
        )
    return wanted


class BuildExtension(build_ext):
    """Compiles every file with its own flags, through ninja where it is installed."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link one extension.

        Raises:
            CompileError: if the compiler is missing or fails. Setuptools turns this into a warning
                for an optional extension, which is what ``auto`` builds.
        """
        compiler = getattr(self.compiler, "compiler_so_cxx", self.compiler.compiler_so)
        try:
            threads = self._thread_flags(compiler)
            objects = self._compile(ext, [*compiler, *FLAGS, *threads])
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(
                f"the CPU kernels cannot be compiled ({error}): install a C++17 compiler and "
                "reinstall; without them only the slow backend 'reference' runs"
            ) from error
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects, str(output), extra_postargs=threads, target_lang="c++"
        )
        say(
            f"built {output.name}, CPU kernels, threads by {threads[0]}; no CUDA kernels: this "
            "version has none"
        )

    def _compile(self, ext: Extension, command: list[str]) -> list[str]:
        """Compile the sources that changed and return the object files."""
        import pybind11  # a build requirement: not there when only metadata is asked for

        includes = [sysconfig.get_paths()["include"], pybind11.get_include()]
        command = [*command, *(f"-I{folder}" for folder in includes)]
        build_folder = Path(self.build_temp).resolve()
        build_folder.mkdir(parents=True, exist_ok=True)
        jobs = []
        for source in map(Path, ext.sources):
            target = build_folder / f"{source.parent.name}-{source.stem}.o"
            flags = self._known_flags(command, FILE_FLAGS.get(source.name, []))
            jobs.append(([*command, *flags], source.resolve(), target))
        if shutil.which("ninja"):
            self._run_ninja(build_folder, jobs)
        else:
            for compile_command, source, target in jobs:
                subprocess.run([*compile_command, "-c", source, "-o", target], check=True)
        return [str(target) for _, _, target in jobs]

    def _run_ninja(self, folder: Path, jobs: list[tuple[list[str], Path, Path]]) -> None:
        """Write build.ninja, with header dependencies, and run it."""
        lines = [
            "rule cxx",
            "  command = $cxx -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
        for compile_command, source, target in jobs:
            output, given = (
                str(path).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")
                for path in (target, source)
            )
            command = shlex.join(compile_command).replace("$", "$$")
            lines += [f"build {output}: cxx {given}", f"  cxx = {command}"]
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        subprocess.run(["ninja", "-C", folder], check=True)

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


wanted = wanted_build()
if wanted == "python":
    say("PTQ4ADM_BUILD=python: no compiled kernels; only the slow backend 'reference' will run")
extension = Extension(
    "ptq4adm._cpu",
    list(SOURCES),
    depends=list(HEADERS),  # puts them into the source distribution
    language="c++",
    optional=wanted == "auto",
)
setup(
    ext_modules=[] if wanted == "python" else [extension],
    cmdclass={"build_ext": BuildExtension},
)
