"""Where nvcc is, what it compiles for, and with which flags.

`python -m build_support.nvcc` prints the path of nvcc, or fails and says where it was looked for.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_ARCHS = "80;89;90a"
OLDEST_ARCH = 80  # cp.async, and mma.m16n8k32 on int8
OLDEST_NVCC = (12, 0)  # knows sm_90a, and C++17 without bugs that we know of
# in an environment's site-packages: the wheels of CUDA 13 and later, and of CUDA 12
WHEEL_FOLDERS = ("nvidia/cu13", "nvidia/cuda_nvcc")

HOST_FLAGS = ["-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-g0"]
# fmad: a fused multiply-add would make the float epilogue differ from the other backends
FLAGS = ["-std=c++17", "-O3", "-fmad=false", f"-Xcompiler={','.join(HOST_FLAGS)}"]
# flags of single files, by name
FILE_FLAGS: dict[str, list[str]] = {}


class BuildError(Exception):
    """A wish that cannot be met; the text says what to do."""


def cuda_sources() -> list[Path]:
    """Return every file for nvcc, absolute."""
    return sorted(ROOT.glob("csrc/cuda/*.cu"))


def site_folders() -> list[Path]:
    """Return the folders that pip installs into, also when a build is isolated from them."""
    named = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path]
    return list(dict.fromkeys(Path(name) for name in named if name))


def find_nvcc(
    environment: Mapping[str, str] = os.environ, sites: Sequence[Path] | None = None
) -> Path | None:
    """Return nvcc's path: of CUDA_HOME if it is set, else on PATH, else from its wheels.

    Args:
        environment: variables.
        sites: folders that may hold the wheels; None for those of this Python.

    Returns:
        The path, or None if there is no nvcc.

    Raises:
        BuildError: if CUDA_HOME is set and holds none.
    """
    home = environment.get("CUDA_HOME")
    if home:
        path = Path(home) / "bin" / "nvcc"
        if not os.access(path, os.X_OK):
            raise BuildError(f"CUDA_HOME={home}: there is no bin/nvcc in it; correct or unset it")
        return path
    found = shutil.which("nvcc", path=environment.get("PATH", os.defpath))
    if found:
        return Path(found)
    for site in site_folders() if sites is None else sites:
        for folder in WHEEL_FOLDERS:
            path = site / folder / "bin" / "nvcc"
            if os.access(path, os.X_OK):
                return path
    return None


def missing_nvcc() -> str:
    """Return what to say where no nvcc was found."""
    return (
        "nvcc was not found (CUDA_HOME, PATH, the wheels' folder nvidia/cu13 in site-packages); "
        "install the CUDA toolkit, or its wheels: pip install 'ptq4adm[cuda]'"
    )


def nvcc_release(nvcc: Path) -> tuple[int, int]:
    """Return nvcc's release, such as (13, 0).

    Raises:
        BuildError: if it cannot be run, or is too old.
    """
    try:
        done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{nvcc} cannot be run ({error}); reinstall the CUDA toolkit") from error
    match = re.search(r"release (\d+)\.(\d+)", done.stdout)
    if done.returncode or match is None:
        raise BuildError(f"{nvcc} --version failed: {(done.stdout + done.stderr).strip()[-300:]}")
    release = (int(match.group(1)), int(match.group(2)))
    if release < OLDEST_NVCC:
        raise BuildError(
            f"{nvcc} is CUDA {release[0]}.{release[1]}; the kernels need "
            f"{OLDEST_NVCC[0]}.{OLDEST_NVCC[1]} or newer"
        )
    return release


def has_driver() -> bool:
    """Return whether an NVIDIA driver is installed here."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def parse_archs(text: str) -> list[str]:
    """Return the architectures of a list such as ``80;89;90a``, each once, oldest first.

    Args:
        text: numbers of compute capabilities without the dot, with ``a`` for code of exactly that
            one, separated by semicolons, commas or blanks.

    Raises:
        BuildError: if an entry is none, or too old.
    """
    archs = [entry for entry in re.split(r"[;,\s]+", text) if entry]
    if not archs:
        raise BuildError(f"PTQ4ADM_CUDA_ARCHS={text!r}: empty; expected such as {DEFAULT_ARCHS}")
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}a?", arch):
            raise BuildError(
                f"PTQ4ADM_CUDA_ARCHS={text!r}: {arch!r} is no architecture; expected such as "
                f"{DEFAULT_ARCHS}"
            )
        if number(arch) < OLDEST_ARCH:
            raise BuildError(
                f"PTQ4ADM_CUDA_ARCHS={text!r}: the kernels need {OLDEST_ARCH} or newer, {arch} is "
                "older"
            )
    return sorted(set(archs), key=lambda arch: (number(arch), arch))


def wanted_archs(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return the architectures of PTQ4ADM_CUDA_ARCHS, or the default ones."""
    return parse_archs(environment.get("PTQ4ADM_CUDA_ARCHS") or DEFAULT_ARCHS)


def number(arch: str) -> int:
    """Return an architecture's number without the letter."""
    return int(arch.rstrip("a"))


def archs_of(source: Path, archs: Sequence[str]) -> list[str]:
    """Return the architectures that a file is compiled for.

    A name that ends in ``_sm90a`` is for that one alone, ``_sm80`` for 80 and everything newer;
    other names are for all.
    """
    match = re.search(r"_sm(\d+a?)$", source.stem)
    if match is None:
        return list(archs)
    family = match.group(1)
    if family.endswith("a"):
        return [arch for arch in archs if arch == family]
    return [arch for arch in archs if number(arch) >= number(family)]


def code_flags(archs: Sequence[str]) -> list[str]:
    """Return nvcc's flags for machine code of each architecture, and PTX of the newest.

    The PTX lets newer GPUs run the kernels: the driver compiles it. Code with an ``a`` runs on
    exactly that GPU, so its PTX would be of no use.
    """
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    portable = [arch for arch in archs if not arch.endswith("a")]
    if portable:
        newest = max(portable, key=number)
        flags.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    return flags


def defines(archs: Sequence[str]) -> list[str]:
    """Return the macros that tell the bindings what they are built with.

    ``PTQ4ADM_CUDA_ARCHS`` is the list; ``PTQ4ADM_HAS_SM90A`` says that the files of a family of
    their own are in this build.
    """
    families = [f"-DPTQ4ADM_HAS_SM{arch.upper()}=1" for arch in archs if arch.endswith("a")]
    return [f'-DPTQ4ADM_CUDA_ARCHS="{";".join(archs)}"', *families]


def compile_command(nvcc: Path, source: Path) -> list[str]:
    """Return the command for one file, but for the architectures and what is to be made of it."""
    return [str(nvcc), *FLAGS, *FILE_FLAGS.get(source.name, [])]


def library_folders(nvcc: Path) -> list[Path]:
    """Return where nvcc's runtime libraries may lie: the wheels have no lib64."""
    top = _toolkit(nvcc)
    folders = [top / "lib64", top / "lib", top / "targets" / "x86_64-linux" / "lib"]
    return [folder for folder in folders if (folder / "libcudart_static.a").is_file()]


def _toolkit(nvcc: Path) -> Path:
    """The folder above bin/; nvcc on PATH may be a link or a script, so it is asked."""
    done = subprocess.run(
        [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull],
        capture_output=True,
        text=True,
        check=False,
    )
    match = re.search(r"^#\$ _HERE_=(.+)$", done.stderr, re.MULTILINE)
    here = Path(match.group(1)) if match else nvcc.resolve().parent
    return here.resolve().parent


if __name__ == "__main__":
    try:
        found_nvcc = find_nvcc()
    except BuildError as error:
        sys.exit(str(error))
    if found_nvcc is None:
        sys.exit(missing_nvcc())
    sys.stdout.write(f"{found_nvcc}\n")
