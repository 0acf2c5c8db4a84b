"""Whole steps, on a small UNet and with processes replaced by calls; and the process protocol."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ptq4adm.bench import shapes, unet, unet_process
from ptq4adm.bench.process import AVX2, NATIVE, Worker, is_restricted
from ptq4adm.bench.unet import DYNAMIC, FLOAT, STATIC, TOLERANCES, UNetJob, run_unet
from ptq4adm.bench.worker import REQUESTS
from ptq4adm.errors import BenchmarkError, ConfigError
from ptq4adm.nn import W4A8Conv2d
from ptq4adm.ops import cpu

needs_module = pytest.mark.skipif(
    cpu.unavailable_reason() is not None, reason="the compiled module is not built"
)


def tiny_unet(device: str) -> nn.Module:
    from diffusers import UNet2DConditionModel

    with torch.device(device):
        model: nn.Module = UNet2DConditionModel(
            sample_size=8,
            in_channels=8,
            out_channels=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(32, 64),
            layers_per_block=1,
            attention_head_dim=2,
            cross_attention_dim=1024,
        )
    return model.requires_grad_(False).eval()


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = shapes.ModelSpec(tiny_unet, (8, 16, 8), 5)
    monkeypatch.setitem(shapes.MODELS, "tiny", spec)
    # a worker's libraries start with the whole machine: tests keep to one thread
    monkeypatch.setattr(unet_process, "_open", [])


class CallingWorker:
    """`process.Worker` without a process: every worker keeps its own variant."""

    def __init__(self, isa: str) -> None:
        self.isa = isa
        self.opened: list[Any] = []

    def ask(self, do: str, **arguments: Any) -> Any:
        unet_process._open[:] = self.opened
        answer = REQUESTS[do](**arguments)
        self.opened = list(unet_process._open)
        return answer

    def __enter__(self) -> CallingWorker:
        return self

    def __exit__(self, *_: object) -> None:
        self.opened.clear()


@needs_module
def test_every_variant_that_can_run_has_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unet, "Worker", CallingWorker)
    monkeypatch.setattr(unet, "_REST_SECONDS", 0.0)
    result = run_unet(UNetJob("tiny", rounds=2), progress=False)
    rows = {row["variant"]: row for row in result["rows"]}
    assert set(rows) | set(result["missing"]) == set(TOLERANCES)
    assert {FLOAT, STATIC, DYNAMIC} <= set(rows)
    for row in rows.values():
        assert row["samples"] == 2
        assert row["median_s"] > 0
        assert row["peak_mb"] >= 0.9 * row["resident_mb"] > row["anonymous_mb"] / 2 > 0
    assert rows[FLOAT]["error"] == 0.0
    assert rows[STATIC]["error"] > 0.0  # it really is quantized
    assert rows[STATIC]["weights_mb"] < 0.4 * rows[FLOAT]["weights_mb"]
    assert "tiny, one step" in unet.format_unet(result)


@needs_module
def test_static_scales_are_static(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[nn.Module] = []
    step = unet_process._torch_step

    def remember(model: nn.Module, name: str) -> Any:
        seen.append(model)
        return step(model, name)

    monkeypatch.setattr(unet_process, "_torch_step", remember)
    for variant, is_static in ((STATIC, True), (DYNAMIC, False)):
        unet_process.open_unet("tiny", variant, bits=4, threads=1, isa=NATIVE, folder="")
        layers = [m for m in seen[-1].modules() if isinstance(m, W4A8Conv2d)]
        assert layers
        assert {layer.is_static for layer in layers} == {is_static}


def test_a_wrong_output_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(CallingWorker):
        def ask(self, do: str, **arguments: Any) -> Any:
            assert do != "time_step", "timed in spite of its output"
            answer = super().ask(do, **arguments)
            if do == "save_step" and DYNAMIC in arguments["path"]:
                torch.save(2 * torch.load(arguments["path"]), arguments["path"])
            return answer

    monkeypatch.setattr(unet, "Worker", Wrong)
    with pytest.raises(BenchmarkError, match="ptq4adm-dynamic of tiny: relative error 1"):
        run_unet(UNetJob("tiny", variants=(FLOAT, DYNAMIC)), progress=False)


def test_preparing_hooks_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[str] = []
    monkeypatch.setitem(unet_process.PREPARE, FLOAT, lambda _, model: prepared.append(model))
    unet_process.open_unet("tiny", FLOAT, bits=4, threads=1, isa=NATIVE, folder="")
    assert prepared == ["tiny"]


@needs_module
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "x"}, "model 'x'"),
        ({"variants": ("y", FLOAT)}, "variant 'y'"),
        ({"variants": (STATIC,)}, FLOAT),
        ({"isa": "sse"}, "isa 'sse'"),
        ({"bits": 5}, "bits 5"),
        ({"rounds": 0}, "rounds = 0"),
    ],
    ids=str,
)
def test_wrong_jobs_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        UNetJob(**{"model": "tiny", **change})


def test_a_worker_has_the_environment_and_passes_errors_on() -> None:
    assert is_restricted(NATIVE)
    assert not is_restricted(AVX2)
    with Worker(AVX2) as worker:
        with pytest.raises(BenchmarkError, match="no UNet is open"):
            worker.ask("time_step")
        # it goes on after an error
        with pytest.raises(BenchmarkError, match="'audioldm-x' is unknown"):
            worker.ask("kernels", job={"models": ["audioldm-x"]}, progress=False)


def test_a_worker_that_dies_is_an_error() -> None:
    with Worker(NATIVE) as worker:
        worker._process.kill()
        worker._process.wait()
        with pytest.raises(BenchmarkError, match="ended with code -9"):
            worker.ask("memory")


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ConfigError, match="isa 'neon'"):
        Worker("neon")
