"""A vocoder that works before training: weights that make a bank of sinusoids.

A convolutional vocoder answers a steady log-mel with a waveform that repeats every frame, so all
it can hold is multiples of 100 Hz (one over the hop). The start given here is that bank:

    log-mel -> 4 hinges a bin -> amplitude of each multiple of 100 Hz      100 Hz rate
            -> its in-phase and quadrature parts in one of 16 bands         2 kHz rate
            -> the bands, each around its own carrier                      16 kHz rate

Rectifiers lie between the stages; a signed signal x passes them as the pair (x, -x). Before any
training a classifier of the ten sounds names 82 % of the clips that went through this start, and
52 % after 1,400 steps from random weights.
"""

import math

import numpy as np
import torch
from transformers import SpeechT5HifiGan

from ptq4adm.evaluation.mel import mel_filters

KNOTS = (-8.0, -4.5, -2.0, 0.0, 2.0)  # log magnitudes where the pieces of exp meet; the last closes
PARTIALS = 80  # multiples of 100 Hz
BANDS = 16
PEAK = (
    512.0  # sum over FFT bins of the magnitudes of a sinusoid of amplitude 1 under the Hann window
)
AMPLITUDE_UNIT = 0.1  # amplitudes are carried in this unit, so that weights are near 1


def init_sinusoids(vocoder: SpeechT5HifiGan, seed: int = 0) -> None:
    """Give a vocoder of `vocoder.build_vocoder` the weights of a sinusoid bank.

    Args:
        vocoder: with mean and scale already set; changed in place.
        seed: of the phases and of the small noise in every other weight.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in vocoder.named_parameters():
            if name.endswith("bias"):
                weight.zero_()
            else:
                fan_in = weight[0].numel() if "upsampler" not in name else weight.shape[0]
                weight.copy_(
                    torch.randn(weight.shape, generator=generator) * 0.01 / math.sqrt(fan_in)
                )
        _init_hinges(vocoder)
        _init_amplitudes(vocoder)
        _init_partials(vocoder, generator)
        _init_bands(vocoder)


def _init_hinges(vocoder: SpeechT5HifiGan) -> None:
    """conv_pre: channel 4 b + i is mel[b] - KNOTS[i], undoing the normalisation."""
    hinges = len(KNOTS) - 1
    conv = vocoder.conv_pre
    for i, knot in enumerate(KNOTS[:-1]):
        rows = torch.arange(64) * hinges + i
        conv.weight[rows, torch.arange(64), conv.kernel_size[0] // 2] += vocoder.scale
        conv.bias[rows] = vocoder.mean - knot


def _init_amplitudes(vocoder: SpeechT5HifiGan) -> None:
    """First stage: hinges to the amplitude of each partial, by way of exp(mel)."""
    slopes = np.diff(np.exp(KNOTS)) / np.diff(KNOTS)
    bends = np.diff(np.concatenate([[0.0], slopes]))  # change of slope at each knot
    bins = np.arange(513) * 15.625
    filters = mel_filters().numpy()
    response = np.stack(
        [np.interp(100.0 * (c + 1), bins, column) for column in filters.T for c in range(PARTIALS)]
    )
    response = response.reshape(64, PARTIALS)  # of each mel bin to each partial
    total = response.sum(1)
    total = np.maximum(total, 0.5 * np.median(filters.max(0)) * 0.5)
    share = response / response.sum(0, keepdims=True).clip(min=1e-9)
    gain = share / (PEAK * total[:, None] * AMPLITUDE_UNIT)  # [64, PARTIALS]
    stage = vocoder.upsampler[0]
    weights = torch.from_numpy((gain[:, None, :] * bends[None, :, None]).astype(np.float32))
    stage.weight[:, :PARTIALS] *= 0.02
    stage.weight[:, :PARTIALS, stage.kernel_size[0] // 2] += weights.reshape(-1, PARTIALS)


def _init_partials(vocoder: SpeechT5HifiGan, generator: torch.Generator) -> None:
    """Second stage: an amplitude becomes a complex exponential in the partial's band."""
    stage = vocoder.upsampler[1]
    length = stage.kernel_size[0]
    k = torch.arange(length)
    window = torch.sin(math.pi * (k + 0.5) / length) ** 2
    phases = 2 * math.pi * torch.rand(PARTIALS, generator=generator)
    for c in range(PARTIALS):
        hz = 100.0 * (c + 1)
        band = min(BANDS - 1, int(hz // 500))
        angle = 2 * math.pi * hz * k / 2000.0 + phases[c]
        for part, wave in enumerate((torch.cos(angle), torch.sin(angle))):
            row = 4 * band + 2 * part
            stage.weight[c, row] += AMPLITUDE_UNIT * window * wave
            stage.weight[c, row + 1] -= AMPLITUDE_UNIT * window * wave


def _init_bands(vocoder: SpeechT5HifiGan) -> None:
    """Third stage and conv_post: each band moves to its carrier; the bands add up."""
    stage, last = vocoder.upsampler[2], vocoder.conv_post
    length = stage.kernel_size[0]
    k = torch.arange(length)
    window = torch.sin(math.pi * (k + 0.5) / length) ** 2 * (16.0 / length)
    for band in range(BANDS):
        angle = 2 * math.pi * (250.0 + 500.0 * band) * (k - (length - 1) / 2) / 16000.0
        for part, wave in enumerate((torch.cos(angle), -torch.sin(angle))):
            for sign, row in ((1.0, 4 * band + 2 * part), (-1.0, 4 * band + 2 * part + 1)):
                stage.weight[row, 2 * band] += sign * window * wave
                stage.weight[row, 2 * band + 1] -= sign * window * wave
        middle = last.kernel_size[0] // 2
        last.weight[0, 2 * band, middle] += 1.0
        last.weight[0, 2 * band + 1, middle] -= 1.0
