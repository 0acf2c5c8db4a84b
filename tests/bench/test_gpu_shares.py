"""Tests in several processes: every test once, failures and deadlines said, results kept."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PASSING = "import pytest\n@pytest.mark.parametrize('i', range(7))\ndef test_right(i):\n    pass\n"


def run(folder: Path, source: str, *options: str) -> tuple[int, str, dict[str, str]]:
    """Exit code, text and outcome of each test."""
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "test_it.py").write_text(source)
    script = ROOT / "benchmarks" / "gpu_tests.py"
    command = [sys.executable, "-P", str(script), "--results", str(folder), "--processes", "3"]
    done = subprocess.run(
        [*command, *options, "--", "-c", str(folder / "pytest.ini"), str(folder / "test_it.py")],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    with (folder / "gpu-tests.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    outcomes = {row["test"].split("::")[-1]: row["outcome"] for row in rows}
    assert len(outcomes) == len(rows), "a test ran twice"
    return done.returncode, done.stdout + done.stderr, outcomes


def test_every_test_runs_once(tmp_path: Path) -> None:
    code, text, outcomes = run(tmp_path, PASSING)
    assert code == 0, text
    assert outcomes == {f"test_right[{i}]": "passed" for i in range(7)}
    assert "7 passed in" in text
    assert "3 processes" in text


def test_failures_are_shown_and_kept(tmp_path: Path) -> None:
    source = PASSING + "def test_wrong():\n    assert 1 == 2, 'the reason'\n"
    code, text, outcomes = run(tmp_path, source)
    assert code == 1
    assert outcomes["test_wrong"] == "failed"
    assert list(outcomes.values()).count("passed") == 7
    assert "the reason" in text
    assert "FAILED" in text.splitlines()[-2]


def test_what_ran_before_the_deadline_is_kept(tmp_path: Path) -> None:
    source = PASSING + "def test_slow():\n    import time; time.sleep(60)\n"
    code, text, outcomes = run(tmp_path, source, "--deadline", "8")
    assert code == 1
    assert "test_slow" not in outcomes
    assert list(outcomes.values()).count("passed") == 7
    assert "1 processes had not finished at the deadline" in text


def test_a_run_of_no_tests_is_no_success(tmp_path: Path) -> None:
    code, text, outcomes = run(tmp_path, "x = 1\n")
    assert (code, outcomes) == (1, {})
    assert "no tests" in text
