"""The denoiser: a class-conditioned UNet on latents [B, 8, 32, 8] (time x mel)."""

from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from loop import Budget, Trainer, forward_dtype
from text import EMBED_DIM

CAPTION_DROPOUT = 0.1
SNR_GAMMA = 5.0


def build_unet() -> UNet2DConditionModel:
    """AudioLDM's UNet at (64, 128, 192) channels: 11.4 million parameters.

    ``attention_head_dim`` is what diffusers reads as the number of heads; each has 32 channels.
    """
    unet = UNet2DConditionModel(
        sample_size=32,
        in_channels=8,
        out_channels=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        cross_attention_dim=(64, 128, 192),
        attention_head_dim=(2, 4, 6),
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=EMBED_DIM,
        class_embeddings_concat=True,
        norm_num_groups=32,
    )
    with (
        torch.no_grad()
    ):  # unit-length embeddings have elements near 0.09; start them as loud as the time embedding
        unet.class_embedding.weight *= 6.0
    return unet


def build_scheduler() -> DDIMScheduler:
    """AudioLDM's noise schedule; v-prediction; steps spaced so that the first is pure noise."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.0015,
        beta_end=0.0195,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
    )


class Conditions:
    """Text embeddings of every caption, and the draw of one for a clip.

    Args:
        embeddings: float32 [captions, 128], of all training captions, unit length.
        owners: for each clip, the rows of its captions.
        empty: float32 [128], of the empty prompt.
    """

    def __init__(self, embeddings: torch.Tensor, owners: list[list[int]], empty: torch.Tensor):
        self.embeddings, self.empty = embeddings, empty
        width = max(len(rows) for rows in owners)
        padded = [rows + [rows[i % len(rows)] for i in range(width - len(rows))] for rows in owners]
        self.rows = torch.tensor(padded)

    def draw(self, clips: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """One embedding a clip, float32 [B, 128]; the empty prompt's for a tenth of them."""
        column = torch.randint(self.rows.shape[1], clips.shape, generator=generator)
        chosen = self.embeddings[self.rows[clips, column]]
        dropped = torch.rand(clips.shape, generator=generator) < CAPTION_DROPOUT
        return torch.where(dropped[:, None], self.empty, chosen)


def train_unet(
    moments: tuple[torch.Tensor, torch.Tensor],
    conditions: Conditions,
    folder: Path,
    minutes: float,
    device: str,
    batch: int = 16,
    half: bool = True,
) -> None:
    """Train the UNet on precomputed latents; save the averaged weights to ``folder``.

    Args:
        moments: mean and standard deviation of the latents, float16 [clips, 8, 32, 8] both.
        conditions: text embeddings of the same clips.
        folder: takes the checkpoint, the curve and the finished model.
        minutes: wall-clock budget.
        device: "cpu" or "cuda".
        batch: clips a step.
        half: compute in bfloat16.

    Source: loss weights min(SNR, 5) / (SNR + 1) for v-prediction as in Min-SNR
    (Hang et al. 2023), section 3.4.
    """
    means, scales = moments
    unet = build_unet().to(device).to(memory_format=torch.channels_last)
    trainer = Trainer(
        unet, Budget(minutes, 1e-3, warmup_steps=200, ema_decay=0.999), folder, device
    )
    generator = torch.Generator().manual_seed(trainer.step)
    alphas = build_scheduler().alphas_cumprod

    def compute_losses() -> dict[str, torch.Tensor]:
        clips = torch.randint(len(means), (batch,), generator=generator)
        noise_post = torch.randn((batch, *means.shape[1:]), generator=generator)
        clean = means[clips].float() + scales[clips].float() * noise_post
        noise = torch.randn(clean.shape, generator=generator)
        # one draw in each of B equal intervals: less variance than B free draws
        uniform = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
        timesteps = (uniform * 1000).long().clamp(max=999)
        signal, sigma = (
            alphas[timesteps].sqrt()[:, None, None, None],
            (1 - alphas[timesteps]).sqrt()[:, None, None, None],
        )
        noisy, target = signal * clean + sigma * noise, signal * noise - sigma * clean
        snr = alphas[timesteps] / (1 - alphas[timesteps])
        weights = snr.clamp(max=SNR_GAMMA) / (snr + 1.0)
        weights = (weights / weights.mean()).to(device)
        noisy = noisy.to(device).contiguous(memory_format=torch.channels_last)
        labels = conditions.draw(clips, generator).to(device)
        with forward_dtype(device, half):
            predicted = unet(noisy, timesteps.to(device), None, class_labels=labels).sample
        error = (predicted.float() - target.to(device)).square().mean((1, 2, 3))
        return {"loss": (weights * error).mean(), "v_error": error.mean()}

    trainer.run(compute_losses)
    trainer.copy_average()
    unet.eval().to("cpu").to(memory_format=torch.contiguous_format).save_pretrained(
        folder / "model"
    )
