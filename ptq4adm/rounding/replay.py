"""Calls a denoiser again with the inputs that a calibration kept.

A call holds one timestep, as in a run; both guidance halves of a pair are in the same call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptq4adm.calibration import ChosenInputs
from ptq4adm.errors import CalibrationError, ConfigError


@dataclass(frozen=True)
class Batch:
    """Some pairs of one timestep.

    Attributes:
        indices: int64 [B] into the pairs.
        timestep: of the call.
        sample: [B * H, C, h, w]; pair b's halves are rows b * H .. b * H + H - 1.
        arguments: keyword to [B * H, ...].
    """

    indices: Tensor
    timestep: float
    sample: Tensor
    arguments: dict[str, Tensor]


class Replay:
    """Batches of chosen inputs, in order of their timesteps.

    Args:
        inputs: what was kept.
        batch: most pairs of a call.
        guidance: scale with which a run combines the two halves of a pair; None if it is not known.

    Raises:
        ConfigError: if `batch` is not at least 1.
        CalibrationError: if there are no pairs.
    """

    def __init__(
        self, inputs: ChosenInputs, *, batch: int = 8, guidance: float | None = None
    ) -> None:
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise ConfigError(f"batch: got {batch!r}, needs a whole number of at least 1")
        if len(inputs.pairs) == 0:
            raise CalibrationError("inputs: hold no pair; record them again")
        self.inputs, self.batch, self.guidance = inputs, batch, guidance

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._parts())

    def batches(self, device: torch.device | str = "cpu") -> Iterator[Batch]:
        """Every pair once, largest timesteps first."""
        for indices in self._parts():
            yield self.make(indices, device)

    def make(self, indices: Tensor, device: torch.device | str = "cpu") -> Batch:
        """The batch of some pairs, which must be of one timestep.

        Args:
            indices: int64 [B] into the pairs.
            device: where its tensors go.
        """
        times = self.inputs.timesteps[indices]
        if bool((times != times[0]).any()):
            raise CalibrationError(f"replay: pairs of timesteps {times.tolist()} in one call")
        tensors = {"sample": self.inputs.sample, **self.inputs.arguments}
        flat = {name: t[indices].flatten(0, 1).to(device) for name, t in tensors.items()}
        return Batch(indices, float(times[0]), flat.pop("sample"), flat)

    def call(self, denoiser: nn.Module, batch: Batch) -> Tensor:
        """The denoiser's prediction for a batch, [B * H, C, h, w]."""
        timestep = torch.tensor(batch.timestep, device=batch.sample.device)
        if batch.timestep.is_integer():
            timestep = timestep.long()
        constants = {k: v for k, v in self.inputs.constants.items() if k != "return_dict"}
        found = denoiser(batch.sample, timestep, **batch.arguments, **constants)
        if isinstance(found, Tensor):
            return found
        first: Tensor = found[0]
        return first

    def guided(self, prediction: Tensor) -> Tensor:
        """What the sampler is given of a prediction [B * H, C, h, w]: [B, C, h, w].

            e = e_u + g (e_c - e_u)                                                         (1)

        Raises:
            CalibrationError: if pairs have two halves and `guidance` is None, or more than two.
        """
        halves = int(self.inputs.sample.shape[1])
        if halves not in (1, 2):
            raise CalibrationError(
                f"inputs: {halves} samples a pair, needs 1, or 2 with guidance; record again"
            )
        if halves == 1:
            return prediction
        if self.guidance is None:
            raise CalibrationError(
                "inputs: pairs have two halves, and the guidance scale that combines them is not "
                "known; pass a calibration or the whole pipeline"
            )
        first, last = prediction.unflatten(0, (-1, 2)).unbind(dim=1)
        return first + self.guidance * (last - first)

    def _parts(self) -> list[Tensor]:
        times = self.inputs.timesteps
        values = times.unique(sorted=True).flip(0)
        return [
            part for v in values for part in torch.nonzero(times == v).flatten().split(self.batch)
        ]
