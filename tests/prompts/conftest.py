"""The benchmark script that scores the tagger and the grammar: the tests hold floors under it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "bench_prompt_reading.py"


@pytest.fixture(scope="session")
def reading() -> ModuleType:
    """`benchmarks/bench_prompt_reading.py` as a module."""
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
