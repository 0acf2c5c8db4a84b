"""The vocoder: log-mel [B, T, 64] to a 16 kHz waveform [B, 160 T]."""

from pathlib import Path

import numpy as np
import torch
from data import mel_statistics, waveforms
from loop import Budget, Trainer, forward_dtype
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig
from vocoder_init import init_sinusoids

from ptq4adm.evaluation.mel import log_mel

SEGMENT_FRAMES = 50
HALF_UNTIL = 0.7
MARGIN_FRAMES = 4  # frames around a segment whose mel sees samples outside it
SHORT_WINDOWS = ((256, 64), (128, 32))
AUDIBLE = 6.0  # natural-log units below the loudest bin, 52 dB
BANK_FROM = 0.6  # share of the budget after which the sinusoid bank itself is trained too


def build_vocoder(
    mean: np.ndarray | None = None, scale: np.ndarray | None = None
) -> SpeechT5HifiGan:
    """A small HiFi-GAN generator that normalises its input by the corpus statistics.

    Args:
        mean: float32 [64], of each mel bin.
        scale: float32 [64], standard deviation of the same.
    """
    config = SpeechT5HifiGanConfig(
        model_in_dim=64,
        sampling_rate=16000,
        upsample_initial_channel=256,
        upsample_rates=[1, 20, 8],
        upsample_kernel_sizes=[3, 40, 32],
        resblock_kernel_sizes=[5],
        resblock_dilation_sizes=[[1, 3]],
        leaky_relu_slope=0.0,
        normalize_before=True,
    )
    vocoder = SpeechT5HifiGan(config)
    if mean is not None and scale is not None:
        vocoder.mean.copy_(torch.from_numpy(mean))
        vocoder.scale.copy_(torch.from_numpy(scale))
        init_sinusoids(vocoder)
    return vocoder


def loudness_weights(mel: torch.Tensor) -> torch.Tensor:
    """Weights of log-mel bins [B, T, 64]: 1 near the top of a segment, 0.15 far below it."""
    top = mel.amax((1, 2), keepdim=True)
    return 0.15 + 0.85 * torch.sigmoid(mel - top + AUDIBLE)


def transient_loss(estimate: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Distance of magnitudes under short windows, in units of the segment's own level.

    Longer windows are left to the mel loss: they would resolve single partials, which the
    vocoder can only place at multiples of 100 Hz, and the best answer to that is silence.
    """
    total = estimate.new_zeros(())
    for n_fft, hop in SHORT_WINDOWS:
        window = torch.hann_window(n_fft, device=estimate.device)
        roots = []
        for wave in (estimate, target):
            spectrum = torch.stft(wave, n_fft, hop, n_fft, window, return_complex=True)
            roots.append((spectrum.real**2 + spectrum.imag**2 + 1e-6) ** 0.25)
        level = roots[1].mean((1, 2)).clamp(min=0.05)
        total = total + ((roots[0] - roots[1]).abs().mean((1, 2)) / level).mean()
    return total / len(SHORT_WINDOWS)


def train_vocoder(
    audio: np.ndarray,
    mels: np.ndarray,
    folder: Path,
    minutes: float,
    device: str,
    batch: int = 8,
    half: bool = True,
) -> None:
    """Train the vocoder on random half-second segments and save it to ``folder``.

    Args:
        audio: int16 [clips, 40960], the training split.
        mels: float16 [clips, 256, 64] of the same clips.
        folder: takes the checkpoint, the curve and the finished model.
        minutes: wall-clock budget.
        device: "cpu" or "cuda".
        batch: segments a step.
        half: compute the network in bfloat16 for the first 70 % of the budget (the losses
            stay float32). bfloat16 alone leaves rounding noise in the quiet bands.
    """
    vocoder = build_vocoder(*mel_statistics(mels)).to(device)
    trainer = Trainer(
        vocoder,
        Budget(minutes, 5e-4, weight_decay=1e-4, ema_decay=0.995, grad_clip=5.0),
        folder,
        device,
    )
    rng = np.random.default_rng(trainer.step)
    loud = np.flatnonzero(mels.astype(np.float32).max((1, 2)) > -6.0)

    bank = [*vocoder.upsampler[1:].parameters(), *vocoder.conv_post.parameters()]

    def compute_losses() -> dict[str, torch.Tensor]:
        for parameter in bank:
            parameter.requires_grad_(trainer.progress > BANK_FROM)
        rows = loud[rng.integers(0, len(loud), batch)]
        starts = rng.integers(0, mels.shape[1] - SEGMENT_FRAMES + 1, batch)
        pairs = list(zip(rows, starts, strict=True))
        frames = np.stack([mels[row, start : start + SEGMENT_FRAMES] for row, start in pairs])
        cuts = [audio[row, 160 * start : 160 * (start + SEGMENT_FRAMES)] for row, start in pairs]
        mel = torch.from_numpy(frames.astype(np.float32)).to(device)
        target = waveforms(np.stack(cuts)).to(device)
        with forward_dtype(device, half and trainer.progress < HALF_UNTIL):
            estimate = vocoder(mel)
        estimate = estimate.float()
        inner = slice(MARGIN_FRAMES, -MARGIN_FRAMES)
        wanted, weights = mel[:, inner], loudness_weights(mel)[:, inner]
        mel_error = (log_mel(estimate)[:, inner] - wanted).abs()
        weighted = (weights * mel_error).sum() / weights.sum()
        transient = transient_loss(estimate, target)
        return {
            "loss": weighted + transient,
            "weighted": weighted,
            "transient": transient,
            "mel": mel_error.mean(),
        }

    trainer.run(compute_losses)
    trainer.copy_average()
    vocoder.eval().to("cpu").save_pretrained(folder / "model")
