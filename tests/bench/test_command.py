"""`ptq4adm bench`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ptq4adm.bench.rows import read_rows
from ptq4adm.cli import main
from ptq4adm.ops import cpu

SMALL = ["bench", "--quick", "--model", "make-an-audio", "--kind", "conv3x3-stride2"]
SMALL += ["--peer", "torch-fp32", "--seconds", "0.001", "--threads", "1", "--quiet"]

needs_module = pytest.mark.skipif(
    cpu.unavailable_reason() is not None, reason="the compiled module is not built"
)


@needs_module
def test_json_and_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--json", "--results", str(tmp_path)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {row["variant"] for row in result["rows"]} >= {"ptq4adm", "torch-fp32"}
    assert [ratio["group"] for ratio in result["ratios"]] == ["conv 3x3"]
    assert {row["shape"] for row in read_rows(tmp_path / "cpu-kernels.csv")} == {
        "conv3x3-stride2 2x10x80 320->320"
    }


@needs_module
def test_text_shows_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(SMALL) == 0
    text = capsys.readouterr().out
    assert "conv3x3-stride2 2x10x80 320->320" in text
    assert "torch-fp32" in text
    assert "ceilings: " in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "expected cpu or cuda"),
        (["--model", "x"], "model 'x' is unknown"),
        (["--peer", "y"], "peer 'y' is unknown"),
        (["--kind", "z"], "kind 'z' is unknown"),
        (["--isa", "neon"], "isa 'neon' is unknown"),
        (["--bits", "3"], "bits 3"),
        (["--seconds", "-1"], "--seconds"),
        (["--unet", "x"], "model 'x' is unknown"),
    ],
    ids=str,
)
def test_wrong_arguments_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert message in errors[0]
