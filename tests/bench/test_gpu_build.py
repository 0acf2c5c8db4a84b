"""The CUDA module is built beside other stages, once, and what became of it is said."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import pytest
from scripts import ROOT, load_script

MODULE = f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"


gpu_build = load_script("gpu_build")


def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> Any:
    """A build whose process runs some code."""
    popen = subprocess.Popen

    def run(_: object, **keywords: Any) -> subprocess.Popen[bytes]:
        return popen([sys.executable, "-c", code], **keywords)

    monkeypatch.setattr(gpu_build, "architecture", lambda _: "90a")
    monkeypatch.setattr(gpu_build.subprocess, "Popen", run)
    return gpu_build.start("python", tmp_path / "log")


def test_a_build_runs_beside_and_says_how_long_it_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = started(tmp_path, monkeypatch, "import time; time.sleep(1); print('for 90a in 1 s')")
    assert build.need(0.0).startswith("the module for 90a is not built after 0 s")
    assert (build.outcome().status, build.outcome().is_failure) == ("NOTED", False)
    assert build.need(60.0) == ""
    time.sleep(0.5)  # what passes before somebody asks is none of its time
    outcome = build.outcome()
    assert (outcome.status, outcome.note) == ("ok", "for 90a in 1 s")
    assert outcome.seconds == pytest.approx(build.seconds)
    assert build.seconds < 60


def test_a_failed_build_is_a_failure_and_its_stages_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "print('error: x'); print('setup.py failed'); raise SystemExit(1)"
    build = started(tmp_path, monkeypatch, code)
    assert build.need(60.0) == "the module for 90a: setup.py failed"
    assert build.expect(60.0) == ""
    outcome = build.outcome()
    assert (outcome.status, outcome.is_failure) == ("FAILED", True)
    assert outcome.lines == ("error: x", "setup.py failed")


def test_a_machine_without_nvcc_or_gpu_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = started(tmp_path, monkeypatch, "print('nvcc was not found'); raise SystemExit(3)")
    assert build.need(60.0) == "the module for 90a: nvcc was not found"
    assert (build.outcome().status, build.outcome().note) == ("skipped", "nvcc was not found")
    monkeypatch.setattr(gpu_build, "architecture", lambda _: "")
    none = gpu_build.start("python", tmp_path / "log")
    assert none.need(60.0) == "torch finds no GPU to build for"
    assert none.outcome().status == "skipped"
    none.stop()


def test_a_build_that_still_runs_at_the_end_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = started(tmp_path, monkeypatch, "import time; time.sleep(60)")
    began = time.monotonic()
    build.stop()
    assert time.monotonic() - began < 20
    assert build.process.returncode != 0


def test_a_rehearsal_builds_the_emulator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []
    popen = subprocess.Popen

    def run(command: list[str], **keywords: Any) -> subprocess.Popen[bytes]:
        commands.append(command)
        return popen([sys.executable, "-c", "print('x')"], **keywords)

    monkeypatch.setattr(gpu_build.subprocess, "Popen", run)
    gpu_build.start("python", tmp_path / "log", is_rehearsal=True).need(60.0)
    assert commands == [["python", "-P", "-m", "ptq4adm.bench.gpu_emulation"]]


@pytest.mark.parametrize(
    ("capability", "arch"),
    [("9 0", "90a"), ("8 0", "80"), ("8 9", "89"), ("12 0", "120"), ("", "")],
)
def test_the_architecture_is_that_of_the_gpu(
    capability: str, arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = subprocess.CompletedProcess([], 0 if capability else 1, capability + "\n", "")
    monkeypatch.setattr(gpu_build.subprocess, "run", lambda *_, **__: done)
    assert gpu_build.architecture("python") == arch


# --- the process in the background --------------------------------------------------------------


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """Stands for setup.py, and returns the environments that it ran in."""
    monkeypatch.syspath_prepend(ROOT)
    from build_support import nvcc

    ran: list[dict[str, str]] = []

    def run(command: list[str], *, env: dict[str, str], check: bool, cwd: Path) -> None:
        assert check
        assert cwd == ROOT
        ran.append(env)
        target = Path(command[command.index("--build-lib") + 1]) / "ptq4adm" / MODULE
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(f"module {len(ran)}")

    monkeypatch.setattr(nvcc, "find_nvcc", lambda: Path("/opt/nvcc"))
    monkeypatch.setattr(nvcc, "nvcc_release", lambda _: (13, 0))
    monkeypatch.setattr(gpu_build.subprocess, "run", run)
    return ran


def test_it_is_built_once_for_the_same_sources(
    tmp_path: Path, setup: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, package = tmp_path / "build", tmp_path / "package"
    folder.mkdir()
    package.mkdir()
    done = gpu_build.build("90a", folder, package)
    assert done.startswith("for 90a by CUDA 13.0 in ")
    assert (package / MODULE).read_text() == "module 1"
    assert (setup[0]["PTQ4ADM_BUILD"], setup[0]["PTQ4ADM_CUDA_ARCHS"]) == ("cuda", "90a")
    assert gpu_build.build("90a", folder, package).endswith("was built for these sources")
    assert len(setup) == 1
    gpu_build.build("80", folder, package)  # another GPU
    assert len(setup) == 2
    (package / MODULE).unlink()
    gpu_build.build("80", folder, package)
    assert len(setup) == 3
    monkeypatch.setattr(gpu_build, "fingerprint", lambda *_: "other sources")
    gpu_build.build("80", folder, package)
    assert (package / MODULE).read_text() == "module 4"


def test_the_fingerprint_is_that_of_all_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "csrc" / "cuda" / "x.cu"
    source.parent.mkdir(parents=True)
    source.write_text("one")
    (tmp_path / "setup.py").write_text("")
    monkeypatch.setattr(gpu_build, "ROOT", tmp_path)
    first = gpu_build.fingerprint("80", ["nvcc"])
    assert first == gpu_build.fingerprint("80", ["nvcc"])
    assert first != gpu_build.fingerprint("89", ["nvcc"])
    assert first != gpu_build.fingerprint("80", ["another nvcc"])
    source.write_text("two")
    assert first != gpu_build.fingerprint("80", ["nvcc"])


def test_without_nvcc_it_ends_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT)
    from build_support import nvcc

    monkeypatch.setattr(nvcc, "find_nvcc", lambda: None)
    monkeypatch.setattr(sys, "argv", ["gpu_build.py", "--arch", "80", "--folder", str(tmp_path)])
    assert gpu_build.main() == gpu_build.NO_COMPILER
    assert "nvcc was not found" in capsys.readouterr().out
