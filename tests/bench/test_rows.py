from __future__ import annotations

from pathlib import Path

import pytest

from ptq4adm.bench import append_rows, environment, read_rows
from ptq4adm.errors import OutputError


def test_rows_come_back_and_new_columns_widen_the_header(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.csv"
    append_rows(path, [{"a": 1, "b": 2.5}])
    append_rows(path, [{"a": 3, "c": "x,y"}])
    assert read_rows(path) == [{"a": "1", "b": "2.5", "c": ""}, {"a": "3", "b": "", "c": "x,y"}]
    assert [p.name for p in path.parent.iterdir()] == ["rows.csv"]


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OutputError, match=r"file/rows\.csv"):
        append_rows(tmp_path / "file" / "rows.csv", [{"a": 1}])


def test_environment_names_the_commit_of_a_checkout_and_none_elsewhere(tmp_path: Path) -> None:
    here = environment(Path(__file__).parent)
    assert here["device"]
    assert here["torch"]
    assert environment(tmp_path)["commit"] == ""
