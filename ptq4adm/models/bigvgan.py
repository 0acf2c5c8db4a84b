"""BigVGAN: a vocoder whose activations are periodic and free of aliases.

    conv_pre -> [transposed convolution -> mean of residual blocks] per level -> conv_post -> tanh

    snake_beta(x) = x + sin(alpha x)^2 / beta      one alpha and one beta a channel

Such an activation makes frequencies beyond what the rate holds. It runs at twice the rate, between
two low-pass filters of 12 taps: a sinc under a Kaiser window, cut off at the old Nyquist frequency.

After Lee et al., BigVGAN: A Universal Neural Vocoder with Large-Scale Training (ICLR 2023).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional

TAPS = 12  # of a filter; the rate is doubled, and halved again
_EPSILON = 1e-9  # beside a beta, which might be 0


def low_pass_filter() -> Tensor:
    """Filter of the activations: [TAPS], float32, sum 1.

    A sinc with the cutoff 1/4 of the doubled rate under a Kaiser window, whose beta follows from a
    half transition band of 0.3 by Kaiser's formula for the attenuation.
    """
    cutoff, half_width = 0.25, 0.3
    attenuation = 2.285 * (TAPS / 2 - 1) * math.pi * 4 * half_width + 7.95
    # Kaiser's formula for more than 50 dB, which this is
    beta = 0.1102 * (attenuation - 8.7)
    window = torch.kaiser_window(TAPS, periodic=False, beta=beta, dtype=torch.float64)
    times = torch.arange(TAPS, dtype=torch.float64) - (TAPS - 1) / 2
    taps = window * torch.sinc(2 * cutoff * times)
    return (taps / taps.sum()).float()


class SnakeActivation(nn.Module):
    """Snake or snake-beta between a doubling and a halving of the rate.

    Args:
        channels: of the input.
        has_beta: whether the amplitude has a parameter of its own; otherwise it is alpha's.
        is_logarithmic: whether the parameters are stored as logarithms.
    """

    def __init__(self, channels: int, *, has_beta: bool, is_logarithmic: bool) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels)) if has_beta else None
        self.is_logarithmic = is_logarithmic

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T] to [B, C, T]."""
        doubling, halving = _kernels(x.dtype, x.device)
        alpha: Tensor = self.alpha
        beta: Tensor = self.alpha if self.beta is None else self.beta
        if self.is_logarithmic:
            alpha, beta = alpha.exp(), beta.exp()
        y = _double(x, doubling)
        y = y + (alpha[:, None] * y).sin().square() / (beta[:, None] + _EPSILON)
        return _halve(y, halving)


class ResidualBlock(nn.Module):
    """Convolutions of growing dilation, each added to its input.

    Args:
        channels: of input and output.
        size: of the kernels.
        dilations: one a convolution.
        is_double: whether each is followed by a convolution without dilation ("resblock 1").
        has_beta: see `SnakeActivation`.
        is_logarithmic: see `SnakeActivation`.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        dilations: Sequence[int],
        *,
        is_double: bool,
        has_beta: bool,
        is_logarithmic: bool,
    ) -> None:
        super().__init__()

        def conv(dilation: int) -> nn.Conv1d:
            padding = (size - 1) * dilation // 2
            return nn.Conv1d(channels, channels, size, dilation=dilation, padding=padding)

        self.convs1 = nn.ModuleList(conv(dilation) for dilation in dilations)
        self.convs2 = nn.ModuleList(conv(1) for _ in dilations) if is_double else None
        self.activations = nn.ModuleList(
            SnakeActivation(channels, has_beta=has_beta, is_logarithmic=is_logarithmic)
            for _ in range(len(dilations) * (2 if is_double else 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T] to [B, C, T]."""
        activations = iter(self.activations)
        for i, conv in enumerate(self.convs1):
            y = conv(next(activations)(x))
            if self.convs2 is not None:
                y = self.convs2[i](next(activations)(y))
            x = x + y
        return x


class BigVGAN(ModelMixin, ConfigMixin):
    """Log-mel spectrograms to waveforms.

    Args:
        num_mels: mel bins.
        sampling_rate: samples a second, Hz.
        upsample_rates: of the transposed convolutions; their product is the hop, in samples.
        upsample_kernel_sizes: of the same.
        upsample_initial_channel: channels after the first convolution; halved by every level.
        resblock: "1" or "2": with two or one convolution a dilation.
        resblock_kernel_sizes: one a residual block of a level.
        resblock_dilation_sizes: dilations of each.
        activation: "snakebeta" or "snake".
        snake_logscale: whether its parameters are stored as logarithms.
    """

    config_name = "config.json"

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(  # noqa: PLR0913 - the published configuration
        self,
        num_mels: int = 80,
        sampling_rate: int = 16000,  # noqa: ARG002 - read from the config
        upsample_rates: Sequence[int] = (4, 4, 2, 2, 2, 2),
        upsample_kernel_sizes: Sequence[int] = (8, 8, 4, 4, 4, 4),
        upsample_initial_channel: int = 1536,
        resblock: str = "1",
        resblock_kernel_sizes: Sequence[int] = (3, 7, 11),
        resblock_dilation_sizes: Sequence[Sequence[int]] = ((1, 3, 5),) * 3,
        activation: str = "snakebeta",
        snake_logscale: bool = True,
    ) -> None:
        super().__init__()
        kind = {"has_beta": activation == "snakebeta", "is_logarithmic": snake_logscale}
        width = upsample_initial_channel
        self.conv_pre = nn.Conv1d(num_mels, width, 7, padding=3)
        self.ups = nn.ModuleList()
        self.resblocks = nn.ModuleList()
        for rate, size in zip(upsample_rates, upsample_kernel_sizes, strict=True):
            padding = (size - rate) // 2
            self.ups.append(nn.ConvTranspose1d(width, width // 2, size, rate, padding=padding))
            width //= 2
            for kernel, dilations in zip(
                resblock_kernel_sizes, resblock_dilation_sizes, strict=True
            ):
                self.resblocks.append(
                    ResidualBlock(width, kernel, dilations, is_double=resblock == "1", **kind)
                )
        self.activation_post = SnakeActivation(width, **kind)
        self.conv_post = nn.Conv1d(width, 1, 7, padding=3)

    @property
    def hop(self) -> int:
        """Samples a log-mel frame."""
        return math.prod(self.config.upsample_rates)

    def forward(self, mel: Tensor) -> Tensor:
        """Waveforms of spectrograms.

        Args:
            mel: [B, mel bins, T].

        Returns:
            [B, T * hop], in [-1, 1].
        """
        x = self.conv_pre(mel)
        count = len(self.resblocks) // len(self.ups)
        for level, up in enumerate(self.ups):
            x = up(x)
            total = torch.zeros_like(x)
            for block in self.resblocks[level * count : (level + 1) * count]:
                total += block(x)
            x = total / count
        wave: Tensor = torch.tanh(self.conv_post(self.activation_post(x)))[:, 0]
        return wave


@lru_cache(maxsize=16)
def _kernels(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Convolution kernels that double and halve the rate: [2, 1, 7] and [1, 1, TAPS].

    To double, zeros go between the samples, then comes the filter, twice as loud. Half of its taps
    fall on zeros, so even and odd samples are two filters of the samples that there are.
    """
    taps = low_pass_filter()
    odd, even = taps[1::2].flip(0), taps[0::2].flip(0)
    doubling = 2 * torch.stack([functional.pad(odd, (0, 1)), functional.pad(even, (1, 0))])
    return doubling[:, None].to(device, dtype), taps[None, None].to(device, dtype)


def _double(x: Tensor, kernels: Tensor) -> Tensor:
    """[B, C, T] at twice the rate: [B, C, 2 T]."""
    padded = functional.pad(x, (TAPS // 4, TAPS // 4), mode="replicate")
    phases = functional.conv1d(padded.flatten(0, 1)[:, None], kernels)
    return phases.transpose(1, 2).reshape(*x.shape[:-1], -1)


def _halve(x: Tensor, kernel: Tensor) -> Tensor:
    """[B, C, 2 T] at half the rate, filtered: [B, C, T]."""
    padded = functional.pad(x, (TAPS // 2 - 1, TAPS // 2), mode="replicate")
    halved = functional.conv1d(padded.flatten(0, 1)[:, None], kernel, stride=2)
    return halved.reshape(*x.shape[:-1], -1)
