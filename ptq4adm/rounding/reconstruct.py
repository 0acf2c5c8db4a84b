"""Reconstruction: all 4-bit integers and their scales trained together on the model's output.

    loss = mean over pairs of |e_q - e|^2,    e = e_u + g (e_c - e_u)                       (1)

e is the float model's prediction as the sampler gets it, e_q that of a copy which rounds weights
and inputs as the packed model does. Gradients pass straight through the rounding
(`ptq4adm.rounding.straight_through`); Adam moves where every weight stands between its integers and
the scale of every channel, and the rates fall to 0 along a cosine, so that what crosses from one
integer to the next settles. The denoiser itself is never touched.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ptq4adm.errors import ConfigError, NonFiniteError
from ptq4adm.quant.affine import QuantizedRows
from ptq4adm.rounding.replay import Batch, Replay
from ptq4adm.rounding.task import LayerTask
from ptq4adm.rounding.trained import TrainedTwin

_WARM_UP = 10  # steps in which the rates rise: Adam's second moments are not known before
_BETAS = (0.9, 0.99)
# of the loss that the bar shows
_MEMORY = 0.95


@dataclass(frozen=True)
class ReconstructSettings:
    """How `reconstruct` works.

    Args:
        steps: of training, each one call with a gradient.
        minutes: ends it early, with the same falling rates; None for never. How far it gets then
            depends on the machine.
        rate: largest change of a weight in one step, in steps of its scale.
        scale_rate: largest relative change of a channel's scale in one step.
        seed: of the order of the pairs.

    Raises:
        ConfigError: if a number is out of range.
    """

    steps: int = 400
    minutes: float | None = None
    rate: float = 1e-3
    scale_rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ConfigError(f"steps: got {self.steps!r}, needs a whole number of at least 1")
        for name in ("rate", "scale_rate", "minutes"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < math.inf:
                raise ConfigError(f"{name}: got {value}, needs more than 0")


def reconstruct(
    denoiser: nn.Module,
    tasks: Sequence[LayerTask],
    replay: Replay,
    *,
    progress: bool = True,
    settings: ReconstructSettings | None = None,
) -> dict[str, QuantizedRows]:
    """Integers and scales of every 4-bit layer by training; a `ptq4adm.rounding.Rounder`.

    Layers of 8 bits keep plain rounding. Memory: about six float32 copies of the 4-bit weights, and
    the activations of one call.

    Args:
        denoiser: the float model; it is not changed.
        tasks: layers.
        replay: the model's inputs, and the guidance scale if pairs have two halves.
        progress: show a bar on a terminal.
        settings: None for the default.

    Raises:
        CalibrationError: if pairs have two halves and the guidance scale is not known.
        NonFiniteError: if a replayed activation or the loss is NaN or infinite.
        UncalibratedStepError: if inputs are of a timestep whose bucket has no scales.
    """
    chosen = settings or ReconstructSettings()
    twin = TrainedTwin(denoiser, tasks)
    if twin.weights:
        with torch.enable_grad():
            _train(twin, _Targets(denoiser, replay), chosen, progress)
    trained = {name: weight.rows() for name, weight in twin.weights.items()}
    return {task.name: trained.get(task.name, task.start) for task in tasks}


class _Targets:
    """Batches in random order, and what the float model predicts for them, computed once."""

    def __init__(self, denoiser: nn.Module, replay: Replay) -> None:
        self.denoiser, self.replay = denoiser, replay
        self.device = next(denoiser.parameters()).device
        self._known: dict[int, Tensor] = {}

    def batches(self, seed: int) -> Iterator[Batch]:
        """Without end: every pair once, in batches of one timestep, then again in other ones."""
        generator = torch.Generator().manual_seed(seed)
        times = self.replay.inputs.timesteps
        while True:
            order = torch.randperm(len(times), generator=generator)
            parts = [
                part
                for value in times.unique()
                for part in order[times[order] == value].split(self.replay.batch)
            ]
            for i in torch.randperm(len(parts), generator=generator).tolist():
                yield self.replay.make(parts[i], self.device)

    @torch.no_grad()
    def of(self, batch: Batch) -> Tensor:
        """[B, C, h, w]."""
        indices = batch.indices.tolist()
        if any(index not in self._known for index in indices):
            found = self.replay.guided(self.replay.call(self.denoiser, batch))
            self._known |= {i: e.float() for i, e in zip(indices, found, strict=True)}
        return torch.stack([self._known[index] for index in indices])


def _train(
    twin: TrainedTwin, targets: _Targets, settings: ReconstructSettings, progress: bool
) -> None:
    weights = list(twin.weights.values())
    rates = (settings.rate, settings.scale_rate)
    optimizer = torch.optim.Adam(
        [{"params": [w.position for w in weights]}, {"params": [w.log_scale for w in weights]}],
        betas=_BETAS,
    )
    start, shown = time.monotonic(), 0.0
    batches = targets.batches(settings.seed)
    bar = tqdm(
        total=settings.steps, desc="reconstruct", unit="step", disable=None if progress else True
    )
    with bar:
        for step in range(settings.steps):
            done = step / settings.steps
            if settings.minutes is not None:
                done = max(done, (time.monotonic() - start) / (60.0 * settings.minutes))
            if done >= 1.0:
                break
            factor = min(1.0, (step + 1) / _WARM_UP) * 0.5 * (1.0 + math.cos(math.pi * done))
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            optimizer.zero_grad(set_to_none=True)
            noise = _step(twin, targets, next(batches))
            optimizer.step()
            for weight in weights:
                weight.keep_in_reach()
            shown = noise if step == 0 else _MEMORY * shown + (1.0 - _MEMORY) * noise
            bar.set_postfix_str(f"error {10.0 * math.log10(max(shown, 1e-30)):.1f} dB")
            bar.update()


def _step(twin: TrainedTwin, targets: _Targets, batch: Batch) -> float:
    """Gradients of one batch; its error relative to the prediction."""
    expected, replay = targets.of(batch), targets.replay
    twin.round()
    found = replay.guided(twin.call(replay, batch)).float()
    squares = (found - expected).square().flatten(1).mean(dim=1)  # [B]
    # a batch that is not full counts for less, so that all pairs count alike
    loss = squares.sum() / replay.batch
    if not bool(torch.isfinite(loss)):
        raise NonFiniteError(
            f"the loss at timestep {batch.timestep:g} is NaN or infinite: the inputs or the float "
            "model's prediction are; record the inputs again"
        )
    loss.backward()
    return float(squares.detach().sum() / expected.square().flatten(1).mean(dim=1).sum())
