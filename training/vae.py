"""The autoencoder: raw log-mel [B, 1, 256, 64] to latents [B, 8, 32, 8] and back."""

from pathlib import Path

import numpy as np
import torch
from data import CLIP_FRAMES
from diffusers import AutoencoderKL
from loop import Budget, Trainer, forward_dtype
from torch.nn import functional

KL_WEIGHT = 5e-4  # a nat a latent element, beside a mean reconstruction loss of about 0.2
WHOLE_CLIPS_FROM = 0.6  # share of the budget spent on half clips first: twice the steps


def build_vae(mean: float = 0.0, scale: float = 1.0) -> AutoencoderKL:
    """A small AutoencoderKL of factor 8 and 8 latent channels.

    Args:
        mean: mean of the log-mels; folded into the first and the last convolution, so
            that the model takes and gives raw log-mel as AudioLDM's does.
        scale: standard deviation of the log-mels; folded likewise.
    """
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=16,
        sample_size=256,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        first, last = vae.encoder.conv_in, vae.decoder.conv_out
        first.weight /= scale
        first.bias -= first.weight.sum((1, 2, 3)) * mean
        last.weight *= scale
        last.bias.copy_(last.bias * scale + mean)
    return vae


def standardise_latents(vae: AutoencoderKL, mean: torch.Tensor, scale: torch.Tensor) -> None:
    """Make every latent channel zero-mean and unit-variance, changing no reconstruction.

    The two 1x1 convolutions around the latents absorb the change exactly.

    Args:
        vae: changed in place.
        mean: float32 [8], of the latents as they are.
        scale: float32 [8], standard deviation of the same.
    """
    channels = mean.shape[0]
    with torch.no_grad():
        before, after = vae.quant_conv, vae.post_quant_conv
        before.weight[:channels] /= scale[:, None, None, None]
        before.bias[:channels] = (before.bias[:channels] - mean) / scale
        before.bias[channels:] -= 2.0 * torch.log(scale)
        after.bias += (after.weight[:, :, 0, 0] * mean).sum(1)
        after.weight *= scale[None, :, None, None]


def reconstruction_losses(
    decoded: torch.Tensor, target: torch.Tensor, scale: float
) -> dict[str, torch.Tensor]:
    """Absolute, squared and gradient errors of log-mels, in units of their deviation."""
    error = (decoded - target) / scale
    absolute, square = error.abs().mean(), error.square().mean()
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    loss = absolute + 0.5 * square + 0.25 * edges
    return {"loss": loss, "l1": absolute, "l2": square, "edges": edges}


def train_vae(
    mels: np.ndarray, folder: Path, minutes: float, device: str, batch: int = 8, half: bool = True
) -> None:
    """Train the autoencoder and save it to ``folder`` with standardised latents.

    Args:
        mels: float16 [clips, 256, 64], the training split.
        folder: takes the checkpoint, the curve and the finished model.
        minutes: wall-clock budget.
        device: "cpu" or "cuda".
        batch: clips a step.
        half: compute in bfloat16.
    """
    sample = mels[:: max(1, len(mels) // 500)].astype(np.float32)
    scale = float(sample.std())
    vae = build_vae(float(sample.mean()), scale).to(device)
    trainer = Trainer(vae, Budget(minutes, 2e-3, ema_decay=0.995), folder, device)
    rng = np.random.default_rng(trainer.step)

    def compute_losses() -> dict[str, torch.Tensor]:
        rows = rng.integers(0, len(mels), batch)
        frames = CLIP_FRAMES if trainer.progress > WHOLE_CLIPS_FROM else CLIP_FRAMES // 2
        begin = 8 * int(rng.integers(0, (CLIP_FRAMES - frames) // 8 + 1))
        cut = mels[rows, begin : begin + frames].astype(np.float32)
        target = torch.from_numpy(cut)[:, None].to(device)
        with forward_dtype(device, half):
            posterior = vae.encode(target).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        losses = reconstruction_losses(decoded.float(), target, scale)
        mean, var, logvar = (x.float() for x in (posterior.mean, posterior.var, posterior.logvar))
        losses["kl"] = 0.5 * (mean**2 + var - 1.0 - logvar).mean()
        losses["loss"] = losses["loss"] + KL_WEIGHT * losses["kl"]
        return losses

    trainer.run(compute_losses)
    trainer.copy_average()
    vae.eval()
    means, scales = (
        part.float() for part in encode_moments(vae, mels[:: max(1, len(mels) // 1000)], device)
    )
    spread = torch.sqrt(means.var((0, 2, 3)) + scales.square().mean((0, 2, 3)))
    standardise_latents(vae, means.mean((0, 2, 3)).to(device), spread.to(device))
    vae.to("cpu").save_pretrained(folder / "model")


def train_decoder(
    vae: AutoencoderKL,
    moments: tuple[torch.Tensor, torch.Tensor],
    mels: np.ndarray,
    trainer: Trainer,
) -> None:
    """Go on training the decoder alone: the latents stay what the UNet is trained on.

    Args:
        vae: of a finished `train_vae`; its decoder is changed in place.
        moments: mean and standard deviation of the latents, float16 [clips, 8, 32, 8] both.
        mels: float16 [clips, 256, 64] of the same clips.
        trainer: of ``vae``, with its encoder frozen.
    """
    rng = np.random.default_rng(trainer.step)
    scale = float(mels[:: max(1, len(mels) // 500)].astype(np.float32).std())
    means, scales = moments
    batch = 8

    def compute_losses() -> dict[str, torch.Tensor]:
        rows = rng.integers(0, len(mels), batch)
        target = torch.from_numpy(mels[rows].astype(np.float32))[:, None].to(trainer.device)
        mean, deviation = means[rows].float(), scales[rows].float()
        latents = (mean + deviation * torch.randn(mean.shape)).to(trainer.device)
        with forward_dtype(trainer.device):
            decoded = vae.decode(latents).sample
        return reconstruction_losses(decoded.float(), target, scale)

    trainer.run(compute_losses)
    trainer.copy_average()
    vae.eval().to("cpu").save_pretrained(trainer.folder / "model")


def freeze_encoder(vae: AutoencoderKL) -> AutoencoderKL:
    """Leave only decoder and its 1x1 convolution to train."""
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    return vae


def encode_moments(
    vae: AutoencoderKL, mels: np.ndarray, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the latents of every clip, float16 [clips, 8, 32, 8] both."""
    means, scales = [], []
    with torch.no_grad(), forward_dtype(device, device != "cpu"):
        for start in range(0, len(mels), 16):
            batch = torch.from_numpy(mels[start : start + 16].astype(np.float32))[:, None].to(
                device
            )
            posterior = vae.encode(batch).latent_dist
            means.append(posterior.mean.half().cpu())
            scales.append(posterior.std.half().cpu())
    return torch.cat(means), torch.cat(scales)


def reconstruction_error(vae: AutoencoderKL, mels: np.ndarray) -> float:
    """Mean absolute error of the log-mels (natural logarithm) through encoder mean and decoder."""
    errors = []
    with torch.no_grad():
        for start in range(0, len(mels), 16):
            batch = torch.from_numpy(mels[start : start + 16].astype(np.float32))[:, None]
            decoded = vae.decode(vae.encode(batch).latent_dist.mean).sample
            errors.append(functional.l1_loss(decoded, batch, reduction="none").mean((1, 2, 3)))
    return float(torch.cat(errors).mean())
