"""The captions that calibration must not use are those of the test split, and the held-out ones."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "training"


def test_the_package_reserves_the_test_captions() -> None:
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        import reserved

        captions = reserved.reserved_captions()
        text = reserved.file_text(captions)
        kept = reserved.OUTPUT.read_text(encoding="utf-8")
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    assert kept == text, "run training/reserved.py"
    assert 800 < len(captions) < 1000
