"""What the denoiser was given at the chosen pairs: for rounding and reconstruction later.

File: one safetensors file of `pairs` int64 [N, 2] (prompt, step), `timesteps` float64 [N], `sample`
[N, H, C, h, w] and one tensor [N, H, ...] for every tensor among the call's keyword arguments
(`argument.class_labels`, ...), over N pairs and H guidance halves; arguments that are None, numbers
or strings are in its header. The whole set is in memory while it is recorded, so its size has a
limit, checked at the first pair.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ptq4adm.calibration.files import write_tensors
from ptq4adm.calibration.fingerprint import check_fingerprint
from ptq4adm.errors import CalibrationError

FORMAT = "ptq4adm-inputs"
FORMAT_VERSION = 1
MAX_BYTES = 1 << 30
_PREFIX = "argument."
# arguments by which a denoiser is told the timestep: kept as numbers
_TIMES = ("timestep", "timesteps", "t")


@dataclass(frozen=True)
class ChosenInputs:
    """Inputs of N calls of a denoiser.

    Attributes:
        fingerprint: of the float denoiser.
        pairs: int64 [N, 2], (prompt, step).
        timesteps: float64 [N].
        sample: [N, H, C, h, w].
        arguments: keyword to [N, H, ...].
        constants: keyword to None, number or string, of every call alike.
    """

    fingerprint: str
    pairs: Tensor
    timesteps: Tensor
    sample: Tensor
    arguments: Mapping[str, Tensor]
    constants: Mapping[str, Any] = field(default_factory=dict)

    def check(self, denoiser: nn.Module) -> None:
        """Refuse another model.

        Raises:
            CalibrationMismatchError: if weights or config differ.
        """
        check_fingerprint(
            denoiser, self.fingerprint, "inputs were recorded", "record this model's own"
        )

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all.

        Raises:
            OutputError: if it cannot be written.
        """
        tensors = {"pairs": self.pairs, "timesteps": self.timesteps, "sample": self.sample}
        tensors |= {_PREFIX + name: tensor for name, tensor in self.arguments.items()}
        header = {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "fingerprint": self.fingerprint,
            "constants": json.dumps(dict(self.constants), sort_keys=True),
        }
        write_tensors(Path(path), tensors, header, "the inputs")

    @classmethod
    def load(cls, path: str | Path) -> ChosenInputs:
        """Read a file written by `save`.

        Raises:
            CalibrationError: if it is missing, truncated or of another kind.
        """
        try:
            with safe_open(Path(path), framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            if header["format"] != FORMAT or header["format_version"] != str(FORMAT_VERSION):
                raise CalibrationError(
                    f"{path}: {header['format']} {header['format_version']}, this version reads "
                    f"{FORMAT} {FORMAT_VERSION}; record again"
                )
            main = {name: tensors.pop(name) for name in ("pairs", "timesteps", "sample")}
            constants = json.loads(header["constants"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise CalibrationError(
                f"{path}: missing, truncated or not inputs of a calibration ({error!r}); record "
                "again"
            ) from error
        rest = {n.removeprefix(_PREFIX): t for n, t in tensors.items() if n.startswith(_PREFIX)}
        return cls(fingerprint=header["fingerprint"], arguments=rest, constants=constants, **main)


class InputRecorder:
    """Collects the inputs of chosen pairs.

    Args:
        size: pairs there will be.
        max_bytes: what all of them may take.
    """

    def __init__(self, size: int, max_bytes: int = MAX_BYTES) -> None:
        self.size, self.max_bytes = size, max_bytes
        self._pairs: list[tuple[int, int]] = []
        self._timesteps: list[float] = []
        self._parts: list[dict[str, Tensor]] = []
        self._constants: dict[str, Any] = {}

    def add(
        self,
        pair: tuple[int, int],
        timestep: float,
        rows: Tensor,
        arguments: Mapping[str, Any],
    ) -> None:
        """Keep one pair's rows of a call.

        Args:
            pair: (prompt, step).
            timestep: of the call.
            rows: int64 [H], the samples of this prompt in the batch.
            arguments: of the call, with `sample`.

        Raises:
            CalibrationError: if all pairs would take more than `max_bytes`.
        """
        batch = int(arguments["sample"].shape[0])
        part = {
            name: value.detach()[rows.to(value.device)].cpu().clone()
            for name, value in arguments.items()
            if isinstance(value, Tensor)
            and name not in _TIMES
            and value.dim() > 0
            and value.shape[0] == batch
        }
        needed = self.size * sum(t.numel() * t.element_size() for t in part.values())
        if needed > self.max_bytes:
            raise CalibrationError(
                f"inputs of {self.size} pairs take {needed / 2**20:.0f} MiB, the limit is "
                f"{self.max_bytes / 2**20:.0f} MiB; choose fewer pairs, or record no inputs"
            )
        plain = (bool, int, float, str, type(None))
        self._constants = {
            name: value
            for name, value in arguments.items()
            if isinstance(value, plain) and name not in _TIMES
        }
        self._pairs.append(pair)
        self._timesteps.append(timestep)
        self._parts.append(part)

    def result(self, model: str) -> ChosenInputs:
        """All that was kept, of the model with this fingerprint."""
        parts = {name: torch.stack([p[name] for p in self._parts]) for name in self._parts[0]}
        return ChosenInputs(
            fingerprint=model,
            pairs=torch.tensor(self._pairs),
            timesteps=torch.tensor(self._timesteps, dtype=torch.float64),
            sample=parts.pop("sample"),
            arguments=parts,
            constants=self._constants,
        )
