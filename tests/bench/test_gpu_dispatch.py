"""Rows to a table, and the command that does it. The rows are made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ptq4adm.bench.gpu_dispatch import read_table
from ptq4adm.bench.gpu_kernels import failed_row
from ptq4adm.bench.gpu_shapes import TOY_LAYERS
from ptq4adm.bench.rows import append_rows
from ptq4adm.cli import main
from ptq4adm.dispatch import LayerKey, Times, load_table
from ptq4adm.errors import DispatchTableError

GPU = "Test GPU 1"
KEY = LayerKey("conv3x3", 4, 32, 576)
FIRST = {"date": "2026-01-02 03:04", "commit": "abc", "torch": "2", "triton": "3", "cuda": "13",
         "driver": "580"}  # fmt: skip
SECOND = FIRST | {"date": "2026-01-03 03:04"}


def _row(variant: str, us: float | str, backend: str = "", **columns: Any) -> dict[str, Any]:
    return {
        **FIRST,
        "device": GPU,
        "model": "toy",
        "count": 1,
        "kind": "conv3x3",
        "shape": "conv3x3 1x5x3 64->32",
        "M": 15,
        "N": 32,
        "K": 576,
        "variant": variant,
        "us": us,
        "failed": "",
        "backend": backend,
        "skipped": "",
        **columns,
    }


ROWS = [
    _row("torch-fp16", 9.0),
    _row("quantize", 2.0, "triton"),
    _row("w4a8", 4.0, "triton"),
    _row("quantize+w4a8", 6.0, "triton"),
    _row("w4a8", 3.0, "cuda"),
    _row("quantize+w4a8", 5.0, "cuda"),
    _row("w8a8", 7.0, "triton"),
    _row("torch-int-mm", 1.0),
]


def _write(tmp_path: Path, *rows: dict[str, Any]) -> Path:
    path = tmp_path / "gpu-kernels.csv"
    path.unlink(missing_ok=True)
    append_rows(path, rows)
    return path


def test_times_of_a_layer_stand_beside_each_other(tmp_path: Path) -> None:
    table = read_table([_write(tmp_path, *ROWS, ROWS[2] | {"model": "tango"})])
    assert table.device == GPU
    assert table.runs == (FIRST,)
    assert table.layers == {
        KEY: {15: Times(0, 9.0, {"triton": 4.0, "cuda": 3.0}, {"triton": 6.0, "cuda": 5.0})},
        LayerKey("conv3x3", 8, 32, 576): {15: Times(0, 9.0, {"triton": 7.0})},
    }


def test_rows_from_before_there_were_backends_are_of_triton(tmp_path: Path) -> None:
    old = [{k: v for k, v in row.items() if k not in ("backend", "skipped")} for row in ROWS[:4]]
    assert read_table([_write(tmp_path, *old)]).layers[KEY][15].product == {"triton": 4.0}


def test_a_gated_projection_is_a_linear_layer_and_norms_are_none(tmp_path: Path) -> None:
    gated = {"kind": "linear-geglu", "M": 18, "N": 64, "K": 64}
    rows = [_row("w4a8", 4.0, "triton", **gated), _row("torch-fp16", 5.0, **gated)]
    rows += [_row("w4a8-geglu-int8", 1.0, "triton", **gated)]
    rows += [_row("ptq4adm-static", 1.0, "triton", kind="layernorm", M=6, N=40, K=40)]
    table = read_table([_write(tmp_path, *rows)])
    assert table.layers == {LayerKey("linear", 4, 64, 64): {18: Times(0, 5.0, {"triton": 4.0})}}


def test_what_failed_has_a_reason_and_no_time(tmp_path: Path) -> None:
    wrong = _row("quantize+w4a8", "", "cuda", failed="3 of 64 exact results differ")
    missing = _row("w4a8", "", "cuda", skipped="not built", M=30)
    rows = [*ROWS[:5], wrong, missing, _row("w4a8", 8.0, "triton", M=30)]
    times = read_table([_write(tmp_path, *rows)]).layers[KEY]
    assert times[15].product == {"triton": 4.0}
    assert times[15].failed == {"cuda": "3 of 64 exact results differ"}
    # a backend that was not there did not fail
    assert times[30] == Times(0, None, {"triton": 8.0})


def test_times_of_two_runs_are_not_mixed(tmp_path: Path) -> None:
    later = [_row("w4a8", 1.0, "triton", **SECOND), _row("torch-fp16", 8.0, **SECOND)]
    table = read_table([_write(tmp_path, *ROWS, *later)])
    # the first run compared two backends, the second one only
    assert table.layers[KEY][15].product == {"triton": 4.0, "cuda": 3.0}
    later.append(_row("w4a8", 2.0, "cuda", **SECOND))
    table = read_table([_write(tmp_path, *ROWS, *later)])
    times = table.layers[KEY][15]
    assert (times.product, times.float16) == ({"triton": 1.0, "cuda": 2.0}, 8.0)
    assert table.runs[times.run] == SECOND
    # W8 was measured by the first alone
    assert table.runs[table.layers[LayerKey("conv3x3", 8, 32, 576)][15].run] == FIRST


def test_rows_as_the_benchmark_makes_them_are_understood(tmp_path: Path) -> None:
    row = failed_row(TOY_LAYERS[0], "w4a8", "crashed", backend="cuda")
    path = _write(tmp_path, {**FIRST, "device": GPU, "us": "", **row})
    assert read_table([path]).layers[KEY][15].failed == {"cuda": "crashed"}


BAD: dict[str, tuple[list[dict[str, Any]], str]] = {
    "a rehearsal": ([_row("w4a8", 4.0, device="interpreter")], "rows of a rehearsal only"),
    "two devices": ([*ROWS, _row("w4a8", 4.0, device="B")], "2 devices .B; Test GPU 1.; name one"),
    "no product": ([_row("torch-fp16", 4.0)], "no rows of this package's products"),
    "no time": ([_row("w4a8", "")], "row 2: us = '', needs microseconds above 0"),
    "a time of 0": ([ROWS[0], _row("w4a8", 0)], "row 3: us = '0', needs microseconds above 0"),
    "a time that is none": ([_row("torch-fp16", "nan")], "us = 'nan'"),
    "no M": ([_row("w4a8", 4.0, M="x")], "M = 'x', needs a whole number"),
    "another table": ([{"a": 1}], "no column 'device'"),
}


@pytest.mark.parametrize(("rows", "message"), BAD.values(), ids=BAD)
def test_bad_rows_are_named(rows: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    with pytest.raises(DispatchTableError, match=message):
        read_table([_write(tmp_path, *rows)])


def test_a_missing_or_damaged_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DispatchTableError, match="cannot be read"):
        read_table([tmp_path / "none.csv"])
    path = _write(tmp_path, *ROWS)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(DispatchTableError, match="row 9: has another number of cells"):
        read_table([path])
    empty = tmp_path / "empty.csv"
    empty.write_text(path.read_text().splitlines()[0] + "\n")
    with pytest.raises(DispatchTableError, match="no rows; run `ptq4adm bench"):
        read_table([empty])


# --- the command --------------------------------------------------------------------------------


def test_the_command_writes_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, out = _write(tmp_path, *ROWS), tmp_path / "table.json"
    assert main(["dispatch", str(rows), "-o", str(out)]) == 0
    text = capsys.readouterr().out
    assert "Test GPU 1: 2 layers, 2 entries; two backends in 1 of them: cuda in 1" in text
    assert f"wrote {out}" in text
    assert load_table(out).layers == read_table([rows]).layers


def test_the_command_writes_where_auto_looks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ptq4adm.dispatch.files.TABLES", tmp_path / "tables")
    rows = _write(tmp_path, *ROWS, _row("w4a8", 4.0, device="B"))
    assert main(["dispatch", str(rows)]) == 1
    assert "name one with --device" in capsys.readouterr().err
    assert not (tmp_path / "tables").exists()
    assert main(["dispatch", str(rows), "--device", "C"]) == 1
    assert "no rows of 'C'" in capsys.readouterr().err
    assert main(["dispatch", str(rows), "--device", GPU, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["output"] == str(tmp_path / "tables" / "test_gpu_1.json")
    assert (result["compared"], result["faster"]) == (1, {"cuda": 1})


def test_doctor_says_which_table_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ptq4adm.cli import doctor

    monkeypatch.delenv("PTQ4ADM_DISPATCH", raising=False)
    assert doctor._dispatch_tables([]) == (["no CUDA device here, so none is used"], True)
    none = f"no table for {GPU}: auto takes triton"
    assert doctor._dispatch_tables([GPU, GPU]) == ([none], True)
    out = tmp_path / "table.json"
    assert main(["dispatch", str(_write(tmp_path, *ROWS)), "-o", str(out)]) == 0
    monkeypatch.setenv("PTQ4ADM_DISPATCH", str(out))
    (line,), is_right = doctor._dispatch_tables([GPU])
    assert is_right
    assert line == f"{out}: 2 layers, 2 entries of {GPU}, newest run 2026-01-02 03:04 UTC"
    assert "is of Test GPU 1 (2 entries); no CUDA device" in doctor._dispatch_tables([])[0][0]
    for text in ("{}", "{"):
        out.write_text(text)
        assert not doctor._dispatch_tables([GPU])[1]
        assert not doctor._dispatch_tables([])[1]
    monkeypatch.setenv("PTQ4ADM_DISPATCH", str(tmp_path / "none"))
    capsys.readouterr()
    assert main(["doctor"]) == 1
    assert "dispatch table: PTQ4ADM_DISPATCH = " in capsys.readouterr().out
