"""docs/diffusers.md: its examples run as printed, one after the other, on small pipelines."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from tiny_audioldm2 import make_tiny_audioldm2
from torch import nn

from ptq4adm.packing.checkpoint import is_quantized

PAGE = Path(__file__).resolve().parents[1] / "docs" / "diffusers.md"


def test_its_examples_run(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(examples) == 10
    monkeypatch.chdir(tmp_path)
    (tmp_path / "audioldm").symlink_to(tiny_pipeline)
    make_tiny_audioldm2(tmp_path / "audioldm2")
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i, example in enumerate(examples):
            exec(compile(example, f"docs/diffusers.md, example {i + 1}", "exec"), names)
            if i == 0:
                assert is_quantized(names["unet"])
    assert isinstance(names["compiled"], nn.Module)
    assert names["trained"]
    assert names["card"] == (tmp_path / "audioldm2-w4a8" / "README.md").read_text()
    assert names["clips"].shape[0] == 2
    for example in examples:
        assert len([line for line in example.splitlines() if line.strip()]) <= 15
