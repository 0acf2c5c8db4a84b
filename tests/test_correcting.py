"""Fitting the step correction."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import ptq4adm
from ptq4adm import TextToAudioPipeline
from ptq4adm.correcting import fit_line
from ptq4adm.errors import ConfigError, PromptError
from ptq4adm.models.correction import GuidedCall, StepCorrection

PROMPTS = ["a dog barks", "a bell rings", "rain falls", "wind blows"]


def test_a_line_is_that_of_least_squares() -> None:
    found = torch.randn(3, 5, 4, 2)
    wanted = 0.7 * found + torch.randn(5)[:, None, None] + 0.1 * torch.randn_like(found)
    found[:, 4] = 0.25  # a constant channel has no slope
    scale, offset = fit_line(found, wanted)
    for c in range(4):
        x = found[:, c].flatten().double()
        design = torch.stack([x, torch.ones_like(x)], dim=1)
        expected = torch.linalg.lstsq(design, wanted[:, c].flatten().double()).solution
        torch.testing.assert_close(torch.stack([scale[c], offset[c]]), expected)
    assert float(scale[4]) == 1.0
    torch.testing.assert_close(offset[4], wanted[:, 4].double().mean() - 0.25)


class _Spoiled:
    """Changes every prediction by a line of its own."""

    def correct(self, prediction: torch.Tensor, call: GuidedCall) -> torch.Tensor:
        return prediction * 1.25 - 0.1 * float(call.timestep) / 1000


def test_a_planted_line_is_found_and_undone(
    float_pipe: TextToAudioPipeline,
    quantized: TextToAudioPipeline,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # both halves of the comparison are the quantized model: only the planted line is between them
    original = quantized.predict
    spoiled = copy.copy(quantized)
    spoil = _Spoiled()
    monkeypatch.setattr(
        type(quantized),
        "predict",
        lambda self, call: (
            spoil.correct(original(call), call) if self.unet is quantized.unet else original(call)
        ),
    )
    found = ptq4adm.fit_correction(spoiled, float_pipe, PROMPTS, steps=3, progress=False)
    assert len(found.timesteps) == 3
    torch.testing.assert_close(found.scale, torch.full((3, 8), 0.8))
    expected = (0.1 * found.timesteps / 1000 * 0.8).float()[:, None].expand(3, 8)
    torch.testing.assert_close(found.offset, expected, rtol=1e-3, atol=1e-5)


def test_a_fit_changes_neither_pipeline_and_is_repeatable(
    float_pipe: TextToAudioPipeline, quantized: TextToAudioPipeline
) -> None:
    def fit() -> StepCorrection:
        return ptq4adm.fit_correction(quantized, float_pipe, PROMPTS, steps=2, progress=False)

    first, second = fit(), fit()
    assert quantized.correction is None
    assert float_pipe.correction is None
    assert float_pipe.scheduler is not None
    assert torch.equal(first.scale, second.scale)
    assert torch.equal(first.offset, second.offset)
    assert first.guidance == quantized.defaults.guidance
    assert first.timesteps.tolist() == sorted(first.timesteps.tolist())


def test_an_applied_correction_lessens_the_error_of_the_prompts_it_was_fitted_on(
    float_pipe: TextToAudioPipeline, quantized: TextToAudioPipeline, tmp_path: Path
) -> None:
    said = float_pipe.encode_prompts(PROMPTS)
    wanted = float_pipe.denoise(said, steps=1)
    corrected = copy.copy(quantized)
    corrected.correction = ptq4adm.fit_correction(
        quantized, float_pipe, PROMPTS, steps=1, progress=False
    )
    before = float((quantized.denoise(said, steps=1) - wanted).square().sum())
    after = corrected.denoise(said, steps=1)
    assert float((after - wanted).square().sum()) < before
    ptq4adm.save_pipeline(corrected, tmp_path / "out")
    again = ptq4adm.load_pipeline(tmp_path / "out")
    assert torch.equal(again.denoise(said, steps=1), after)


def test_two_pipelines_of_one_kind_and_empty_prompts_are_refused(
    float_pipe: TextToAudioPipeline, quantized: TextToAudioPipeline
) -> None:
    for pipe, reference in ((float_pipe, float_pipe), (quantized, quantized)):
        with pytest.raises(ConfigError, match="quantized pipeline and its float reference"):
            ptq4adm.fit_correction(pipe, reference, PROMPTS, progress=False)
    with pytest.raises(PromptError, match="prompt 1 is empty"):
        ptq4adm.fit_correction(quantized, float_pipe, ["a dog", " "], progress=False)
