"""Signatures: four numbers of every layer's input at every step of every prompt, on disk.

    folder/signatures.json         what was run: model, scheduler, prompts, sites
    folder/signatures-00008.safetensors    prompts 8, 9, ...: values float32 [B, S, R, H, 4]

over S steps, R sites (a layer, or one segment of its input), H guidance halves (unconditional
first) and the statistics absmax, 99.9th percentile of magnitudes, mean and root mean square. NaN
stands where a layer did not run. The files are written whole or not at all; no prompt is stored,
only hashes. Two shards at most are in memory at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ptq4adm.calibration.files import write_json, write_tensors
from ptq4adm.calibration.fingerprint import check_fingerprint
from ptq4adm.errors import CalibrationError, CalibrationMismatchError

FORMAT = "ptq4adm-signatures"
FORMAT_VERSION = 1
STATISTICS = ("absmax", "p999", "mean", "rms")
INDEX = "signatures.json"


@dataclass(frozen=True)
class SignatureMeta:
    """What was run.

    Attributes:
        fingerprint: of the float denoiser.
        scheduler: its class and settings, as JSON.
        prompts_hash: of the list of prompts.
        prompt_keys: one a prompt, of its text and the seed of its noise; what ties are broken by.
        steps: denoising steps of each run.
        guidance: classifier-free guidance scale.
        seed: of the first prompt's noise; prompt i has seed + i.
        num_train_timesteps: range of the timesteps.
        sites: layer names; "name[i]" for segment i of an input.
    """

    fingerprint: str
    scheduler: str
    prompts_hash: str
    prompt_keys: tuple[str, ...]
    steps: int
    guidance: float
    seed: int
    num_train_timesteps: int
    sites: tuple[str, ...]

    @property
    def halves(self) -> int:
        """H: 2 with guidance, which takes every prompt through the denoiser twice."""
        return 2 if self.guidance > 1.0 else 1

    def check(self, denoiser: nn.Module, pipe: Any) -> None:
        """Refuse another model or another scheduler than the one that was run.

        Raises:
            CalibrationMismatchError: if weights or settings differ; says which.
        """
        check_fingerprint(
            denoiser,
            self.fingerprint,
            "calibration set was recorded",
            "record this model's own",
        )
        settings = scheduler_settings(pipe)
        if settings != self.scheduler:
            raise CalibrationMismatchError(
                f"calibration set was recorded with another scheduler: {_difference(self, pipe)}; "
                "set the scheduler back, or record again"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe content."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> SignatureMeta:
        """From `to_dict`.

        Raises:
            KeyError: if an entry is missing.
        """
        values = {name: content[name] for name in cls.__dataclass_fields__}
        values["prompt_keys"] = tuple(values["prompt_keys"])
        values["sites"] = tuple(values["sites"])
        return cls(**values)


@dataclass(frozen=True)
class Signatures:
    """A folder of signatures; read shard by shard.

    Attributes:
        folder: where they are.
        meta: what was run.
        starts: first prompt of every shard, rising.
    """

    folder: Path
    meta: SignatureMeta
    starts: tuple[int, ...]

    @property
    def done(self) -> int:
        """Prompts that are recorded, from the first one on without a gap."""
        done = 0
        for start in self.starts:
            if start != done:
                break
            done = start + self._prompts_in(start)
        return done

    @property
    def timesteps(self) -> Tensor:
        """Timestep of every step, float64 [S]."""
        return self._read(0)["timesteps"]

    @property
    def features(self) -> Tensor:
        """What the middle of the model saw at every step, of the first batch: float32 [S, F]."""
        return self._read(0)["features"]

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """First prompt and values float32 [B, S, R, H, 4] of every shard."""
        for start in self.starts:
            yield start, self._read(start)["values"]

    def _prompts_in(self, start: int) -> int:
        try:
            with safe_open(shard_path(self.folder, start), framework="pt") as file:
                return int(file.get_slice("values").get_shape()[0])
        except (OSError, SafetensorError) as error:
            raise _unreadable(shard_path(self.folder, start), error) from error

    def _read(self, start: int) -> dict[str, Tensor]:
        path = shard_path(self.folder, start)
        try:
            tensors: dict[str, Tensor] = load_file(path)
            shape = tensors["values"].shape[1:]
        except (OSError, SafetensorError, KeyError) as error:
            raise _unreadable(path, error) from error
        meta = self.meta
        expected = (meta.steps, len(meta.sites), meta.halves, len(STATISTICS))
        if tuple(shape) != expected:
            raise CalibrationError(
                f"{path}: values of a prompt are {list(shape)}, needs {list(expected)}; delete it "
                "and record again"
            )
        return tensors


def _unreadable(path: Path, error: Exception) -> CalibrationError:
    return CalibrationError(
        f"{path}: missing, truncated or not signatures ({error}); delete it and record again"
    )


def open_signatures(folder: str | Path) -> Signatures:
    """Open a folder of signatures, finished or not.

    Raises:
        CalibrationError: if there is none, or it cannot be read.
    """
    folder = Path(folder)
    path = folder / INDEX
    if not path.is_file():
        raise CalibrationError(f"{path}: no such file; record signatures first")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT or content["format_version"] != FORMAT_VERSION:
            raise CalibrationError(
                f"{path}: {content['format']} {content['format_version']}, this version reads "
                f"{FORMAT} {FORMAT_VERSION}; record again"
            )
        meta = SignatureMeta.from_dict(content["meta"])
    except (KeyError, TypeError, OSError, json.JSONDecodeError) as error:
        raise CalibrationError(f"{path}: broken ({error!r}); record again") from error
    return Signatures(folder, meta, tuple(_starts(folder)))


def write_index(folder: Path, meta: SignatureMeta) -> None:
    """Write the folder's description."""
    content = {"format": FORMAT, "format_version": FORMAT_VERSION, "meta": meta.to_dict()}
    write_json(folder / INDEX, content, "signatures")


def write_shard(folder: Path, start: int, tensors: Mapping[str, Tensor]) -> None:
    """Write the signatures of prompts `start`, `start` + 1, ..."""
    header = {"format": FORMAT, "format_version": str(FORMAT_VERSION)}
    write_tensors(shard_path(folder, start), tensors, header, "signatures")


def remove_shards(folder: Path, first: int) -> None:
    """Delete the shards whose first prompt is `first` or a later one."""
    for start in _starts(folder):
        if start >= first:
            shard_path(folder, start).unlink()


def shard_path(folder: Path, start: int) -> Path:
    """File of the shard whose first prompt is `start`."""
    return folder / f"signatures-{start:05d}.safetensors"


def _starts(folder: Path) -> list[int]:
    """First prompt of every shard, rising."""
    return sorted(int(p.stem.rsplit("-", 1)[1]) for p in folder.glob("signatures-*.safetensors"))


def scheduler_settings(pipe: Any) -> str:
    """Class and settings of a pipeline's scheduler, as JSON; "{}" if it has none."""
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None:
        return "{}"
    config = getattr(scheduler, "config", {})
    # private entries name folders and library versions
    settings = {str(k): v for k, v in dict(config).items() if not str(k).startswith("_")}
    return json.dumps({"class": type(scheduler).__name__, **settings}, sort_keys=True, default=str)


def prompt_keys(prompts: Sequence[str], seed: int) -> tuple[str, ...]:
    """16 hex digits a prompt, of its text and the seed of its noise."""
    texts = [json.dumps([text, seed + i]) for i, text in enumerate(prompts)]
    return tuple(hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts)


def empty_values(count: int, meta: SignatureMeta) -> Tensor:
    """Values of `count` prompts of which nothing was seen: NaN [B, S, R, H, 4]."""
    return torch.full((count, meta.steps, len(meta.sites), meta.halves, len(STATISTICS)), torch.nan)


def _difference(meta: SignatureMeta, pipe: Any) -> str:
    """The settings in which two schedulers differ."""
    then, now = json.loads(meta.scheduler), json.loads(scheduler_settings(pipe))
    names = sorted(n for n in then.keys() | now.keys() if then.get(n) != now.get(n))
    return ", ".join(f"{n} was {then.get(n)!r}, is {now.get(n)!r}" for n in names)
