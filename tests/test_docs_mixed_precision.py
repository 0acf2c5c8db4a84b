"""The example of docs/mixed-precision.md runs as printed, on the small pipeline."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest

import ptq4adm

ROOT = Path(__file__).resolve().parents[1]


def test_example_runs(tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "mixed-precision.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.setattr(ptq4adm, "shipped_pipeline_path", lambda: tiny_pipeline)
    # one pair, fewer layers, no search of weight scales: the claim is that the calls fit together
    measure = functools.partial(ptq4adm.measure_sensitivity, pairs=1)
    monkeypatch.setattr(ptq4adm, "measure_sensitivity", measure)
    config = functools.partial(
        ptq4adm.QuantConfig, weight_observer="absmax", overrides={"*.attentions.*": "w4a8"}
    )
    monkeypatch.setattr(ptq4adm, "QuantConfig", config)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    # norms and embeddings are more of the small model than of a real one
    exec(compile(code.replace("0.30", "0.40"), "docs/mixed-precision.md", "exec"), names)
    assert len(set(names["chosen"].values())) > 1
    assert names["pipe"].correction is not None
