"""Paired metrics: the same prompt and seed through two models, compared clip by clip.

They need no trained embedding, and a difference is the quantization's alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptq4adm.errors import NonFiniteError, ShapeError
from ptq4adm.evaluation.mel import DB_PER_NEPER, log_mel


def latent_sqnr_db(reference: Tensor, test: Tensor) -> Tensor:
    """Signal to quantization noise ratio of final latents.

        SQNR[b] = 10 log10( sum reference[b]^2 / sum (reference[b] - test[b])^2 )  dB        (1)

    Args:
        reference: floating [B, ...], the float model's latents.
        test: the same shape, the quantized model's.

    Returns:
        float64 [B]; +inf where the two are equal.

    Raises:
        ShapeError: if the shapes differ.
    """
    if reference.shape != test.shape or reference.dim() < 2:
        raise ShapeError(
            f"latents: expected two tensors [B, ...] of one shape, got {tuple(reference.shape)} "
            "and "
            f"{tuple(test.shape)}"
        )
    signal = reference.double().flatten(1)
    noise = signal - test.double().flatten(1)
    # equal latents give a zero denominator, and log10 of infinity is the right answer
    return 10.0 * torch.log10(signal.square().sum(1) / noise.square().sum(1))


def step_sqnr_db(reference: Tensor, test: Tensor) -> Tensor:
    """Signal to quantization noise ratio of the latents after every step, as `latent_sqnr_db`.

    Both trajectories start from the same noise, so it shows at which step the two part.

    Args:
        reference: floating [T, B, ...], the float model's latents after each of T steps.
        test: the same shape, the quantized model's.

    Returns:
        float64 [T, B]; +inf where the two are equal.

    Raises:
        ShapeError: if the shapes differ.
    """
    if reference.shape != test.shape or reference.dim() < 3:
        raise ShapeError(
            f"latents: expected two tensors [T, B, ...] of one shape, got {tuple(reference.shape)} "
            f"and {tuple(test.shape)}; stack what denoise's callback gets"
        )
    return latent_sqnr_db(reference.flatten(0, 1), test.flatten(0, 1)).reshape(reference.shape[:2])


def embedding_cosine(reference: Tensor, test: Tensor) -> Tensor:
    """Cosine between the features of paired clips.

    Args:
        reference: floating [B, D].
        test: the same shape; row b is the same prompt and seed.

    Returns:
        float64 [B] in [-1, 1]; 1 where the two point the same way.

    Raises:
        ShapeError: if the shapes differ.
        NonFiniteError: if a vector is zero or not finite.
    """
    if reference.shape != test.shape or reference.dim() != 2:
        raise ShapeError(
            f"embeddings: expected two tensors [B, D] of one shape, got {tuple(reference.shape)} "
            f"and {tuple(test.shape)}"
        )
    x, y = reference.double().cpu(), test.double().cpu()
    lengths = x.norm(dim=1) * y.norm(dim=1)
    if not (lengths.isfinite() & (lengths > 0.0)).all():
        raise NonFiniteError(
            "embeddings: a vector is zero or not finite and points nowhere; drop those clips"
        )
    return ((x * y).sum(1) / lengths).clamp(-1.0, 1.0)


def log_mel_distance_db(reference: Tensor, test: Tensor) -> Tensor:
    """Root mean square difference of two log-mel spectrograms in decibels.

        D[b] = sqrt( mean over t, f of (20 log10 m_reference[b, t, f] - 20 log10 m_test[b, t, f])^2
        )  dB        (1)

    m are mel magnitudes of `ptq4adm.evaluation.mel` (64 bins, 10 ms frames), not below 1e-5 (-100
    dB).

    Args:
        reference: waveforms [B, S] at 16 kHz.
        test: the same shape.

    Returns:
        float64 [B]; 0 where the two are equal.

    Raises:
        ShapeError: if the shapes differ.
    """
    if reference.shape != test.shape or reference.dim() != 2:
        raise ShapeError(
            f"waveforms: expected two tensors [B, S] of one shape, got {tuple(reference.shape)} "
            "and "
            f"{tuple(test.shape)}"
        )
    difference = DB_PER_NEPER * (log_mel(reference).double() - log_mel(test).double())
    return difference.square().mean((1, 2)).sqrt()
