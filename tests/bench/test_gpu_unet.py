"""Whole steps, rehearsed: a toy UNet, ours in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch

from ptq4adm.bench import gpu_unet, gpu_unet_models
from ptq4adm.bench.gpu_backends import Backends
from ptq4adm.bench.gpu_faults import exit_code
from ptq4adm.bench.gpu_processes import run_processes
from ptq4adm.bench.gpu_unet import (
    DYNAMIC,
    EAGER,
    STATIC,
    GpuUNetJob,
    measure_model,
    run_gpu_unets,
)
from ptq4adm.bench.gpu_unet_models import StepModels
from ptq4adm.bench.gpu_unet_report import format_unets
from ptq4adm.errors import ConfigError, MissingComponentError
from ptq4adm.kernels import launch
from ptq4adm.nn import W4A8Conv2d
from ptq4adm.nn.forwards import is_hoisted
from ptq4adm.nn.hoist import HoistedForward

interpreted = pytest.mark.skipif(
    not launch.IS_INTERPRETED, reason="rehearsals run in Triton's interpreter"
)
JOB = GpuUNetJob(variants=(STATIC, DYNAMIC), rounds=1, backends=("triton",), is_rehearsal=True)
TRITON = Backends(("triton",))


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
def test_a_wrong_output_is_a_row_without_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu_unet.TOLERANCES, STATIC, 1e-6)
    saved: list[dict[str, Any]] = []
    job = replace(JOB, variants=(STATIC,))
    result = run_gpu_unets(job, progress=False, save=lambda _, tables: saved.append(tables))
    rows = {row["variant"]: row for row in result["rows"]}
    assert "w4a8-static-graph triton of toy: relative error" in rows[STATIC]["failed"]
    assert "ms" not in rows[STATIC]
    assert rows[EAGER]["ms"] > 0
    assert saved == [{"gpu-unet.csv": result["rows"]}]
    assert exit_code(result) == 1
    assert "FAILED: toy w4a8-static-graph triton" in format_unets(result)


def test_a_model_that_cannot_be_made_does_not_stop_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu_unet, "StepModels", no_memory)
    rows, missing = measure_model(JOB, "toy", torch.device("cpu"), TRITON)
    assert [(row["variant"], "out of memory" in row["failed"]) for row in rows] == [(EAGER, True)]
    assert missing == {}


@interpreted
def test_without_the_time_of_the_longest_model_the_next_is_not_begun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def measure(_: object, model: str, *__: object) -> Any:
        time.sleep(0.2)
        return [{"model": model, "variant": EAGER, "failed": "x"}], {}

    monkeypatch.setattr(gpu_unet, "measure_model", measure)
    monkeypatch.setattr(gpu_unet, "TOY_MODEL", "toy")
    monkeypatch.setattr(gpu_unet, "find_device", lambda **_: torch.device("cpu"))
    job = GpuUNetJob(models=("tango", "audioldm-s"), deadline=0.3)
    result = run_gpu_unets(job, progress=False)
    assert [row["model"] for row in result["rows"]] == ["tango"]
    assert result["left_out"] == ["audioldm-s"]


def test_the_compiled_model_has_the_kept_results_and_no_hooks() -> None:
    with ExitStack() as stack:
        unets = StepModels("toy", torch.device("cpu"), stack)
        half = unets.half()
        hoisted = sum(map(is_hoisted, half.modules()))
        plain, kept = unets.constant_half()
        assert kept == hoisted > 3
        assert sum(map(is_hoisted, half.modules())) == hoisted  # the other is as it was
        for module in plain.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
            assert "forward" not in module.__dict__
        with torch.no_grad():
            expected = unets.call(half)
            assert unets.call(plain).equal(expected)
            # what the copy is for: the compiler does not have to leave its graph
            compiled = torch.compile(plain, backend="eager", fullgraph=True)
            assert unets.call(compiled).equal(expected)


@interpreted
def test_a_step_that_fails_while_it_is_timed_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = gpu_unet.step_seconds
    calls: list[int] = []

    def breaks_later(run: Any, device: torch.device) -> float:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no memory")
        return seconds(run, device)

    monkeypatch.setattr(gpu_unet, "step_seconds", breaks_later)
    rows, _ = measure_model(replace(JOB, variants=(DYNAMIC,)), "toy", torch.device("cpu"), TRITON)
    by_name = {row["variant"]: row for row in rows}
    assert by_name[DYNAMIC]["failed"] == "RuntimeError: no memory"
    assert by_name[EAGER]["ms"] > 0


def test_processes_are_ended_at_the_deadline() -> None:
    began = time.perf_counter()
    tasks = {"short": (0.0,), "long": (60.0,), "wrong": ("x",)}
    unfinished = run_processes(time.sleep, tasks, seconds=4.0)
    assert time.perf_counter() - began < 30
    assert "long: ended after 4 s" in unfinished
    assert [reason.split(":")[0] for reason in unfinished] == ["long", "wrong"]


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
