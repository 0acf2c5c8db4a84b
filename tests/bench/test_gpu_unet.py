"""Whole steps, rehearsed: a toy UNet, ours in Triton's interpreter."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from ptq4adm.kernels import launch

from ptq4adm.bench import gpu_unet, gpu_unet_models
from ptq4adm.bench.gpu_unet import (
    DYNAMIC,
    EAGER,
    STATIC,
    GpuUNetJob,
    format_unets,
    run_gpu_unets,
)
from ptq4adm.errors import BenchmarkError, ConfigError, MissingComponentError
from ptq4adm.nn import W4A8Conv2d
from ptq4adm.nn.hoist import HoistedForward

interpreted = pytest.mark.skipif(
    not launch.IS_INTERPRETED, reason="rehearsals run in Triton's interpreter"
)
JOB = GpuUNetJob(variants=(STATIC, DYNAMIC), rounds=1, is_rehearsal=True)


@interpreted
def test_every_variant_has_its_row() -> None:
    result = run_gpu_unets(JOB, progress=False)
    rows = {row["variant"]: row for row in result["rows"]}
    assert list(rows) == [EAGER, STATIC, DYNAMIC]
    assert rows[EAGER]["error"] == 0.0
    for name in (STATIC, DYNAMIC):
        assert 0 < rows[name]["error"] < 0.4  # it really is quantized
        assert rows[name]["weights_mb"] < rows[EAGER]["weights_mb"]
        assert rows[name]["ms"] > 0
    assert "w4a8-static-graph" in format_unets(result)


@interpreted
def test_all_get_the_same_constant_work_and_ours_the_asked_scales(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = {}
    make = gpu_unet_models.StepModels._prepare

    def spy(self: gpu_unet_models.StepModels, unet: torch.nn.Module) -> torch.nn.Module:
        made = make(self, unet)
        hoisted = [type(m.__dict__.get("forward")) is HoistedForward for m in made.modules()]
        scales = {m.is_static for m in made.modules() if isinstance(m, W4A8Conv2d)}
        seen[len(seen)] = (sum(hoisted), scales)
        return made

    monkeypatch.setattr(gpu_unet_models.StepModels, "_prepare", spy)
    run_gpu_unets(JOB, progress=False)
    counts, scales = zip(*seen.values(), strict=True)
    assert len(set(counts)) == 1
    assert counts[0] > 3
    assert scales == (set(), {True}, {False})


@interpreted
def test_a_wrong_output_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu_unet.TOLERANCES, STATIC, 1e-6)
    monkeypatch.setattr(gpu_unet, "_seconds", lambda *_: pytest.fail("timed"))
    with pytest.raises(BenchmarkError, match="w4a8-static-graph of toy: relative error"):
        run_gpu_unets(JOB, progress=False)


def test_without_diffusers_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingComponentError, match="pip install diffusers"):
        run_gpu_unets(JOB, progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": ("x",)}, "model 'x'"),
        ({"variants": ("y",)}, "variant 'y'"),
        ({"rounds": 0}, "rounds = 0"),
    ],
    ids=str,
)
def test_wrong_jobs_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GpuUNetJob(**change)
