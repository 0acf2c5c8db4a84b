"""The comparison's table from rows of known numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from scripts import load_script

from ptq4adm.bench import append_rows

for imported in ("cpu_tables", "eval_variants"):
    load_script(imported)
eval_tables = load_script("eval_tables")
ABOUT = {"group": "baseline", "clips": 300, "embedding": "musicnn-MTT", "device": "a CPU"}
ABOUT |= {"date": "2026-01-02", "made_by": "abc", "unet_mb": 20.0, "seconds": 0.0}
ABOUT |= {"fd": 2.0, "right_class": 0.5}


def _float(seed: int, **other: Any) -> dict[str, Any]:
    return ABOUT | {"variant": "float", "seed": seed} | other


def _quantized(seed: int, **other: Any) -> dict[str, Any]:
    found = {"variant": "W4A8", "seed": seed, "unet_mb": 6.0, "seconds": 90.0, "fd_increase": 0.01}
    found |= {"fd_to_float": 0.25, "sqnr_median_db": 20.0, "sqnr_min_db": 12.0}
    return ABOUT | found | {"mel_median_db": 1.5} | other


def _lines(results: Path, rows: list[dict[str, Any]]) -> list[list[str]]:
    append_rows(results / "quality-eval.csv", rows)
    table = eval_tables.comparison(results, ["baseline"]).splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[2:4]]


def test_a_line_is_the_mean_of_the_newest_rows_of_every_seed(tmp_path: Path) -> None:
    rows = [_float(0), _float(1, fd=4.0), _quantized(0, fd=9.0), _quantized(0)]
    rows.append(_quantized(1, fd=3.0, fd_increase=-0.03, sqnr_median_db=22.0, sqnr_min_db=11.0))
    base, quantized = _lines(tmp_path, rows)
    assert base == ["float", "1.000", "3.00 (2.00 to 4.00)", "", "", "50.0%", "", "", ""]
    assert quantized[:4] == ["W4A8", "0.300", "2.50 (2.00 to 3.00)", "-1.0% (-3.0% to +1.0%)"]
    assert quantized[4:] == ["0.25 (0.25 to 0.25)", "50.0%", "21.0 (11.0)", "1.50", "1.5"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([_float(0), _quantized(0, clips=20)], "rows of 20 and of 300 clips do not compare"),
        ([_quantized(0)], "no rows of the float model"),
    ],
)
def test_rows_that_do_not_compare_make_no_table(
    rows: list[dict[str, Any]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=message):
        _lines(tmp_path, rows)


def test_embeddings_stand_side_by_side_for_variants_that_have_them(tmp_path: Path) -> None:
    rows = [_float(0), _quantized(0), _quantized(0, variant="another")]
    rows += [row | {"embedding": "cdpam", "fd": 0.5, "fd_to_float": 0.125} for row in rows[:2]]
    append_rows(tmp_path / "quality-eval.csv", rows)
    head, _, *lines, _, note = eval_tables.embeddings_table(tmp_path).splitlines()
    assert head.count("FD to float") == 2
    assert head.index("musicnn-MTT: FD") < head.index("cdpam: FD")
    assert [line.split("|")[1].strip() for line in lines] == ["float", "W4A8"]
    assert lines[1].count("+1.0%") == 2 * 3
    assert "0.50 (0.50 to 0.50) | +1.0% (+1.0% to +1.0%) | 0.12 (0.12 to 0.12)" in lines[1]
    assert "300 clips a variant and seed, 1 seeds" in note


def test_one_embedding_makes_no_table_of_embeddings(tmp_path: Path) -> None:
    append_rows(tmp_path / "quality-eval.csv", [_float(0), _quantized(0)])
    assert eval_tables.embeddings_table(tmp_path) == eval_tables.NOT_MEASURED
