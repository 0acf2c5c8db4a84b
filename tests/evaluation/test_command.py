"""`ptq4adm evaluate`: folders and pipelines, the table, the file, errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ptq4adm.cli import main
from ptq4adm.evaluation.result import Evaluation

STATISTICS = ["--embedding", "logmel-stats", "--quiet"]


def _folder(path: Path, seed: int, count: int = 8, rate: int = 16000) -> Path:
    path.mkdir()
    generator = np.random.default_rng(seed)
    for i in range(count):
        samples = 0.1 * generator.standard_normal(4000) * generator.random()
        soundfile.write(path / f"{i}.wav", samples, rate)
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a dog barks\nrain on a roof\nloud drums\n", encoding="utf-8")
    return path


def test_two_folders_give_a_table_and_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = _folder(tmp_path / "a", 0), _folder(tmp_path / "b", 1)
    file = tmp_path / "out" / "evaluation.json"
    assert main(["evaluate", str(a), str(b), *STATISTICS, "--paired", "-o", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = Evaluation.load(file)
    assert (result.reference, result.test, result.clips) == (str(a), str(b), 8)
    assert lines[-1] == f"wrote {file}"
    for metric in result.metrics:
        (line,) = [line for line in lines if line.startswith(f"{metric.name} ")]
        assert f"{metric.value:.4g}" in line
        assert f"[{metric.low:.4g}, {metric.high:.4g}]" in line
    assert sum(line.startswith("warning: ") for line in lines) == len(result.warnings) > 0


def test_pipelines_make_clips_of_prompts_and_seeds(
    tiny_pipeline: Path, other_tiny_pipeline: Path, prompts: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    options = ["--prompts", str(prompts), "--clips", "9", "--steps", "2", "--seed", "3", "--paired"]
    file = tmp_path / "evaluation.json"
    options += [*STATISTICS, "--json", "-o", str(file), "--cache", str(tmp_path / "cache")]

    def run(reference: Path, test: Path) -> Evaluation:
        assert main(["evaluate", str(reference), str(test), *options]) == 0
        printed = Evaluation.from_dict(json.loads(capsys.readouterr().out))
        assert printed == Evaluation.load(file)
        return printed

    same = run(tiny_pipeline, tiny_pipeline)
    assert same["log_mel_distance"].value == 0.0
    assert same["frechet_distance"].value == pytest.approx(0.0, abs=1e-6)
    assert same.reference == f"{tiny_pipeline}, prompts prompts.txt, seed 3"
    assert same.clips == 9
    assert len(list((tmp_path / "cache").iterdir())) == 1
    # random weights whisper: that the clips are others shows in what was embedded
    run(tiny_pipeline, other_tiny_pipeline)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert any("silent" in warning for warning in same.warnings)


def test_a_folder_and_the_shipped_pipeline_compare(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"{i} bells ring" for i in range(8)), encoding="utf-8")
    made = tmp_path / "made"
    options = ["--prompts", str(prompts), "--steps", "2", "--quiet"]
    assert main(["generate", "shipped", "-o", str(made), *options]) == 0
    found = {}
    for seed in ("0", "1"):
        capsys.readouterr()
        arguments = ["evaluate", "--json", str(made), "shipped", "--paired", "--seed", seed]
        assert main([*arguments, *options, "--embedding", "logmel-stats"]) == 0
        found[seed] = Evaluation.from_dict(json.loads(capsys.readouterr().out))
    # the same clips but for their rounding to 16 bits, and those of other seeds
    assert 0.0 < found["0"]["log_mel_distance"].value < 1.0
    assert found["1"]["log_mel_distance"].value > 2.0
    assert found["0"]["embedding_cosine"].value > found["1"]["embedding_cosine"].value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{a}", "{empty}"], "empty: no .wav files"),
        (["{a}", "{absent}"], "absent: no .wav files"),
        (["{a}", "{seven}"], "got 8 clips of"),
        (["{a}", "shipped"], "shipped: a pipeline needs prompts to make clips from"),
        (["{a}", "{a}", "--clips", "3"], "--clips: is for clips that a pipeline makes"),
        (["{a}", "{absent}", "--clips", "3"], "absent: no .wav files"),
        (["{a}", "{a}", "-o", "{empty}"], "empty: is a folder; name a file"),
        (["{a}", "{a}", "--embedding", "musicnn"], "embedding 'musicnn': unknown"),
        (["{a}", "{a}", "--embedding", "cnn14-16k"], "--weights PATH"),
        (["{a}", "{a}", "--embedding", "musicnn-MTT", "--weights", "{empty}"], "holds no MTT_mus"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _folder(tmp_path / "a", 0)
    _folder(tmp_path / "seven", 0, count=7)
    (tmp_path / "empty").mkdir()
    names = {name: str(tmp_path / name) for name in ("a", "seven", "empty", "absent")}
    given = [argument.format(**names) for argument in arguments]
    assert main(["evaluate", *STATISTICS, *given]) == 1
    error = capsys.readouterr().err
    assert error.startswith("ptq4adm: error: ")
    assert message in error
    assert error.count("\n") == 1
