"""Levels, resampling and folders of clips."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from ptq4adm.errors import AudioFileError, MissingComponentError, RangeError, ShapeError
from ptq4adm.evaluation.clips import has_wav_files, read_folder
from ptq4adm.evaluation.resample import resample
from ptq4adm.evaluation.silence import level_dbfs, silence_warning, silent_share

# --- silence ------------------------------------------------------------------------------------


def test_levels_of_known_waves() -> None:
    t = torch.arange(16000, dtype=torch.float64) / 16000
    sine = torch.sin(math.tau * 100 * t).float()
    square = torch.tensor([1.0, -1.0]).repeat(50)
    levels = level_dbfs([square, sine, 0.001 * square, torch.zeros(10)])
    np.testing.assert_allclose(levels, [0.0, -3.0103, -60.0, -math.inf], atol=1e-4)


def test_share_and_warning() -> None:
    clips = [torch.ones(4), torch.full((4,), 9e-4), torch.zeros(4), torch.full((4,), 0.002)]
    assert silent_share(clips) == 0.5
    assert silent_share(clips, -50.0) == 0.75
    assert silence_warning("test", 0.05) is None
    assert "6% of the test clips are silent (below -60 dBFS)" in str(silence_warning("test", 0.06))
    with pytest.raises(ShapeError, match="not empty"):
        level_dbfs([torch.zeros(0)])
    with pytest.raises(ShapeError, match="got 0"):
        level_dbfs([])


# --- resampling ---------------------------------------------------------------------------------


def _sine(hz: float, rate: int, samples: int) -> Tensor:
    return torch.sin(math.tau * hz * torch.arange(samples, dtype=torch.float64) / rate)


@pytest.mark.parametrize(
    ("rate", "new_rate"),
    [(16000, 48000), (48000, 16000), (22050, 16000), (44100, 16000), (16000, 22050), (3, 2)],
)
def test_sines_keep_their_shape_and_what_cannot_be_kept_is_gone(rate: int, new_rate: int) -> None:
    samples = 3001
    for share in (0.02, 0.4, 0.85):
        hz = share * min(rate, new_rate) / 2
        found = resample(_sine(hz, rate, samples)[None].float(), rate, new_rate)[0]
        assert len(found) == math.ceil(samples * new_rate / rate)
        middle = slice(len(found) // 4, 3 * len(found) // 4)
        expected = _sine(hz, new_rate, len(found))
        np.testing.assert_allclose(found[middle], expected[middle], atol=1e-4)
    if new_rate < rate:
        # above the new Nyquist rate: 80 dB down
        gone = resample(_sine(1.1 * new_rate / 2, rate, samples)[None].float(), rate, new_rate)[0]
        assert gone[middle].abs().max() < 1e-4


def test_equal_rates_change_nothing_and_rates_must_be_positive() -> None:
    x = torch.randn(2, 50)
    assert resample(x, 16000, 16000) is x
    with pytest.raises(RangeError, match="both must be positive"):
        resample(x, 0, 16000)
    with pytest.raises(RangeError, match=r"16001 to 16000 Hz .* convert the clips"):
        resample(x, 16001, 16000)


# --- folders ------------------------------------------------------------------------------------


def test_files_are_read_in_order_and_channels_averaged(tmp_path: Path) -> None:
    two = np.stack([np.full(100, 0.5), np.full(100, 0.25)], 1)
    soundfile.write(tmp_path / "b.wav", two, 22050, subtype="FLOAT")
    soundfile.write(tmp_path / "a.wav", np.full(60, -0.5), 22050, subtype="FLOAT")
    found = read_folder(tmp_path)
    assert (found.sample_rate, found.keys) == (22050, ("a.wav", "b.wav"))
    assert torch.equal(found.waveforms[0], torch.full((60,), -0.5))
    assert torch.equal(found.waveforms[1], torch.full((100,), 0.375))
    assert has_wav_files(tmp_path)


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        assert not has_wav_files(folder)
        with pytest.raises(MissingComponentError, match=r"no \.wav files"):
            read_folder(folder)
    soundfile.write(tmp_path / "a.wav", np.zeros(60), 16000)
    soundfile.write(tmp_path / "b.wav", np.zeros(60), 8000)
    with pytest.raises(ShapeError, match=r"8000 Hz \(b\.wav\), 16000 Hz \(a\.wav\)"):
        read_folder(tmp_path)
    soundfile.write(tmp_path / "b.wav", np.zeros(0), 16000)
    with pytest.raises(AudioFileError, match="holds no sample"):
        read_folder(tmp_path)
    (tmp_path / "b.wav").write_bytes(b"RIFF")
    with pytest.raises(AudioFileError, match=r"b\.wav: cannot be read"):
        read_folder(tmp_path)
