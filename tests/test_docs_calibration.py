"""The examples of docs/calibration.md run as printed, on the small pipeline."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import ptq4adm

ROOT = Path(__file__).resolve().parents[1]


def test_examples_run(tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "calibration.md").read_text()
    first, second = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.setattr(ptq4adm, "shipped_pipeline_path", lambda: tiny_pipeline)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    # the float model again: the first example quantizes its own
    exec(compile(first, "docs/calibration.md", "exec"), names)
    assert (tmp_path / "inputs.safetensors").is_file()
    names["pipe"] = ptq4adm.load_pipeline(tiny_pipeline)
    exec(compile(second, "docs/calibration.md", "exec"), names)
    assert len(names["calibration"].selection.pairs) == 64
