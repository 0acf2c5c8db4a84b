"""No family's UNet is larger than promised, by its plan and in the newest measured rows."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

import ptq4adm
from ptq4adm.bench.rows import read_rows

ROOT = Path(__file__).resolve().parents[2]
# of float16, for the UNet in W4A8
LIMITS = {
    "audioldm-s": 0.30,
    "audioldm-m": 0.30,
    "audioldm-l": 0.30,
    "tango": 0.29,
    "make-an-audio": 0.31,
}


def _script() -> ModuleType:
    path = ROOT / "benchmarks" / "bench_size.py"
    spec = importlib.util.spec_from_file_location("bench_size", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", LIMITS)
def test_sizes_are_within_their_limits(name: str) -> None:
    script = _script()
    assert script.LIMITS == LIMITS
    family, spec = script.MODELS[name]
    unet = spec.build("meta")
    plan = ptq4adm.plan(unet, script.config_of(family, unet))
    assert plan.bytes_after <= LIMITS[name] * plan.bytes_before
    row = [r for r in read_rows(ROOT / "benchmarks/results/size.csv") if r["model"] == name][-1]
    for column in ("disk_mb", "resident_mb"):
        measured = float(row[column])
        assert measured <= LIMITS[name] * float(row["fp16_mb"])
    assert measured * 1e6 == pytest.approx(plan.bytes_after, rel=0.01)
