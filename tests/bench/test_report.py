from __future__ import annotations

from pathlib import Path

import pytest

from ptq4adm.bench.ours import OURS, QUANTIZE
from ptq4adm.bench.report import format_result, group_ratios, step_milliseconds
from ptq4adm.bench.rows import read_rows
from ptq4adm.bench.store import KERNELS, PEAKS, RUNS, UNET, read_table, save_result

RUN = {"date": "2026-01-02 03:04", "device": "a chip", "isa": "avx2", "threads": "2", "bits": "4"}


def row(shape: str, kind: str, M: int, variant: str, ms: float, **more: object) -> dict:
    sizes = {"M": M, "N": 10, "K": 100, "median_ms": ms}
    return {
        "model": "m", "count": 1, "kind": kind, "shape": shape, **sizes, "variant": variant,
        "variant_isa": "avx2", **more,
    }  # fmt: skip


ROWS = [
    row("a", "conv3x3", 8, OURS, 2.0, count=3),
    row("a", "conv3x3", 8, QUANTIZE, 0.5, count=3),
    row("a", "conv3x3", 8, "peer", 4.0, count=3),
    row("b", "conv3x3-upsample", 8, OURS, 1.0),
    row("b", "conv3x3-upsample", 8, QUANTIZE, 0.5),
    row("b", "conv3x3-upsample", 8, "peer", 8.0, variant_isa="avx512"),
    row("c", "linear", 512, OURS, 1.0),
    row("c", "linear", 512, QUANTIZE, 0.1),
    row("d", "linear", 511, OURS, 1.0),
    row("d", "linear", 511, QUANTIZE, 0.1),
    row("d", "linear", 511, "peer", 0.5),
]


def test_ratios_by_group() -> None:
    found = {(r["group"], r["peer"]): r for r in group_ratios(ROWS)}
    conv = found["conv 3x3", "peer"]
    assert conv["geometric_mean"] == pytest.approx(4.0)  # of 2 and 8
    assert (conv["least"], conv["greatest"], conv["shapes"]) == (2.0, 8.0, 2)
    assert conv["peer_isa"] == "avx2 avx512"
    assert found["linear, M < 512", "peer"]["least"] == 0.5
    assert ("linear, M >= 512", "peer") not in found  # it lacks that shape


def test_a_shape_of_two_models_counts_once() -> None:
    twice = ROWS + [{**r, "model": "n"} for r in ROWS]
    assert [r["shapes"] for r in group_ratios(twice)] == [r["shapes"] for r in group_ratios(ROWS)]


def test_step_weighs_by_count_and_needs_every_shape() -> None:
    assert step_milliseconds(ROWS, "m", OURS) == 3 * 2.0 + 1.0 + 1.0 + 1.0
    assert step_milliseconds(ROWS, "m", "peer") is None


def test_text_names_what_is_missing() -> None:
    result = {"run": RUN, "rows": ROWS, "peaks": [], "missing": {"openvino": "not installed: pip"}}
    text = format_result(result)
    assert "not measured: openvino: not installed: pip" in text
    assert "4.00 (2.00)" in text
    assert "peer: avx2 avx512" in text


def test_a_run_replaces_its_predecessor_and_nothing_else(tmp_path: Path) -> None:
    peaks = [{"peak": "copy", "threads": 1, "giga_a_second": 3.0}]
    first = save_result(tmp_path, RUN, {KERNELS: ROWS, PEAKS: peaks})
    other_isa = save_result(tmp_path, {**RUN, "isa": "native"}, {KERNELS: ROWS})
    other_model = [{**r, "model": "n"} for r in ROWS]
    later = {**RUN, "date": "2026-01-03 03:04"}
    second = save_result(tmp_path, later, {KERNELS: other_model, PEAKS: peaks})
    assert {r["run"] for r in read_rows(tmp_path / KERNELS)} == {first, other_isa, second}
    assert {r["run"] for r in read_rows(tmp_path / PEAKS)} == {second}
    third = save_result(tmp_path, {**later, "date": "2026-01-04 03:04"}, {KERNELS: ROWS})
    table = read_table(tmp_path, KERNELS)
    assert {(r["run"], r["model"], r["isa"]) for r in table} == {
        (third, "m", "avx2"),
        (other_isa, "m", "native"),
        (second, "n", "avx2"),
    }
    # a run that owns no row any more is forgotten
    assert {r["run"] for r in read_rows(tmp_path / RUNS)} == {third, other_isa, second}
    assert read_table(tmp_path, UNET) == []
