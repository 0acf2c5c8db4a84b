"""The script of the paper's table, on tiny pipelines and few clips."""

from __future__ import annotations

import csv
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from scripts import load_script

from ptq4adm.bench import read_rows

ROOT = Path(__file__).resolve().parents[2]
CLIPS = 8


@pytest.fixture
def real(tmp_path: Path) -> Path:
    """Noise with captions, and a clip without one."""
    folder = tmp_path / "real"
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(CLIPS + 1):
        soundfile.write(folder / f"{i}.wav", 0.1 * random.normal(size=16000), 16000)
    with (folder / "captions.csv").open("w", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerows([["file", "caption"], *([f"{i}.wav", f"sound {i}"] for i in range(CLIPS))])
    return folder


def run(real: Path, model: Path, work: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", str(ROOT / "benchmarks" / "paper_table.py")]
    command += ["--model", f"tiny={model}", "--real", str(real), "--embedding", "logmel-stats"]
    command += ["--captions", str(real / "captions.csv"), "--steps", "1", "--device", "cpu"]
    command += ["--work", str(work), "--results", str(work), "--threads", "1", *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_three_variants_are_made_measured_and_not_made_again(
    real: Path, tiny_pipeline: Path, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    done = run(real, tiny_pipeline, work)
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = read_rows(work / "paper-table.csv")
    assert [row["variant"] for row in rows] == ["float", "W8A8", "W4A8"]
    sizes = [float(row["unet_mb"]) for row in rows]
    assert sizes[0] > sizes[1] > sizes[2]
    for row in rows:
        low, value, high = (float(row[f"frechet_distance{end}"]) for end in ("_low", "", "_high"))
        assert 0.0 <= low <= value <= high
        assert row["clips"] == str(CLIPS)
    assert "| tiny | W4A8 |" in done.stdout
    assert "%)" in done.stdout
    clips = sorted((work / "tiny" / "w4a8" / "clips").glob("*.wav"))
    assert [path.name for path in clips] == [f"{i}.wav" for i in range(CLIPS)]
    times = [path.stat().st_mtime_ns for path in clips]
    clips[3].unlink()
    assert run(real, tiny_pipeline, work).returncode == 0
    again = [path.stat().st_mtime_ns for path in clips]
    # a batch of four is made together, the other is left alone
    assert again[4:] == times[4:]
    assert again[3] != times[3]
    assert read_rows(work / "paper-table.csv")[5]["frechet_distance"] == rows[2]["frechet_distance"]
    # clips of another seed are not measured as this one's
    other = run(real, tiny_pipeline, work, "--seed", "1")
    assert other.returncode == 1
    assert "tiny: made with other seed; name another folder by --work" in other.stderr
    assert len(read_rows(work / "paper-table.csv")) == 6


def test_what_decides_clips_is_compared(tmp_path: Path) -> None:
    paper_table = load_script("paper_table")
    settings = Namespace(steps=None, seed=0)
    paper_table.claim(tmp_path, tmp_path / "a", {"0.wav": "rain", "1.wav": "bells"}, settings)
    paper_table.claim(tmp_path, tmp_path / "a", {"0.wav": "rain"}, settings)
    more = {"0.wav": "rain", "1.wav": "bells", "2.wav": "a dog"}
    paper_table.claim(tmp_path, tmp_path / "a", more, settings)
    for captions in ({"0.wav": "wind"}, {"1.wav": "bells"}, {**more, "2.wav": "a cat"}):
        with pytest.raises(SystemExit, match="other captions"):
            paper_table.claim(tmp_path, tmp_path / "a", captions, settings)
    with pytest.raises(SystemExit, match="other source, steps;"):
        paper_table.claim(tmp_path, tmp_path / "b", more, Namespace(steps=2, seed=0))


def test_a_caption_without_its_clip_is_told(
    real: Path, tiny_pipeline: Path, tmp_path: Path
) -> None:
    with (real / "captions.csv").open("a") as lines:
        lines.write("lost.wav,a sound that is lost\n")
    done = run(real, tiny_pipeline, tmp_path / "work")
    assert done.returncode == 1
    assert "1 of 9 files are not in" in done.stderr
    assert "'lost.wav'" in done.stderr
    assert not (tmp_path / "work").exists()
