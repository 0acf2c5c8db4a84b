"""The one command for a GPU machine: stages that fail, hang, lack a package; and a rehearsal."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from ptq4adm.bench.rows import read_rows
from ptq4adm.kernels import launch

ROOT = Path(__file__).resolve().parents[2]


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


stages = load_script("gpu_stages")
gpu_install = load_script("gpu_install")
run_gpu = load_script("run_gpu")


def step(name: str, code: str, **keywords: object) -> object:
    return stages.Step(name, [sys.executable, "-c", code], **keywords)


def test_a_failing_step_does_not_stop_the_next(tmp_path: Path) -> None:
    plan = [
        stages.Stage("first", [step("breaks", "print('why'); raise SystemExit(3)")], 1.0),
        stages.Stage("second", [step("works", "print('one'); print('two')")], 1.0),
    ]
    outcomes = stages.run_stages(plan, budget=60.0, folder=tmp_path, root=tmp_path)
    assert [outcome.status for outcome in outcomes] == ["FAILED", "ok"]
    assert outcomes[0].note == "exit code 3"
    assert outcomes[0].lines == ("why",)
    assert outcomes[1].lines == ("two",)
    assert (tmp_path / "second-works.log").read_text() == "one\ntwo\n"
    summary = stages.format_summary(outcomes, ["a machine"])
    assert "2 steps, 1 failed, 0 skipped" in summary
    assert "--- first breaks: FAILED\nwhy" in summary


def test_a_step_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    outcome = stages.run_step(
        "stage", step("hangs", code), limit=2.0, log=tmp_path / "log", root=tmp_path
    )
    assert outcome.status == "TIMEOUT"
    assert outcome.is_failure
    assert outcome.seconds < 10
    assert "killed after 2 s" in outcome.note
    child = int(outcome.lines[0])
    for _ in range(100):  # killed with its parent, it is gone or a zombie of its new parent
        stat = Path(f"/proc/{child}/stat")
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the child lives")


def test_a_skipped_step_is_no_failure(tmp_path: Path) -> None:
    skipped = stages.Step("sanitizer", skip="not installed: install it")
    outcome = stages.run_step("s", skipped, limit=1.0, log=tmp_path / "log", root=tmp_path)
    assert (outcome.status, outcome.is_failure) == ("skipped", False)
    assert "not installed: install it" in stages.format_outcome(outcome)


def test_a_command_that_is_not_there_fails(tmp_path: Path) -> None:
    missing = stages.Step("gone", [str(tmp_path / "nothing")])
    outcome = stages.run_step("s", missing, limit=1.0, log=tmp_path / "log", root=tmp_path)
    assert outcome.status == "FAILED"
    assert "cannot be started" in outcome.note


def test_commands_are_told_when_to_end_and_get_their_environment(tmp_path: Path) -> None:
    code = "import os, sys; print(sys.argv[1], os.environ['X'], os.environ['PYTHONSAFEPATH'])"
    told = stages.Step(
        "told", [sys.executable, "-c", code, stages.DEADLINE], environment={"X": "here"}
    )
    outcome = stages.run_step("s", told, limit=50.0, log=tmp_path / "log", root=tmp_path)
    assert outcome.lines == ("45 here 1",)


def test_what_a_code_means_is_said_and_fails_nothing(tmp_path: Path) -> None:
    codes = {9: "hazards: read the log"}
    plan = [
        stages.Stage(
            "s",
            [
                step("racecheck", "print('a hazard'); raise SystemExit(9)", noted=codes),
                step("broken", "raise SystemExit(8)", noted=codes),
            ],
            1.0,
        )
    ]
    told: list[int] = []
    outcomes = stages.run_stages(
        plan,
        budget=60.0,
        folder=tmp_path,
        root=tmp_path,
        told=lambda so_far: told.append(len(so_far)),
    )
    noted, broken = outcomes
    assert (noted.status, noted.is_failure, noted.note) == ("NOTED", False, codes[9])
    assert noted.lines == ("a hazard",)
    assert (broken.status, broken.is_failure) == ("FAILED", True)
    assert told == [1, 2]
    summary = stages.format_summary(outcomes, [])
    assert "2 steps, 1 failed, 0 skipped, 1 with something to read" in summary


def test_what_a_stage_leaves_over_the_next_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = []

    def spy(stage: str, _: object, *, limit: float, **__: object) -> object:
        limits.append(limit)
        return stages.Outcome(stage, "x", "ok", 0.0)

    monkeypatch.setattr(stages, "run_step", spy)
    plan = [
        stages.Stage("a", [stages.Step("x"), stages.Step("y", share=3.0)], 1.0),
        stages.Stage("b", [stages.Step("x")], 3.0),
    ]
    stages.run_stages(plan, budget=100.0, folder=tmp_path, root=tmp_path)
    # the first used no time: the second of its stage has all 25 s, the last stage all 100
    assert limits == [
        pytest.approx(6.25, abs=0.5),
        pytest.approx(25, abs=0.5),
        pytest.approx(100, abs=1),
    ]


def names(tmp_path: Path, *stage_names: str, **options: bool) -> dict[str, object]:
    made = run_gpu.make_stages(list(stage_names), "python", tmp_path, tmp_path / "c", **options)
    return {f"{stage.name}-{s.name}": s for stage in made for s in stage.steps}


def only(monkeypatch: pytest.MonkeyPatch, is_there: Callable[[str], bool]) -> None:
    monkeypatch.setattr(gpu_install, "has", is_there)


def test_missing_packages_and_tools_are_skipped_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, {"torch", "triton", "typing_extensions"}.__contains__)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    steps = names(tmp_path, *run_gpu.STAGES)
    assert steps["tests-packages"].skip.startswith("pytest not installed: carry wheels")
    for stage in ("unet", "compiled"):
        assert "diffusers, safetensors, tqdm, numpy" in steps[f"{stage}-packages"].skip
    for tool in ("memcheck", "racecheck", "synccheck"):
        assert "CUDA's toolkit" in steps[f"sanitize-{tool}"].skip
    assert not steps["sanitize-plain"].skip
    assert not steps["bench-kernels"].skip
    assert not steps["tune-tiles"].skip


def test_every_file_with_gpu_tests_is_collected_and_no_other(tmp_path: Path) -> None:
    command = names(tmp_path, "tests")["tests-gpu"].command
    assert "tests" not in command  # most of it cannot even be imported without diffusers
    assert set(run_gpu.GPU_TESTS) <= set(command)
    places = [ROOT / p for p in (*run_gpu.GPU_TESTS, *run_gpu.GPU_TESTS_OF_BLOCKS)]
    assert all(place.exists() for place in places)
    files = [p for p in (ROOT / "tests").rglob("*.py") if p.parent.name != "shared"]
    words = ("mark.gpu", "triton_devices")  # the second marks its parameters (tests/shared)
    marked = [path for path in files if any(word in path.read_text() for word in words)]
    others = [path for path in marked if not any(map(path.is_relative_to, places))]
    assert len(marked) >= 5
    assert others == [Path(__file__).resolve()]  # which only says the words


def test_tiles_tuned_before_are_benchmarked(tmp_path: Path) -> None:
    assert "--configs" in names(tmp_path, "tune", "bench", "unet")["bench-kernels"].command
    assert "--configs" not in names(tmp_path, "bench", "tune")["bench-kernels"].command
    assert "--configs" in names(tmp_path, "tune", "unet")["unet-steps"].command
    later = names(tmp_path, "bench", "compiled", is_tuned=True)
    assert str(tmp_path / "c") in later["bench-kernels"].command
    assert "--configs" in later["compiled-compiled"].command


def test_each_tool_has_a_process_and_only_races_are_information(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/opt/{name}")
    steps = names(tmp_path, "sanitize")
    order = ["plain", "memcheck", "racecheck", "synccheck"]
    assert list(steps) == [f"sanitize-{name}" for name in order]
    for name in order[1:]:
        command = steps[f"sanitize-{name}"].command
        assert command[command.index("--tool") + 1] == name
        assert stages.DEADLINE in command
        code = int(command[command.index("--error-exitcode") + 1])
        noted = steps[f"sanitize-{name}"].noted
        assert (code in noted) == (name == "racecheck")
    assert "no proof that there is none" in steps["sanitize-racecheck"].noted[9]


def test_a_rehearsal_needs_no_gpu(tmp_path: Path) -> None:
    steps = names(tmp_path, *run_gpu.STAGES, is_rehearsal=True)
    for name, made in steps.items():
        assert made.environment["TRITON_INTERPRET"] == "1"
        assert "--rehearse" in made.command or name == "tests-collect"
    real = names(tmp_path, *run_gpu.STAGES)
    assert not any("--rehearse" in made.command for made in real.values())
    assert all("TRITON_INTERPRET" not in made.environment for made in real.values())


def test_calls_add_to_the_summary_and_keep_their_logs(tmp_path: Path) -> None:
    work, output = tmp_path / "work", tmp_path / "output"
    work.mkdir()
    output.mkdir()
    (work / "one.log").write_text("a log")
    for name in ("tests", "bench"):
        report = run_gpu.Report(output, [name], work, tmp_path / "none")
        report.write([])
        report.write([stages.Outcome(name, "step", "ok", 1.0)])
    text = (output / "summary.txt").read_text()
    assert text.count("=== tests") == text.count("=== bench") == 1
    assert text.count("1 steps, 0 failed") == 2
    assert {path.name for path in output.iterdir()} == {
        "summary.txt",
        "logs-tests.tar.gz",
        "logs-bench.tar.gz",
    }


def test_the_summary_has_the_groups_and_not_every_shape() -> None:
    assert run_gpu.before_shapes(["ratios", "conv", "every shape: x", "a", "b"]) == [
        "ratios",
        "conv",
    ]
    assert run_gpu.before_shapes(["a", "b"]) == ["a", "b"]


@pytest.mark.parametrize(
    "arguments", [["--stages", "x"], ["--rehearse"], ["--wheels", "nowhere"]], ids=str
)
def test_wrong_arguments_are_refused(arguments: list[str]) -> None:
    results = ROOT / "benchmarks" / "results"
    done = run_command(["--output", str(results), *arguments])
    assert done.returncode == 2
    told = ("stage 'x' is unknown", "no measurements", "there is no such folder")
    assert any(message in done.stderr for message in told)
    assert not (results / "summary.txt").exists()


@pytest.mark.skipif(not launch.IS_INTERPRETED, reason="rehearsals run in Triton's interpreter")
def test_a_rehearsal_end_to_end(tmp_path: Path) -> None:
    configs = tmp_path / "configs"
    arguments = ["--output", str(tmp_path), "--configs", str(configs), "--rehearse"]
    done = run_command([*arguments, "--stages", "sanitize,tune,bench"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 steps, 0 failed, 0 skipped" in (tmp_path / "summary.txt").read_text()
    rows = read_rows(tmp_path / "gpu-kernels.csv")
    assert {row["device"] for row in rows} == {"interpreter"}
    assert {"w4a8", "torch-fp16", "ptq4adm-static"} <= {row["variant"] for row in rows}
    assert {row["chosen"] for row in read_rows(tmp_path / "gpu-tune.csv")} == {"0", "1"}
    with tarfile.open(tmp_path / "configs.tar.gz") as archive:
        assert "w4a8_gemm-n48-k64-interpreter.json" in archive.getnames()
    files = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert len(files) <= 8, "more would not be handed back by some machines"
    assert "logs-sanitize-tune-bench.tar.gz" in files


@pytest.mark.skipif(not launch.IS_INTERPRETED, reason="rehearsals run in Triton's interpreter")
def test_a_call_that_is_cut_has_handed_back_what_it_did(tmp_path: Path) -> None:
    configs = tmp_path / "configs"
    arguments = ["--output", str(tmp_path), "--configs", str(configs), "--rehearse"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "benchmarks" / "run_gpu.py"), *arguments, "--stages", "tune"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    rows = tmp_path / "gpu-tune.csv"
    for _ in range(600):
        if rows.exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    process.terminate()
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert read_rows(rows)
    with tarfile.open(tmp_path / "logs-tune.tar.gz") as archive:
        assert "tune-tiles.log" in archive.getnames()
    assert "=== tune" in (tmp_path / "summary.txt").read_text()


def run_command(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "run_gpu.py"), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
