"""Ratios by kind and rows, tables for people, and where rows may go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ptq4adm.bench.gpu_peaks import peak_values
from ptq4adm.bench.gpu_report import (
    columns,
    describe_run,
    format_gpu,
    geometric_mean,
    group_ratios,
    row_class,
    save_gpu,
)
from ptq4adm.bench.rows import read_rows
from ptq4adm.errors import OutputError

ROOT = Path(__file__).resolve().parents[2]
RUN = {
    "date": "2026-01-02 03:04",
    "commit": "abc",
    "device": "a GPU",
    "driver": "1.2",
    "cuda": "13.0",
    "torch": "2.11",
    "triton": "3.6",
}


def row(shape: str, variant: str, ratio: float | str, M: int = 8192) -> dict[str, Any]:
    return {
        "kind": "linear",
        "shape": shape,
        "M": M,
        "variant": variant,
        "us": 10.0,
        "ratio_fp16": ratio,
        "peak_percent": 50.0,
        "error": 0.1,
        "tile": "128x128x64 w8 s4 gather",
        "failed": "",
    }


ROWS = [
    row("a", "torch-fp16", 1.0),
    row("a", "quantize", ""),
    row("a", "w4a8", 2.0),
    row("b", "w4a8", 0.5),
    row("b", "w4a8", 0.5),  # another model has the same shape: it counts once
    row("c", "w4a8", 3.0, M=128),
]


def test_groups_have_mean_and_least() -> None:
    many, few = group_ratios(ROWS)
    assert (many["rows"], many["variant"], many["shapes"]) == ("M > 4096", "w4a8", 2)
    assert many["geometric_mean"] == pytest.approx(1.0)
    assert (many["least"], many["least_shape"]) == (0.5, "b")
    assert (few["rows"], few["geometric_mean"]) == ("M <= 256", pytest.approx(3.0))


@pytest.mark.parametrize(
    ("M", "name"),
    [
        (1, "M <= 256"),
        (256, "M <= 256"),
        (257, "M <= 1024"),
        (4096, "M <= 4096"),
        (4097, "M > 4096"),
    ],
)
def test_classes_of_rows(M: int, name: str) -> None:
    assert row_class(M) == name


def test_geometric_mean() -> None:
    assert geometric_mean([1.0, 4.0, 16.0]) == pytest.approx(4.0)


def test_text_has_groups_shapes_ceilings_and_what_is_missing() -> None:
    peaks = [
        {"peak": "copy", "value": 2900.0, "unit": "GB/s", "failed": ""},
        {"peak": "int8", "value": "", "unit": "TOPS", "failed": "RuntimeError: x"},
    ]
    wrong = {"kind": "linear", "shape": "d", "M": 1, "variant": "w4a8", "ratio_fp16": ""}
    rows = [*ROWS, {**wrong, "failed": "BenchmarkError: y"}]
    missing, left_out = {"gemlite-a16w4": "not installed"}, ["linear z"]
    text = format_gpu(
        {
            "run": RUN,
            "rows": rows,
            "peaks": peaks,
            "missing": missing,
            "left_out": left_out,
            "failed": ["d w4a8: BenchmarkError: y"],
            "uncompiled": ["linear d, a tile: RuntimeError: z"],
        }
    )
    assert "a GPU, driver 1.2, CUDA 13.0, torch 2.11, triton 3.6, commit abc" in text
    assert "copy 2900 GB/s, int8 FAILED TOPS" in text
    assert "FAILED: d w4a8: BenchmarkError: y" in text
    assert "did not compile: linear d, a tile" in text
    assert "1.00 (0.50)" in text
    assert "3.00 (3.00)" in text
    assert "not measured: gemlite-a16w4: not installed" in text
    assert "no time for: linear z" in text


def test_a_run_without_driver_has_none_in_its_line() -> None:
    assert "driver" not in describe_run({**RUN, "driver": ""})


def test_columns_are_aligned() -> None:
    lines = columns([["a", "b", "c"], ["long", "1.5", "x"]], left=1)
    assert lines == ["a       b  c", "long  1.5  x"]


def test_rows_carry_their_run(tmp_path: Path) -> None:
    files = save_gpu(tmp_path, RUN, {"gpu-kernels.csv": ROWS[:1], "gpu-unet.csv": []})
    assert files == [str(tmp_path / "gpu-kernels.csv")]
    save_gpu(tmp_path, RUN, {"gpu-kernels.csv": ROWS[1:2]})
    rows = read_rows(tmp_path / "gpu-kernels.csv")
    assert [r["variant"] for r in rows] == ["torch-fp16", "quantize"]
    assert {r["device"] for r in rows} == {"a GPU"}


def test_a_rehearsal_does_not_mix_with_measurements(tmp_path: Path) -> None:
    rehearsed = {**RUN, "device": "interpreter"}
    results = ROOT / "benchmarks" / "results"
    with pytest.raises(OutputError, match="no measurements"):
        save_gpu(results, rehearsed, {"gpu-kernels.csv": ROWS})
    assert not (results / "gpu-kernels.csv").exists()
    save_gpu(tmp_path, rehearsed, {"gpu-kernels.csv": ROWS})


def test_peaks_have_units() -> None:
    rows = [
        {"peak": "copy", "value": 3.0, "unit": "GB/s", "failed": ""},
        {"peak": "int8", "value": 2.0, "unit": "TOPS", "failed": ""},
        {"peak": "graph-node", "value": 1.5, "unit": "us", "failed": ""},
        {"peak": "fp16", "value": "", "unit": "TOPS", "failed": "RuntimeError: no memory"},
    ]
    assert peak_values(rows) == {
        "copy": pytest.approx(3e9),
        "int8": pytest.approx(2e12),
        "graph-node": pytest.approx(1.5e-6),
    }
