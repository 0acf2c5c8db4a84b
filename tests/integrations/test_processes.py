"""Two processes give what one gives, bit for bit; a failure of one is known to both."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ptq4adm
from ptq4adm import Calibration, TextToAudioPipeline
from ptq4adm.calibration.merge import merge_calibrations
from ptq4adm.errors import (
    CalibrationError,
    CalibrationMismatchError,
    ConfigError,
    DependencyError,
    PromptError,
)
from ptq4adm.models import find_adapter
from ptq4adm.protocols import SamplingDefaults
from ptq4adm.quant.observers import HistogramObserver

SCRIPT = Path(__file__).parent / "process_script.py"
PROMPTS = ["a dog barks", "a bell rings", "rain falls", "a door slams", "a bird sings"]


@pytest.fixture(scope="module")
def outputs(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote: three batches of two, two and one prompts."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "LOCAL_WORLD_SIZE": "2"}
    running = [
        subprocess.Popen(
            [sys.executable, "-P", str(SCRIPT), str(tiny_pipeline), str(folder)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=240)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
    return folder


def test_a_calibration_does_not_depend_on_the_number_of_processes(
    outputs: Path, float_pipe: TextToAudioPipeline
) -> None:
    alone = ptq4adm.calibrate(float_pipe, PROMPTS, steps=2, seed=3, batch=2, progress=False)
    for rank in range(2):
        found = Calibration.load(outputs / f"{rank}.calibration")
        assert found.meta == alone.meta
        assert found.digest() == alone.digest()


def test_clips_do_not_either(outputs: Path, float_pipe: TextToAudioPipeline) -> None:
    expected = torch.cat(
        [float_pipe(PROMPTS[i : i + 2], steps=2, seed=3 + i) for i in range(0, len(PROMPTS), 2)]
    )
    for rank in range(2):
        assert torch.equal(torch.load(outputs / f"{rank}.pt"), expected)


def test_each_process_says_why_there_is_no_result(outputs: Path) -> None:
    assert (outputs / "1.error").read_text().startswith("NonFiniteError: latents")
    first = (outputs / "0.error").read_text()
    assert first.startswith("ProcessError: process 1 of 2 failed: NonFiniteError: latents")


def test_one_process_needs_no_group(float_pipe: TextToAudioPipeline) -> None:
    alone = ptq4adm.calibrate(float_pipe, PROMPTS, steps=1, progress=False)
    found = ptq4adm.calibrate_in_processes(float_pipe, PROMPTS, steps=1, progress=False)
    assert found.digest() == alone.digest()
    clips = ptq4adm.generate_in_processes(float_pipe, PROMPTS[:2], steps=1, seed=5)
    assert torch.equal(clips, float_pipe(PROMPTS[:2], steps=1, seed=5))


def test_a_module_is_calibrated_with_its_adapter(float_pipe: TextToAudioPipeline) -> None:
    def run(unet: nn.Module, prompts: Sequence[str], **options: Any) -> Tensor:
        assert unet is float_pipe.unet
        return find_adapter(float_pipe).run(float_pipe, prompts, **options)

    adapter = ptq4adm.ModuleAdapter(run=run, defaults=SamplingDefaults(steps=1, guidance=2.5))
    options: dict[str, Any] = {"adapter": adapter, "seed": 3, "progress": False}
    alone = ptq4adm.calibrate(float_pipe.unet, PROMPTS, **options)
    found = ptq4adm.calibrate_in_processes(float_pipe.unet, PROMPTS, **options)
    assert found.meta == alone.meta
    assert found.digest() == alone.digest()


@pytest.mark.parametrize(
    "choice", [{"strategy": "random"}, {"size": 3}, {"inputs": "inputs.safetensors"}]
)
def test_a_choice_of_pairs_is_of_one_process(
    float_pipe: TextToAudioPipeline, choice: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=r"calibrate in one process"):
        ptq4adm.calibrate_in_processes(float_pipe, PROMPTS, **choice)


def test_an_unknown_argument_is_refused_by_every_process(
    float_pipe: TextToAudioPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    # before anything is dealt out: a process without prompts would wait for the others
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(TypeError, match="step"):
        ptq4adm.calibrate_in_processes(float_pipe, PROMPTS, step=1)


@pytest.mark.parametrize("batch", [0, True, 1.5])
def test_a_batch_is_a_positive_number(float_pipe: TextToAudioPipeline, batch: int) -> None:
    with pytest.raises(ConfigError, match="batch: got"):
        ptq4adm.generate_in_processes(float_pipe, PROMPTS, batch=batch)


def test_no_prompt_and_no_accelerate_are_refused(
    float_pipe: TextToAudioPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PromptError):
        ptq4adm.generate_in_processes(float_pipe, [])
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(DependencyError, match="pip install accelerate"):
        ptq4adm.generate_in_processes(float_pipe, PROMPTS)


# --- merging -------------------------------------------------------------------------------------


def test_histograms_add_up_exactly_in_any_order() -> None:
    inputs = [torch.randn(500) * scale for scale in (1e-3, 1.0, 37.0, 0.0)]
    whole = HistogramObserver(2)
    parts = []
    for i, x in enumerate(inputs):
        whole.observe(x, i % 2)
        part = HistogramObserver(2)
        part.observe(x, i % 2)
        parts.append(part.record())
    for order in (parts, parts[::-1]):
        merged = HistogramObserver.from_record(order[0])
        for record in order[1:]:
            merged.add(record)
        for name in ("counts", "exponent", "minimum", "maximum"):
            assert torch.equal(getattr(merged, name), getattr(whole, name))


def test_only_calibrations_of_one_kind_are_merged(calibration: Calibration) -> None:
    with pytest.raises(CalibrationError, match="got none"):
        merge_calibrations([], prompts_hash="", seed=0)
    other = Calibration(replace(calibration.meta, guidance=1.0), calibration.records)
    with pytest.raises(CalibrationMismatchError, match="calibrate all parts alike"):
        merge_calibrations([calibration, other], prompts_hash="", seed=0)
    twice = merge_calibrations([calibration, calibration], prompts_hash="both", seed=9)
    assert twice.meta.prompt_count == 2 * calibration.meta.prompt_count
    name = next(iter(twice.records))
    assert torch.equal(twice.records[name][0].counts, 2 * calibration.records[name][0].counts)
