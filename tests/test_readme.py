"""The README's Python example runs as printed, on the small pipeline."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import ptq4adm

ROOT = Path(__file__).resolve().parents[1]


def test_python_example_runs(
    tiny_pipeline: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.setattr(ptq4adm, "shipped_pipeline_path", lambda: tiny_pipeline)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert "mid_block" in capsys.readouterr().out
    assert (tmp_path / "audioldm-tiny-w4a8" / "unet" / "config.json").is_file()
    layers = [type(m).__name__ for m in names["pipe"].unet.modules()]
    assert "W4A8Conv2d" in layers
    assert "W4A8Linear" in layers
    assert names["waveform"].shape == (1, 10240)


def test_commands_exist() -> None:
    from ptq4adm.cli import main

    (block,) = re.findall(
        r"## The same from a shell\n\n```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    commands = {line.split()[1] for line in block.splitlines()}
    assert commands == {"prompts", "quantize", "inspect", "generate", "doctor"}
    for command in commands:
        assert main([command, "--help"]) == 0
