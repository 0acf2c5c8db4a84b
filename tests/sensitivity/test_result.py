"""The JSON file: what is written is read, and what is broken is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

from ptq4adm.errors import CalibrationError, CalibrationMismatchError, OutputError
from ptq4adm.sensitivity import LayerSensitivity, ParetoPoint, Sensitivity

LAYER = LayerSensitivity(
    "a", 12, {"w4a8": 6, "w8a8": 12, "float": 24}, {"w4a8": 0.01, "w8a8": 1e-4}
)
FULL = Sensitivity("f" * 64, 8, 44, 20, (LAYER,), {"a": "w8a8"}, (ParetoPoint(26, 26 / 44, 0.01),))


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    for i, given in enumerate((FULL, Sensitivity("f" * 64, 8, 44, 20, (LAYER,)))):
        given.save(tmp_path / f"new{i}" / "s.json")
        assert Sensitivity.load(tmp_path / f"new{i}" / "s.json") == given
        assert [p.name for p in (tmp_path / f"new{i}").iterdir()] == ["s.json"]


def test_the_file_has_the_documented_keys(tmp_path: Path) -> None:
    FULL.save(tmp_path / "s.json")
    content = json.loads((tmp_path / "s.json").read_text())
    assert content["format"] == "ptq4adm-sensitivity"
    assert content["format_version"] == 1
    assert content["layers"] == [
        {
            "name": "a",
            "parameters": 12,
            "bytes": {"w4a8": 6, "w8a8": 12, "float": 24},
            "error": {"w4a8": 0.01, "w8a8": 1e-4},
        }
    ]
    assert content["chosen"] == {"a": "w8a8"}
    assert content["pareto"] == [{"bytes": 26, "size_ratio": 26 / 44, "error": 0.01}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "ptq4adm-other"}, "ptq4adm-other 1, this version reads"),
        ({"format_version": 2}, "sensitivity 2, this version reads"),
        ({"layers": [{"name": "a"}]}, "no sensitivity"),
        ({"layers": 3}, "no sensitivity"),
        ({"pairs": "many"}, "no sensitivity"),
        ({"pareto": [{"size": 3}]}, "no sensitivity"),
    ],
)
def test_broken_content_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "s.json"
    path.write_text(json.dumps(FULL.to_dict() | change))
    with pytest.raises(CalibrationError, match=message):
        Sensitivity.load(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_an_error_that_is_no_error_is_refused(tmp_path: Path, value: float) -> None:
    content = FULL.to_dict()
    content["layers"][0]["error"] = {"w4a8": value, "w8a8": 0.0}
    (tmp_path / "s.json").write_text(json.dumps(content))
    with pytest.raises(CalibrationError, match="layer 'a' has errors"):
        Sensitivity.load(tmp_path / "s.json")


def test_missing_cut_and_unwritable_files_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="measure again"):
        Sensitivity.load(tmp_path / "none.json")
    FULL.save(tmp_path / "s.json")
    text = (tmp_path / "s.json").read_text()
    (tmp_path / "s.json").write_text(text[: len(text) // 2])
    with pytest.raises(CalibrationError, match="cut short"):
        Sensitivity.load(tmp_path / "s.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="cannot write the sensitivity"):
        FULL.save(tmp_path / "folder")


def test_another_model_is_refused() -> None:
    with pytest.raises(CalibrationMismatchError, match="measure this model"):
        FULL.check(nn.Linear(2, 2))
