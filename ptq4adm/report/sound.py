"""Clips and their spectrograms as data: URIs."""

from __future__ import annotations

import base64
import io

import numpy as np
import torch
from torch import Tensor

from ptq4adm.errors import MissingComponentError
from ptq4adm.evaluation.mel import DB_PER_NEPER, SAMPLE_RATE, log_mel
from ptq4adm.evaluation.picture import RANGE_DB
from ptq4adm.evaluation.resample import resample


def wav_uri(wave: Tensor, sampling_rate: int) -> str:
    """A clip as 16-bit WAV.

    Args:
        wave: floating [S]; what is beyond [-1, 1] is clipped.
        sampling_rate: Hz.
    """
    import soundfile

    buffer = io.BytesIO()
    samples = wave.detach().float().cpu().clamp(-1.0, 1.0).numpy()
    soundfile.write(buffer, samples, sampling_rate, format="WAV", subtype="PCM_16")
    return "data:audio/wav;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def mel_db(wave: Tensor, sampling_rate: int) -> np.ndarray:
    """Log-mel spectrogram of a clip [S] in decibels, float64 [64, T]."""
    clip = resample(wave.detach().float().cpu()[None], sampling_rate, SAMPLE_RATE)
    mel: np.ndarray = DB_PER_NEPER * log_mel(clip)[0].double().T.numpy()
    return mel


def spectrogram_uri(decibels: np.ndarray, top: float) -> str:
    """A picture of [F, T] decibels, low frequencies at the bottom: `RANGE_DB` below `top` is black.

    Raises:
        MissingComponentError: if matplotlib is not installed.
    """
    return _png(decibels, "magma", top - RANGE_DB, top)


def difference_uri(decibels: np.ndarray, most: float) -> str:
    """A picture of signed differences [F, T], dB: white is none, `most` the darkest.

    Raises:
        MissingComponentError: if matplotlib is not installed.
    """
    return _png(decibels, "RdBu_r", -most, most)


def top_of(spectrograms: list[np.ndarray]) -> float:
    """The loudest bin of all, dB: the top of the one colour scale."""
    return max(float(np.max(mel)) for mel in spectrograms)


def _png(values: np.ndarray, colours: str, low: float, high: float) -> str:
    try:
        from matplotlib import image
    except ImportError as error:
        raise MissingComponentError(
            f"spectrograms need matplotlib ({error}): pip install 'ptq4adm[demo]'"
        ) from error
    buffer = io.BytesIO()
    image.imsave(buffer, values, cmap=colours, vmin=low, vmax=high, origin="lower", format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def peak_difference(pairs: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """The scale of the difference pictures: their 99.5th percentile over all pairs, dB."""
    every = torch.cat([torch.from_numpy(np.abs(a - b)).flatten() for a, b in pairs])
    return max(1.0, float(every.sort().values[int(0.995 * (len(every) - 1))]))
