"""A model small enough to calibrate in milliseconds, with all that calibration looks at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ptq4adm.protocols import Rule, SamplingDefaults, StepCallback

PROMPTS = [f"sound {i}" for i in range(5)]


class Net(nn.Module):
    """Two layers; the second sees a concatenation of ranges 1 and 100 times the noise level."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 6, 1)
        self.shortcut = nn.Conv2d(10, 4, 1)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        hidden = torch.cat([self.first(x), x * 100 * float(timestep) / 100], dim=1)
        return self.shortcut(hidden)


class Scheduler:
    """Settings, and nothing else."""

    def __init__(self, **config: object) -> None:
        self.config: dict[str, object] = {"beta_start": 0.1, "_private": "a folder", **config}


class Pipe:
    """Runs `Net` on noise; can break at a given sample and step."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = Net().requires_grad_(False)
        self.runs: list[list[str]] = []
        self.broken: tuple[str, int] | None = None
        self.stop_at: str | None = None
        self.scheduler = Scheduler()


class Adapter:
    """The part of `DenoiserAdapter` that calibration uses."""

    family = "test"
    denoiser_name = "net"

    def denoiser(self, pipe: Pipe) -> nn.Module:
        return pipe.net

    def rules(self, _denoiser: nn.Module) -> Sequence[Rule]:
        return ()

    def segments(self, _denoiser: nn.Module) -> dict[str, tuple[int, int]]:
        return {"shortcut": (6, 4)}

    def num_train_timesteps(self, _pipe: Pipe) -> int:
        return 100

    def sampling_defaults(self, _pipe: Pipe) -> SamplingDefaults:
        return SamplingDefaults(steps=4, guidance=1.0)

    def run(
        self,
        pipe: Pipe,
        prompts: Sequence[str],
        *,
        steps: int,
        guidance: float,
        seed: int,
        on_step: StepCallback | None = None,
    ) -> Tensor:
        assert guidance == 2.0
        if pipe.stop_at in prompts:
            raise KeyboardInterrupt
        pipe.runs.append(list(prompts))
        noise = [torch.randn(4, 3, 3, generator=seeded(seed + i)) for i in range(len(prompts))]
        x = torch.stack(noise)
        for i in range(steps):
            t = 100 - 1 - i * (100 // steps)
            doubled = torch.cat([x, x])
            if pipe.broken is not None and pipe.broken[0] in prompts and i == pipe.broken[1]:
                doubled[len(prompts) + list(prompts).index(pipe.broken[0]), 0, 0, 0] = torch.nan
            pipe.net(doubled, torch.tensor(t))
            if on_step is not None:
                on_step(i, t, x)
        return x


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
