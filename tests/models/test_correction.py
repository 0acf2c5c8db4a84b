"""The step correction's numbers, application and file."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ptq4adm
from ptq4adm import TextToAudioPipeline
from ptq4adm.errors import CheckpointError, ConfigError, ShapeError
from ptq4adm.models.conditioning import Conditioning
from ptq4adm.models.correction import (
    CORRECTION_FILE,
    GuidedCall,
    StepCorrection,
    read_correction,
)

TIMES = torch.tensor([100.0, 300.0, 700.0], dtype=torch.float64)
SCALE = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
OFFSET = torch.tensor([[0.0, 1.0], [0.5, -1.0], [0.25, 0.0]])
CORRECTION = StepCorrection(TIMES, SCALE, OFFSET, 2.5)


def call(timestep: float) -> GuidedCall:
    conditioning = Conditioning({"x": torch.zeros(1, 1)})
    return GuidedCall(torch.zeros(1, 2, 3, 4), torch.tensor(timestep), conditioning, 2.5)


@pytest.mark.parametrize(
    ("timestep", "scale", "offset"),
    [
        (100, [1, 2], [0, 1]),
        (300, [3, 4], [0.5, -1]),
        (700, [5, 6], [0.25, 0]),
        (0, [1, 2], [0, 1]),
        (999, [5, 6], [0.25, 0]),
        (200, [2, 3], [0.25, 0]),
        (600, [4.5, 5.5], [0.3125, -0.25]),
    ],
)
def test_numbers_are_interpolated_between_steps_and_held_beyond(
    timestep: float, scale: list[float], offset: list[float]
) -> None:
    prediction = torch.randn(3, 2, 3, 4)
    expected = prediction * torch.tensor(scale)[:, None, None] + torch.tensor(offset)[:, None, None]
    torch.testing.assert_close(CORRECTION.correct(prediction, call(timestep)), expected)


def test_one_step_is_for_all_timesteps() -> None:
    single = StepCorrection(TIMES[1:2], SCALE[1:2], OFFSET[1:2], 1.0)
    for timestep in (0, 300, 999):
        assert single.at(timestep)[0].tolist() == [3, 4]


def test_other_channels_and_broken_numbers_are_refused() -> None:
    with pytest.raises(ShapeError, match="of 2 channels"):
        CORRECTION.correct(torch.zeros(1, 8, 2, 2), call(5))
    for times, scale, offset in (
        (TIMES, SCALE[:2], OFFSET),
        (TIMES, SCALE, OFFSET[:, :1]),
        (TIMES[:0], SCALE[:0], OFFSET[:0]),
        (TIMES.flip(0), SCALE, OFFSET),
        (TIMES, SCALE * torch.nan, OFFSET),
    ):
        with pytest.raises(ShapeError, match="step correction"):
            StepCorrection(times, scale, offset, 1.0)


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_correction(tmp_path) is None
    CORRECTION.save(tmp_path)
    found = read_correction(tmp_path)
    assert found is not None
    assert found.guidance == 2.5
    for name in ("timesteps", "scale", "offset"):
        assert torch.equal(getattr(found, name), getattr(CORRECTION, name))


def test_broken_files_are_refused(tmp_path: Path) -> None:
    CORRECTION.save(tmp_path)
    path = tmp_path / CORRECTION_FILE
    content, tensors = path.read_bytes(), load_file(path)
    path.write_bytes(content[:-9])
    with pytest.raises(CheckpointError, match="cut short"):
        read_correction(tmp_path)
    head = {"format": "ptq4adm-step-correction", "format_version": "1", "guidance": "2.5"}
    for change, message in (
        ({"format_version": "2"}, "reads ptq4adm-step-correction 1"),
        ({"guidance": "much"}, "no step correction"),
    ):
        save_file(tensors, path, head | change)
        with pytest.raises(CheckpointError, match=message):
            read_correction(tmp_path)
    save_file(tensors | {"scale": SCALE[:1]}, path, head)
    with pytest.raises(CheckpointError, match="no step correction"):
        read_correction(tmp_path)


def test_a_pipeline_applies_it_after_guidance_and_keeps_it_in_its_folder(
    float_pipe: TextToAudioPipeline, tmp_path: Path
) -> None:
    pipe = copy.copy(float_pipe)
    said = pipe.encode_prompts("a dog barks")
    plain = pipe.denoise(said, steps=2)
    times = torch.tensor([0.0, 999.0], dtype=torch.float64)
    ones, zeros = torch.ones(2, 8), torch.zeros(2, 8)
    pipe.correction = StepCorrection(times, ones, zeros, 2.5)
    assert torch.equal(pipe.denoise(said, steps=2), plain)
    pipe.correction = StepCorrection(times, ones * 0.5, zeros + 0.1, 2.5)
    changed = pipe.denoise(said, steps=2)
    assert not torch.allclose(changed, plain)
    # by hand: the prediction with guidance, then the line, then the sampler
    halved = copy.copy(float_pipe)
    original = float_pipe.predict
    halved.predict = lambda c: original(c) * 0.5 + 0.1  # type: ignore[method-assign]
    torch.testing.assert_close(halved.denoise(said, steps=2), changed)
    ptq4adm.save_pipeline(pipe, tmp_path / "out")
    again = ptq4adm.load_pipeline(tmp_path / "out")
    assert torch.equal(again.denoise(said, steps=2), changed)


def test_another_guidance_than_it_was_fitted_at_is_told(float_pipe: TextToAudioPipeline) -> None:
    pipe = copy.copy(float_pipe)
    said = pipe.encode_prompts("a dog barks")
    pipe.correction = StepCorrection(TIMES, torch.ones(3, 8), torch.zeros(3, 8), 2.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.denoise(said, steps=1, guidance=2.5)
    with pytest.warns(UserWarning, match="fitted at guidance 2.5, and used at 3,"):
        pipe.denoise(said, steps=1, guidance=3.0)


def test_a_correction_without_a_file_format_is_not_dropped_unsaid(
    float_pipe: TextToAudioPipeline, tmp_path: Path
) -> None:
    class Other:
        def correct(self, prediction: torch.Tensor, call: GuidedCall) -> torch.Tensor:
            return prediction * call.guidance

    pipe = copy.copy(float_pipe)
    pipe.correction = Other()
    with pytest.raises(ConfigError, match="got Other, which has no file format"):
        ptq4adm.save_pipeline(pipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
