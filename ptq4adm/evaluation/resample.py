"""Change of sample rate by a windowed sinc."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from ptq4adm.errors import RangeError

NAME = "windowed sinc, 32 zero crossings, Kaiser 10"
_ZEROS = 32  # crossings of the sinc on each side
_ROLLOFF = 0.95  # of the lower Nyquist rate: where the passband ends
_LARGEST = 1 << 24  # coefficients of all filters: 128 MiB
_BETA = 10.0  # stopband 100 dB down


def resample(waveforms: Tensor, rate: int, new_rate: int) -> Tensor:
    """Resample clips.

        y[n] = sum_k x[k] h(n / new_rate - k / rate)                                       (1)
        h(t) = c sinc(c rate t) kaiser(t) ,   c = 0.95 min(1, new_rate / rate)

    Computed as one convolution a phase, in float64.

    Args:
        waveforms: float32 [B, S].
        rate: of them, Hz.
        new_rate: wanted, Hz.

    Returns:
        float32 [B, ceil(S new_rate / rate)]; the same tensor if the rates agree.

    Raises:
        RangeError: if a rate is not positive, or the two have too little in common.
    """
    if rate < 1 or new_rate < 1:
        raise RangeError(f"sample rates {rate} and {new_rate} Hz: both must be positive")
    if rate == new_rate:
        return waveforms
    common = math.gcd(rate, new_rate)
    down, up = rate // common, new_rate // common
    cutoff = _ROLLOFF * min(1.0, up / down)
    width = math.ceil(_ZEROS / cutoff)  # input samples on each side
    if up * (2 * width + down) > _LARGEST:
        raise RangeError(
            f"{rate} to {new_rate} Hz is {up} / {down}, which needs too many filters; convert the "
            "clips to a common rate such as 16000, 44100 or 48000 Hz first"
        )
    taps = torch.arange(-width, width + down + 1, dtype=torch.float64)
    phases = torch.arange(up, dtype=torch.float64) * down / up  # [up], in input samples
    time = taps[None] - phases[:, None]  # [up, taps]
    inside = (1.0 - (time / (width + 1)).square()).clamp(min=0.0).sqrt()
    top = torch.i0(torch.tensor(_BETA, dtype=torch.float64))
    window = torch.i0(_BETA * inside) / top * (inside > 0.0)
    kernels = cutoff * torch.sinc(cutoff * time) * window  # [up, taps]
    padded = functional.pad(waveforms.double()[:, None], (width, width + down))
    samples = math.ceil(waveforms.shape[1] * up / down)
    found = functional.conv1d(padded, kernels[:, None], stride=down)  # [B, up, frames]
    return found.transpose(1, 2).flatten(1)[:, :samples].float()
