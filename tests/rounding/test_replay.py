"""Replayed calls are the calls that were made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import ptq4adm
from ptq4adm import TextToAudioPipeline
from ptq4adm.calibration import ChosenInputs
from ptq4adm.errors import CalibrationError, ConfigError
from ptq4adm.rounding import Replay

PROMPTS = ["a dog barks", "a bell rings", "rain falls"]


@pytest.fixture
def inputs(float_pipe: TextToAudioPipeline, tmp_path: Path) -> ChosenInputs:
    """Seven of nine (prompt, step) pairs, both guidance halves of each."""
    path = tmp_path / "inputs.safetensors"
    ptq4adm.calibrate(
        float_pipe, PROMPTS, steps=3, strategy="random", size=7, inputs=path, progress=False
    )
    return ChosenInputs.load(path)


def test_a_replay_predicts_what_the_run_did(
    float_pipe: TextToAudioPipeline, inputs: ChosenInputs
) -> None:
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(_: object, args: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        seen[int(args[1])] = (args[0], output[0])

    handle = float_pipe.unet.register_forward_hook(keep)
    float_pipe.denoise(float_pipe.encode_prompts(PROMPTS), steps=3, seed=0)
    handle.remove()
    replay = Replay(inputs, batch=2)
    found = 0
    for batch in replay.batches():
        predicted = replay.call(float_pipe.unet, batch).unflatten(0, (-1, 2))
        samples, outputs = seen[int(batch.timestep)]
        for row, index in enumerate(batch.indices.tolist()):
            prompt = int(inputs.pairs[index, 0])
            for half in range(2):
                i = half * len(PROMPTS) + prompt
                torch.testing.assert_close(batch.sample[2 * row + half], samples[i])
                torch.testing.assert_close(predicted[row, half], outputs[i])
                found += 1
    assert found == 14


def test_a_batch_has_one_timestep_and_every_pair_comes_once(inputs: ChosenInputs) -> None:
    replay = Replay(inputs, batch=2)
    batches = list(replay.batches())
    assert len(batches) == len(replay)
    assert all(len(batch.indices) <= 2 for batch in batches)
    assert sorted(int(i) for batch in batches for i in batch.indices) == list(range(7))
    times = [batch.timestep for batch in batches]
    assert times == sorted(times, reverse=True)
    for batch in batches:
        assert bool((inputs.timesteps[batch.indices] == batch.timestep).all())
    with pytest.raises(CalibrationError, match="in one call"):
        replay.make(torch.arange(7))


@pytest.mark.parametrize("batch", [0, True, 1.5])
def test_a_batch_is_a_positive_number(inputs: ChosenInputs, batch: int) -> None:
    with pytest.raises(ConfigError, match="batch: got"):
        Replay(inputs, batch=batch)
