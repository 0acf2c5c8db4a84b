"""The log-mel spectrogram that every model of this project works on, and parts for other ones."""

import functools
import math

import numpy as np
import torch

from ptq4adm.errors import ShapeError

SAMPLE_RATE = 16000
N_FFT = 1024
HOP = 160
N_MELS = 64
F_MAX = 8000.0
FLOOR = 1e-5
DB_PER_NEPER = 20.0 / math.log(10.0)  # 20 log10(m) = this * ln(m)


def _hz_to_mel(hz: np.ndarray) -> np.ndarray:
    """Slaney's mel scale: linear below 1 kHz, logarithmic above."""
    linear = hz * 3.0 / 200.0
    log = 15.0 + np.log(np.maximum(hz, 1e-9) / 1000.0) * 27.0 / np.log(6.4)
    return np.where(hz < 1000.0, linear, log)


def _mel_to_hz(mel: np.ndarray) -> np.ndarray:
    """Inverse of `_hz_to_mel`."""
    return np.where(
        mel < 15.0, mel * 200.0 / 3.0, 1000.0 * np.exp((mel - 15.0) * np.log(6.4) / 27.0)
    )


@functools.lru_cache(maxsize=8)
def mel_bank(
    n_fft: int, n_mels: int, f_min: float, f_max: float, sample_rate: int = SAMPLE_RATE
) -> torch.Tensor:
    """Triangular filters of unit area on Slaney's mel scale.

    Args:
        n_fft: length of the Fourier transform, in samples.
        n_mels: filters.
        f_min: lower edge of the first filter, Hz.
        f_max: upper edge of the last filter, Hz.
        sample_rate: samples a second.

    Returns:
        float32 ``[n_fft // 2 + 1, n_mels]``.
    """
    bins = np.linspace(0.0, sample_rate / 2, n_fft // 2 + 1)
    low, high = _hz_to_mel(np.asarray([f_min, f_max]))
    edges = _mel_to_hz(np.linspace(low, high, n_mels + 2))
    up = (bins[:, None] - edges[None, :-2]) / (edges[1:-1] - edges[:-2])
    down = (edges[None, 2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    filters = np.maximum(0.0, np.minimum(up, down)) * 2.0 / (edges[2:] - edges[:-2])
    return torch.from_numpy(filters.astype(np.float32))


def mel_filters() -> torch.Tensor:
    """The filters of `log_mel`, float32 ``[N_FFT // 2 + 1, N_MELS]``."""
    return mel_bank(N_FFT, N_MELS, 0.0, F_MAX)


def mel_power(waveform: torch.Tensor, filters: torch.Tensor, *, hop: int) -> torch.Tensor:
    """Mel energies of centred frames, as librosa and torchlibrosa compute them.

    Args:
        waveform: float32 ``[B, S]``; S is more than half a frame, which is padded by reflection.
        filters: float32 ``[n_fft // 2 + 1, n_mels]`` of `mel_bank`.
        hop: samples between frames.

    Returns:
        float32 ``[B, S // hop + 1, n_mels]``.

    Raises:
        ShapeError: if the clip is too short to pad.
    """
    n_fft = 2 * (len(filters) - 1)
    if waveform.dim() != 2 or waveform.shape[1] <= n_fft // 2:
        raise ShapeError(
            f"waveform: got {tuple(waveform.shape)}; [B, S] of more than {n_fft // 2} samples is "
            "needed; leave out such short clips"
        )
    window = torch.hann_window(n_fft, device=waveform.device)
    spectrum = torch.stft(
        waveform.float(), n_fft, hop, n_fft, window, center=True, pad_mode="reflect",
        return_complex=True,
    )  # fmt: skip
    power = spectrum.real.square() + spectrum.imag.square()
    return power.transpose(1, 2) @ filters.to(power.device)


def log_mel(waveform: torch.Tensor) -> torch.Tensor:
    """Log-mel spectrogram of 16 kHz audio.

    Args:
        waveform: ``[B, S]``, any floating type; S a whole number of hops (160
            samples) gives S / 160 frames, and 40960 samples give 256.

    Returns:
        float32 ``[B, S // 160, 64]``: natural logarithm of the mel magnitudes,
        clamped from below at ln(1e-5).

    Raises:
        ShapeError: if it is not [B, S], or too short to pad.
    """
    if waveform.dim() != 2:
        raise ShapeError(f"waveform: got shape {tuple(waveform.shape)}; [B, S] is needed")
    pad = (N_FFT - HOP) // 2
    if waveform.shape[1] <= pad:
        raise ShapeError(
            f"waveform: got {waveform.shape[1]} samples; more than {pad} are needed to pad by "
            "reflection: leave out such short clips"
        )
    padded = torch.nn.functional.pad(waveform.float()[:, None], (pad, pad), mode="reflect")[:, 0]
    window = torch.hann_window(N_FFT, device=padded.device)
    spectrum = torch.stft(padded, N_FFT, HOP, N_FFT, window, center=False, return_complex=True)
    magnitude = torch.sqrt(spectrum.real**2 + spectrum.imag**2 + 1e-12)
    mel = magnitude.transpose(1, 2) @ mel_filters().to(padded.device)
    return torch.log(torch.clamp(mel, min=FLOOR))
