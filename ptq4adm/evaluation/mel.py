"""The log-mel spectrogram that every model of this project works on."""

import functools

import numpy as np
import torch

SAMPLE_RATE = 16000
N_FFT = 1024
HOP = 160
N_MELS = 64
F_MAX = 8000.0
FLOOR = 1e-5


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


@functools.lru_cache(maxsize=1)
def mel_filters() -> torch.Tensor:
    """Triangular filters of unit area (Slaney), float32 ``[N_FFT // 2 + 1, N_MELS]``."""
    bins = np.linspace(0.0, SAMPLE_RATE / 2, N_FFT // 2 + 1)
    edges = _mel_to_hz(np.linspace(0.0, _hz_to_mel(np.asarray(F_MAX)), N_MELS + 2))
    up = (bins[:, None] - edges[None, :-2]) / (edges[1:-1] - edges[:-2])
    down = (edges[None, 2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    filters = np.maximum(0.0, np.minimum(up, down)) * 2.0 / (edges[2:] - edges[:-2])
    return torch.from_numpy(filters.astype(np.float32))


def log_mel(waveform: torch.Tensor) -> torch.Tensor:
    """Log-mel spectrogram of 16 kHz audio.

    Args:
        waveform: ``[B, S]``, any floating type; S a whole number of hops (160
            samples) gives S / 160 frames, and 40960 samples give 256.

    Returns:
        float32 ``[B, S // 160, 64]``: natural logarithm of the mel magnitudes,
        clamped from below at ln(1e-5).
    """
    if waveform.dim() != 2:
        raise ValueError(f"waveform must be [batch, samples], got shape {tuple(waveform.shape)}")
    pad = (N_FFT - HOP) // 2
    if waveform.shape[1] <= pad:
        raise ValueError(
            f"waveform has {waveform.shape[1]} samples; reflect padding needs more than {pad}"
        )
    padded = torch.nn.functional.pad(waveform.float()[:, None], (pad, pad), mode="reflect")[:, 0]
    window = torch.hann_window(N_FFT, device=padded.device)
    spectrum = torch.stft(padded, N_FFT, HOP, N_FFT, window, center=False, return_complex=True)
    magnitude = torch.sqrt(spectrum.real**2 + spectrum.imag**2 + 1e-12)
    mel = magnitude.transpose(1, 2) @ mel_filters().to(padded.device)
    return torch.log(torch.clamp(mel, min=FLOOR))
