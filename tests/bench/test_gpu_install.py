"""What a bare GPU machine lacks is said, installed from carried wheels, and never downloaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scripts import ROOT, load_script

from ptq4adm.kernels import launch

gpu_install = load_script("gpu_install")


def test_this_checkout_is_found_installed() -> None:
    assert gpu_install.is_installed(sys.executable)
    assert not gpu_install.is_installed(str(ROOT / "no" / "python"))


def test_a_place_that_takes_it_makes_no_virtual_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def pip(arguments: list[str], log: Path, python: str = sys.executable) -> bool:
        assert log.parent == tmp_path
        commands.append([python, *arguments])
        return True

    monkeypatch.setattr(gpu_install, "_pip", pip)
    monkeypatch.setattr(gpu_install, "is_installed", lambda _: len(commands) == 2)
    monkeypatch.setattr(gpu_install, "make_environment", lambda _: pytest.fail("made"))
    python, how = gpu_install.install(tmp_path / "install.log")
    assert (python, how) == (sys.executable, "installed into the user's packages")
    assert "--user" in commands[1]
    assert all("--no-deps" in command for command in commands)


def test_where_nothing_takes_it_the_reason_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pip(_: list[str], log: Path, python: str = "") -> bool:
        with log.open("a") as file:
            file.write(f"error: no compiler for {python}\n")
        return False

    monkeypatch.setattr(gpu_install, "_pip", pip)
    monkeypatch.setattr(gpu_install, "is_installed", lambda _: False)
    monkeypatch.setattr(gpu_install, "make_environment", lambda _: tmp_path / "python")
    monkeypatch.setattr(gpu_install, "has", lambda name: name != "pybind11")
    python, why = gpu_install.install(tmp_path / "install.log")
    assert python == ""
    assert "pybind11 not installed: carry wheels" in why
    assert "no compiler" in why


def test_wheels_are_taken_from_the_folder_and_no_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def pip(arguments: list[str], _: Path) -> bool:
        commands.append(arguments)
        return "--user" in arguments

    monkeypatch.setattr(gpu_install, "_pip", pip)
    monkeypatch.setattr(gpu_install, "has", lambda name: name not in ("tqdm", "diffusers"))
    monkeypatch.setattr(gpu_install, "_is_old", lambda: False)
    done = gpu_install.install_wheels(tmp_path, tmp_path / "install.log")
    assert done == "installed tqdm, diffusers"
    assert len(commands) == 2  # the environment of this Python refused
    for command in commands:
        assert "--no-index" in command
        assert command[command.index("--find-links") + 1] == str(tmp_path)
    monkeypatch.setattr(gpu_install, "has", lambda _: True)
    assert gpu_install.install_wheels(tmp_path, tmp_path / "log") == "nothing of it is missing"


def test_what_is_carried_is_what_is_needed_and_pinned() -> None:
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert set(gpu_install.WHEELS) <= pinned
    carried = set(gpu_install.WHEELS) | {"torch", "triton", "typing_extensions"}
    assert set(gpu_install.REQUIRED) <= carried
    command = next(
        line
        for line in (ROOT / "docs" / "benchmarks-gpu.md").read_text().splitlines()
        if line.startswith("pip download")
    )
    for name in gpu_install.WHEELS:
        assert name in command.split()


BLOCKED = """
import sys
BLOCKED = set(sys.argv.pop(1).split(","))
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None
sys.meta_path.insert(0, Block())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda n, p=None: None if n.split(".")[0] in BLOCKED else find(n, p)
from ptq4adm.cli import main
sys.exit(main(sys.argv[1:]))
"""


OPTIONAL = "tqdm,diffusers,transformers,safetensors,soundfile,matplotlib"


def run_without(packages: str, arguments: list[str], **environment: str) -> tuple[int, str]:
    base = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-P", "-c", BLOCKED, packages, *arguments],
        env={**base, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return done.returncode, done.stderr


@pytest.mark.skipif(not launch.IS_INTERPRETED, reason="rehearsals run in Triton's interpreter")
@pytest.mark.parametrize("command", ["bench --device cuda --seconds 0.001", "tune --output"])
def test_kernels_are_measured_without_optional_packages(command: str, tmp_path: Path) -> None:
    arguments = [*command.split(), *([str(tmp_path)] if command.endswith("output") else [])]
    arguments += ["--rehearse", "--kind", "conv1x1", "--results", str(tmp_path)]
    code, errors = run_without(OPTIONAL, arguments, TRITON_INTERPRET="1")
    assert code == 0, errors
    assert list(tmp_path.glob("gpu-*.csv"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: it would be measured")
@pytest.mark.parametrize("command", ["bench --device cuda", "tune"])
def test_nor_numpy_is_imported_where_kernels_are_not_interpreted(command: str) -> None:
    # Triton's interpreter alone needs numpy; the one thing that is missing here is the GPU
    code, errors = run_without(f"{OPTIONAL},numpy", [*command.split(), "--quiet"])
    assert code == 1
    assert "--rehearse needs no GPU" in errors
    assert len(errors.splitlines()) == 1
