"""The example of docs/evaluation.md runs as printed, on the small pipeline."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import ptq4adm
from ptq4adm.evaluation.embeddings import NAMES

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")


def test_the_example_runs(tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    monkeypatch.setattr(ptq4adm, "shipped_pipeline_path", lambda: tiny_pipeline)
    names: dict[str, Any] = {}
    exec(compile(example, "docs/evaluation.md", "exec"), names)
    assert names["result"].clips == 8
    steps = names["pipe"].defaults.steps
    assert names["steps"].shape[:2] == (steps, 8)


def test_every_embedding_and_figure_is_in_the_tables() -> None:
    for name in (*NAMES, "frechet_distance", "frechet_distance_infinity", "kernel_distance"):
        assert f"`{name}`" in TEXT
