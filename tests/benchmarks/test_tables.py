"""The README's numbers are the rows'."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_readme_tables_are_generated_from_the_rows() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"], check=False
    )
    assert done.returncode == 0, (
        "README.md differs from benchmarks/results: run benchmarks/tables.py"
    )
