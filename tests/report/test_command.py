"""`ptq4adm report`: the page it writes, what it says, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ptq4adm.cli import main


def test_report_writes_one_page_and_says_its_size(
    tiny_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    command = ["report", str(out), str(tiny_pipeline), "--clips", "2", "--steps", "1", "--json"]
    assert main([*command, "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["path"] == str(out)
    assert found["megabytes"] == round(out.stat().st_size / 1e6, 3)
    assert found["sizes"]["W4A8"] < found["sizes"]["W8A8"] < found["sizes"]["float16"]
    assert out.read_text().count("<audio") == 6
    # refused before anything is computed
    assert main([*command, "--quiet"]) == 1
    assert "--overwrite" in capsys.readouterr().err
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    assert main([*command, "--overwrite", "--evaluation", str(broken)]) == 1
    assert "not a ptq4adm-evaluation file" in capsys.readouterr().err
