"""The one command for a GPU machine: stages that fail, hang, lack a package; and a rehearsal."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from scripts import ROOT, load_script

from ptq4adm.bench.rows import read_rows
from ptq4adm.kernels import launch

stages = load_script("gpu_stages")
gpu_install = load_script("gpu_install")
gpu_build = load_script("gpu_build")
gpu_table = load_script("gpu_table")
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


def test_a_step_waits_for_what_it_needs_and_is_skipped_without(tmp_path: Path) -> None:
    waited: list[float] = []

    def ready(reason: str) -> Callable[[float], str]:
        return lambda seconds: waited.append(seconds) or reason

    plan = [
        stages.Stage(
            "s",
            [
                step("there", "print('ran')", ready=ready("")),
                step("missing", "print('ran')", ready=ready("no module: build it")),
                stages.Step("never", skip="no tool", ready=ready("not asked")),
            ],
            1.0,
        )
    ]
    outcomes = stages.run_stages(plan, budget=60.0, folder=tmp_path, root=tmp_path)
    assert [(o.status, o.note) for o in outcomes] == [
        *(("ok", ""), ("skipped", "no module: build it"), ("skipped", "no tool")),
    ]
    assert waited == [pytest.approx(20, abs=1), pytest.approx(30, abs=2)]


def test_waiting_is_a_part_of_a_steps_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = []

    def spy(stage: str, _: object, *, limit: float, **__: object) -> object:
        limits.append(limit)
        return stages.Outcome(stage, "x", "ok", 0.0)

    monkeypatch.setattr(stages, "run_step", spy)
    slow = stages.Step("x", ready=lambda _: time.sleep(1.0) or "")
    stages.run_stages([stages.Stage("a", [slow], 1.0)], budget=30.0, folder=tmp_path, root=tmp_path)
    assert limits == [pytest.approx(29, abs=0.8)]


def names(tmp_path: Path, *stage_names: str, **options: object) -> dict[str, object]:
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
        assert "CUDA's toolkit" in steps[f"sanitize-cuda-{tool}"].skip
    for name in ("sanitize-plain", "sanitize-cuda-plain", "bench-kernels"):
        assert not steps[name].skip
    for backend in ("triton", "cuda"):
        assert not steps[f"tune-{backend}"].skip


def test_every_file_with_gpu_tests_is_collected_and_no_other(tmp_path: Path) -> None:
    steps = names(tmp_path, "tests")
    command = steps["tests-gpu"].command
    assert "tests" not in command  # most of it cannot even be imported without diffusers
    assert set(run_gpu.GPU_TESTS) <= set(command)
    assert set(run_gpu.GPU_TESTS_OF_CUDA) <= set(steps["tests-cuda"].command)
    listed = (*run_gpu.GPU_TESTS, *run_gpu.GPU_TESTS_OF_CUDA, *run_gpu.GPU_TESTS_OF_BLOCKS)
    places = [ROOT / p for p in listed]
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
    tools = ["memcheck", "racecheck", "synccheck"]
    order = ["plain", *tools]
    assert {f"sanitize-{name}" for name in order} | {
        f"sanitize-cuda-{name}" for name in order
    } == set(steps)
    for name, made in steps.items():
        assert ("cuda" in made.command) == ("cuda" in name)  # --backend cuda
    for name in (*tools, *(f"cuda-{tool}" for tool in tools)):
        command = steps[f"sanitize-{name}"].command
        assert command[command.index("--tool") + 1] == name.removeprefix("cuda-")
        assert stages.DEADLINE in command
        assert steps[f"sanitize-{name}"].environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
        code = int(command[command.index("--error-exitcode") + 1])
        noted = steps[f"sanitize-{name}"].noted
        # in Triton's code barriers of its own may be among them, in ours there is none
        assert (code in noted) == (name == "racecheck")
    assert "no proof that there is none" in steps["sanitize-racecheck"].noted[9]


def test_only_what_needs_the_cuda_module_waits_for_it(tmp_path: Path) -> None:
    build = gpu_build.Build("the module", tmp_path / "log", reason="no GPU")
    steps = names(tmp_path, *run_gpu.STAGES, build=build)
    found = {name: made.ready(0.0) for name, made in steps.items() if made.ready and not made.skip}
    needing = {name for name, reason in found.items() if reason == "no GPU"}
    assert {name for name in needing if "sanitize" not in name} == {"tests-cuda", "tune-cuda"}
    assert {name for name in needing if "sanitize" in name} >= {"sanitize-cuda-plain"}
    # these run without it, and say so in their rows
    assert set(found) - needing == {"bench-kernels", "unet-steps", "compiled-compiled"}
    without = names(tmp_path, *run_gpu.STAGES)
    assert all(made.ready is None for made in without.values())


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
    summary = (tmp_path / "summary.txt").read_text()
    # the build, two cases each, two tuners, the benchmark
    assert "6 steps, 0 failed, 0 skipped" in summary
    assert re.search(r"build cuda +ok .*matmul_emulated", summary)
    assert "W4A8 on interpreter, times faster than float16" in done.stdout
    rows = read_rows(tmp_path / "gpu-kernels.csv")
    assert {row["device"] for row in rows} == {"interpreter"}
    assert {"w4a8", "torch-fp16", "ptq4adm-static"} <= {row["variant"] for row in rows}
    assert {row["backend"] for row in rows} == {"", "triton", "cuda"}
    assert {row["skipped"] for row in rows} == {""}
    tuned = read_rows(tmp_path / "gpu-tune.csv")
    assert {(row["backend"], row["chosen"]) for row in tuned} == {
        (backend, chosen) for backend in ("triton", "cuda") for chosen in ("0", "1")
    }
    with tarfile.open(tmp_path / "configs.tar.gz") as archive:
        names = archive.getnames()
    assert {"w4a8_gemm-n48-k64-interpreter.json", "cuda-interpreter.json"} <= set(names)
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
        assert {"tune-triton.log", "build-cuda.log"} <= set(archive.getnames())
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
