"""Bring this checkout, and packages it needs, onto a bare GPU machine; used by `run_gpu.py`.

Standard library only. Nothing is downloaded: what PyTorch's environment lacks is carried as wheels.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import site
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "build" / "gpu-work"  # ignored by git, kept from one call to the next
INSTALL_SECONDS = 150.0
OLDEST_SETUPTOOLS = 77  # knows pyproject.toml's form of the licence
# package -> stages that cannot do without it; torch comes with the machine
REQUIRED = {
    "torch": ("tests", "sanitize", "bench", "unet", "compiled", "tune"),
    "triton": ("tests", "sanitize", "bench", "unet", "compiled", "tune"),
    "typing_extensions": ("tests", "sanitize", "bench", "unet", "compiled", "tune"),
    "pytest": ("tests",),
    "diffusers": ("unet", "compiled"),
    "safetensors": ("unet", "compiled"),
    "tqdm": ("unet", "compiled"),
    "numpy": ("unet", "compiled"),
}
# to compile and install this checkout
BUILD = ("setuptools", "pybind11", "ninja")
# what `--wheels` installs, with all they need, from a folder that pip download filled
WHEELS = ("tqdm", "numpy", "safetensors", "diffusers", "pytest", *BUILD)


def has(package: str) -> bool:
    """Whether this Python finds a package."""
    return importlib.util.find_spec(package) is not None


def missing_for(stage: str) -> list[str]:
    """Packages that a stage cannot do without and that are not there."""
    return [name for name, stages in REQUIRED.items() if stage in stages and not has(name)]


def remedy(packages: list[str]) -> str:
    """What to do about missing packages."""
    names = ", ".join(packages)
    return f"{names} not installed: carry wheels (docs/benchmarks-gpu.md) and give --wheels DIR"


def install_wheels(wheels: Path, log: Path) -> str:
    """Install what is missing of `WHEELS` from a folder, without an index.

    Args:
        wheels: the folder.
        log: gets pip's output.

    Returns:
        What was done, in words.
    """
    wanted = [name for name in WHEELS if not has(name) or (name == "setuptools" and _is_old())]
    if not wanted:
        return "nothing of it is missing"
    common = ["install", "--quiet", "--disable-pip-version-check", "--no-index"]
    common += ["--find-links", str(wheels), *wanted]
    for options in ([], ["--user"], ["--break-system-packages"]):
        if _pip([*common, *options], log):
            importlib.invalidate_caches()
            if "--user" in options:  # its folder may be new
                site.addsitedir(site.getusersitepackages())
            return f"installed {', '.join(wanted)}"
    return f"could not install {', '.join(wanted)}; see install.log"


def is_installed(python: str) -> bool:
    """Whether a Python imports this very checkout, with its compiled module."""
    code = "import ptq4adm, ptq4adm._cpu, ptq4adm.kernels; print(ptq4adm.__file__)"
    try:
        done = subprocess.run(
            [python, "-P", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except OSError:
        return False
    found = done.stdout.strip()
    return done.returncode == 0 and Path(found).resolve().is_relative_to(ROOT)


def install(log: Path) -> tuple[str, str]:
    """Build and install this checkout, editable, into the first place that takes it.

    Args:
        log: gets the output of pip.

    Returns:
        The Python that has it, and how; an empty Python and the reason if none has.
    """
    if is_installed(sys.executable):
        return sys.executable, "was installed"
    for name, python, options in _ways():
        command = [*options, "--no-build-isolation", "--no-deps", "-e", str(ROOT)]
        _pip(["install", "--quiet", "--disable-pip-version-check", *command], log, python)
        if is_installed(python):
            return python, f"installed into the {name}"
    errors = [line for line in log.read_text().splitlines() if "rror" in line]
    return "", f"cannot be installed{_build_hint()}; see install.log: {errors[-1:]}"


def _ways() -> Iterator[tuple[str, str, list[str]]]:
    """Places to try, each made only when those before it were of no use."""
    yield "environment of this Python", sys.executable, []
    yield "user's packages", sys.executable, ["--user"]
    yield "virtual environment", str(make_environment(KEPT / "venv")), []


def _pip(arguments: list[str], log: Path, python: str = sys.executable) -> bool:
    """Run pip; returns whether it succeeded."""
    command = [python, "-m", "pip", *arguments]
    with log.open("a") as output:
        output.write(f"--- {' '.join(command)}\n")
        output.flush()
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                # the CUDA module is built beside the first stages (gpu_build.py)
                env={**os.environ, "PTQ4ADM_BUILD": "cpu"},
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
                timeout=INSTALL_SECONDS,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            output.write(f"{error}\n")
            return False
    return done.returncode == 0


def _build_hint() -> str:
    """What to do if the likely reason is a missing or old build tool."""
    missing = [name for name in BUILD if not has(name)]
    if missing:
        return f": {remedy(missing)}"
    if _is_old():
        return f": setuptools is too old, needs {OLDEST_SETUPTOOLS} or newer"
    return ""


def _is_old() -> bool:
    try:
        version = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        return True
    return int(version.split(".")[0]) < OLDEST_SETUPTOOLS


def make_environment(target: Path) -> Path:
    """Python of a virtual environment that sees the packages of this one.

    Args:
        target: its folder; made if it is not there.
    """
    python = target / "bin" / "python"
    if python.exists():
        return python
    command = [sys.executable, "-m", "venv", "--system-site-packages", str(target)]
    subprocess.run(command, check=False, capture_output=True)
    # the system's packages are not those of a virtual environment that this one was made from
    lines = [path for path in sys.path if path.endswith("-packages")]
    for packages in target.glob("lib/python*/site-packages"):
        (packages / "parent.pth").write_text("\n".join(lines) + "\n")
    return python
