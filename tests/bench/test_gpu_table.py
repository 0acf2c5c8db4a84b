"""The short table at the end of a GPU run: newest rows, both backends, reasons for empty cells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scripts import load_script

from ptq4adm.bench.rows import append_rows

gpu_table = load_script("gpu_table")


def kernel(
    shape: str, variant: str, ratio: float | str, backend: str = "", **more: Any
) -> dict[str, Any]:
    row = {"device": "a GPU", "model": "tango", "kind": "conv3x3", "shape": shape, "M": 8192}
    row |= {"variant": variant, "ratio_fp16": ratio, "failed": "", "backend": backend}
    return {**row, "skipped": "", **more}


def step(variant: str, ms: float | str, ratio: float | str, backend: str = "") -> dict[str, Any]:
    row = {"device": "a GPU", "model": "tango", "variant": variant, "ms": ms}
    return {**row, "ratio_fp16_graph": ratio, "failed": "", "backend": backend, "skipped": ""}


def cells(lines: list[str]) -> dict[str, list[str]]:
    found = {}
    for line in lines[2:]:
        name, *rest = [cell for cell in line.split("  ") if cell]
        found[name] = [cell.strip() for cell in rest]
    return found


def test_nothing_measured_is_no_table(tmp_path: Path) -> None:
    assert gpu_table.short_table(tmp_path) == []


def test_backends_stand_side_by_side(tmp_path: Path) -> None:
    append_rows(
        tmp_path / "gpu-kernels.csv",
        [
            kernel("a", "torch-fp16", 1.0),
            kernel("a", "w4a8", 0.5, "triton"),
            kernel("a", "w4a8", 1.0, "cuda"),
            kernel("a", "quantize+w4a8", 9.0, "cuda"),
            kernel("b", "torch-fp16", 1.0),
            kernel("b", "w4a8", 4.0, "cuda"),
            kernel("b", "w4a8", 4.0, "cuda", model="audioldm-s"),  # the same shape: counts once
            kernel("b", "w4a8", 1.0, "triton"),
            kernel("c", "torch-fp16", 1.0, M=128, kind="linear-geglu"),
            kernel("c", "w4a8", "", "triton", M=128, kind="linear-geglu", failed="wrong"),
            kernel("c", "w4a8", "", "cuda", M=128, kind="linear-geglu", skipped="no nvcc"),
            kernel("d", "torch-fp16", 1.0, kind="layernorm"),
            # the third call: measured tiles
            kernel("a", "w4a8", 2.0, "triton"),
            kernel("b", "w4a8", 2.0, "triton"),
        ],
    )
    append_rows(
        tmp_path / "gpu-unet.csv",
        [
            step("fp16-graph", 12.5, 1.0),
            step("w4a8-static-graph", 10.0, 1.25, "triton"),
            step("w4a8-static-graph", 8.0, 1.5625, "cuda"),
        ],
    )
    lines = gpu_table.short_table(tmp_path)
    assert lines[0].startswith("W4A8 on a GPU, times faster than float16")
    assert lines[1].split() == ["fp16", "triton", "cuda"]
    assert cells(lines) == {
        "convolutions, M >= 2048 (2 shapes)": ["1.00", "2.00", "2.00"],
        "linear, M < 2048 (1 shapes)": ["1.00", "failed", "skipped"],
        "a step of tango": ["12.5 ms", "10.0 ms (1.25)", "8.0 ms (1.56)"],
    }


def test_rows_of_another_gpu_do_not_mix(tmp_path: Path) -> None:
    rows = [kernel("a", "w4a8", 3.0, "cuda"), kernel("a", "torch-fp16", 1.0)]
    append_rows(tmp_path / "gpu-kernels.csv", [{**row, "device": "older"} for row in rows])
    append_rows(tmp_path / "gpu-kernels.csv", [kernel("b", "w4a8", 2.0, "cuda")])
    lines = gpu_table.short_table(tmp_path)
    assert "a GPU" in lines[0]
    assert len(lines) == 3
    assert lines[2].split()[-1] == "2.00"
