"""The documents' numbers are the rows'; the tables of the CPU benchmark from a run of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from scripts import load_script

from ptq4adm.bench import kernels
from ptq4adm.bench.kernels import KernelJob, measure
from ptq4adm.bench.shapes import LayerShape, ModelLayer
from ptq4adm.bench.store import KERNELS, PEAKS, UNET, save_result
from ptq4adm.ops import cpu

ROOT = Path(__file__).resolve().parents[2]
SHAPES = [LayerShape("conv3x3", 1, 6, 5, 32, 16), LayerShape("linear", 1, 520, 1, 64, 16)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of rows: two tiny shapes measured with whatever peers are installed."""
    if cpu.unavailable_reason() is not None:
        pytest.skip("the compiled module is not built")
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_SAMPLE_SECONDS", 0.02)
        patch.setattr(kernels, "_PEAK_MS", 1.0)
        layers = [ModelLayer("tiny", shape, 2) for shape in SHAPES]
        found = measure(KernelJob(threads=1, seconds=0.001), layers)
    for isa in ("avx2", "native"):  # the tables ask nothing else of the instruction set
        run = {**found["run"], "isa": isa}
        save_result(folder, run, {KERNELS: found["rows"], PEAKS: found["peaks"]})
    return folder


def test_documents_are_generated_from_the_rows() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"], check=False
    )
    assert done.returncode == 0, (
        "README.md or docs/ differ from benchmarks/results: run benchmarks/tables.py"
    )


def test_kernel_table_has_a_line_a_group_and_instruction_set(results: Path) -> None:
    lines = load_script("cpu_tables").kernel_table(results).splitlines()
    titles = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
    assert titles == [
        "layers (shapes)",
        "---",
        "conv 3x3 (1), AVX2, 1 threads",
        "conv 3x3 (1), all instructions, 1 threads",
        "linear, M >= 512 (1), AVX2, 1 threads",
        "linear, M >= 512 (1), all instructions, 1 threads",
    ]
    assert "torch-fp32" in lines[0]


def test_shape_table_sums_a_step(results: Path) -> None:
    text = load_script("cpu_tables").shape_table(results)
    for shape in SHAPES:
        assert f"| {shape} | 2 |" in text
    assert "| all, times their count | 4 |" in text
    assert "### tiny, AVX2, 1 threads" in text


def test_peaks_and_picture(results: Path) -> None:
    assert "| copy |" in load_script("cpu_tables").peak_table(results)
    subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "roofline.py"), "--results", str(results)],
        check=True,
    )
    picture = results / "roofline-cpu.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size < 150_000


def test_unet_table_compares_with_the_better_of_ours(tmp_path: Path) -> None:
    run = {"date": "2026-01-02 03:04", "device": "a chip", "isa": "native", "threads": "2"}
    run |= {"bits": "4", "commit": "abc", "torch": "2.0", "version_openvino": "1.2"}
    medians = {
        "torch-fp32": 4.0,
        "ptq4adm-static": 1.0,
        "ptq4adm-dynamic": 2.0,
        "openvino-int8": 0.5,
    }
    rows = [
        {
            "model": "m",
            "variant": variant,
            "median_s": median,
            "weights_mb": 1,
            "peak_mb": 2,
            "anonymous_mb": 1,
            "error": 0.1,
        }
        for variant, median in medians.items()
    ]
    save_result(tmp_path, run, {UNET: rows})
    lines = load_script("cpu_tables").unet_table(tmp_path).splitlines()
    cells = {line.split("|")[2].strip(): line.split("|")[3:6] for line in lines[2:6]}
    assert [c.strip() for c in cells["openvino-int8"]] == ["0.500 s", "8.00", "0.50"]
    assert [c.strip() for c in cells["ptq4adm-dynamic"]] == ["2.000 s", "2.00", "2.00"]
    assert "openvino 1.2" in lines[-1]


def test_without_rows_the_tables_say_so(tmp_path: Path) -> None:
    tables = load_script("cpu_tables")
    for make in (tables.kernel_table, tables.shape_table, tables.peak_table, tables.unet_table):
        assert make(tmp_path) == tables.NOT_MEASURED
