"""`ptq4adm bench --device cuda` and `ptq4adm tune`, rehearsed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ptq4adm.bench.gpu_tiles import use_configs
from ptq4adm.bench.rows import read_rows
from ptq4adm.cli import main
from ptq4adm.kernels import launch, tuning

interpreted = pytest.mark.skipif(
    not launch.IS_INTERPRETED, reason="rehearsals run in Triton's interpreter"
)
BENCH = ["bench", "--device", "cuda", "--rehearse", "--quiet", "--seconds", "0.001"]
BENCH += ["--kind", "linear", "--bits", "4"]


@interpreted
def test_kernels_as_json_and_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BENCH, "--json", "--results", str(tmp_path)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {ratio["kind"] for ratio in result["ratios"]} == {"linear", "linear-geglu"}
    variants = {row["variant"] for row in read_rows(tmp_path / "gpu-kernels.csv")}
    assert {"torch-fp16", "quantize", "w4a8", "quantize+w4a8", "w4a8-geglu-int8"} == variants - {
        "torch-fp16-geglu",
        "w4a8-geglu",
    }
    assert len(read_rows(tmp_path / "gpu-peaks.csv")) == 4


@interpreted
def test_unets_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "--device", "cuda", "--rehearse", "--quiet", "--unet", "all"]
    arguments += ["--variant", "w4a8-static-graph", "--rounds", "1", "--results", str(tmp_path)]
    assert main([*arguments, "--backend", "triton"]) == 0
    assert "w4a8-static-graph triton" in capsys.readouterr().out
    assert {row["model"] for row in read_rows(tmp_path / "gpu-unet.csv")} == {"toy"}


@interpreted
def test_tune_writes_files_and_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["tune", "--rehearse", "--quiet", "--kind", "conv1x1"]
    arguments += ["--output", str(tmp_path / "configs"), "--results", str(tmp_path)]
    assert main(arguments) == 0
    assert "1 files written, 0 products known before" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "configs").iterdir()] == [
        "w4a8_gemm-n32-k64-interpreter.json"
    ]
    assert read_rows(tmp_path / "gpu-tune.csv")
    assert main(arguments) == 0
    assert "0 files written, 1 products known before" in capsys.readouterr().out


@interpreted
def test_one_backend_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pybind11")  # compiles the emulator
    assert main([*BENCH, "--backend", "cuda", "--results", str(tmp_path / "rows")]) == 0
    rows = read_rows(tmp_path / "rows" / "gpu-kernels.csv")
    assert {row["backend"] for row in rows} == {"", "cuda"}
    tune = ["tune", "--backend", "cuda", "--rehearse", "--quiet", "--kind", "conv1x1"]
    assert main([*tune, "--output", str(tmp_path / "configs")]) == 0
    assert [path.name for path in (tmp_path / "configs").iterdir()] == ["cuda-interpreter.json"]
    assert "1 files written" in capsys.readouterr().out


@interpreted
@pytest.mark.parametrize("options", [[], ["--unet", "all"]], ids=["kernels", "steps"])
def test_a_broken_file_of_tiles_is_an_error_before_anything_runs(
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("pybind11")  # compiles the emulator
    monkeypatch.setattr(tuning, "CONFIGS", tuning.CONFIGS)  # restored afterwards
    broken, results = tmp_path / "cuda-interpreter.json", tmp_path / "rows"
    broken.write_text("[]")
    arguments = [*BENCH, *options, "--configs", str(tmp_path), "--results", str(results)]
    try:
        assert main(arguments) == 1
    finally:
        monkeypatch.undo()
        use_configs(tuning.CONFIGS)  # forgets what was read
    errors = capsys.readouterr().err
    assert f"{broken}: not a file of measured tiles" in errors
    assert not results.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--device", "cuda"], "--rehearse"),
        (["bench", "--device", "cuda", "--backend", "cpu"], "'cpu' is none of a GPU"),
        (["bench", "--backend", "cuda"], "give --device cuda"),
        (["tune", "--backend", "x"], "'x' is none of a GPU"),
        (["bench", "--device", "cuda", "--kind", "z"], "kind 'z' is unknown"),
        (["bench", "--device", "cuda", "--model", "x"], "model 'x' is unknown"),
        (["bench", "--device", "cuda", "--bits", "3"], "bits 3"),
        (["bench", "--device", "cuda", "--unet", "y"], "model 'y' is unknown"),
        (["tune", "--model", "x"], "model 'x' is unknown"),
        (["tune", "--kind", "layernorm"], "has no tiles"),
        (["tune"], "--rehearse"),
    ],
    ids=" ".join,
)
def test_wrong_arguments_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if message == "--rehearse" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main([*arguments, "--quiet"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert message in errors[0]
