"""The calibration of one model: histograms of every layer's inputs, and the file that holds them.

File: one safetensors file. Tensors `counts` int64 [R, T, bins], `exponent` int64 [R, T], `minimum`
    and `maximum`
float32 [R, T] over R records; the header names the records and holds the metadata. It stores no
prompt, only a hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ptq4adm.calibration.files import write_tensors
from ptq4adm.calibration.fingerprint import check_fingerprint
from ptq4adm.calibration.selection import Selection
from ptq4adm.errors import CalibrationError
from ptq4adm.quant.buckets import TimestepBuckets
from ptq4adm.quant.observers import BINS, HistogramRecord, scale_table

FORMAT = "ptq4adm-calibration"
FORMAT_VERSION = 1
_TENSORS = ("counts", "exponent", "minimum", "maximum")


@dataclass(frozen=True)
class CalibrationMeta:
    """How a calibration was made.

    Attributes:
        fingerprint: of the float denoiser.
        prompts_hash: of the list of prompts.
        prompt_count: prompts run so far; a finished calibration has run all.
        steps: denoising steps of each run.
        guidance: classifier-free guidance scale.
        seed: of the first prompt's noise; prompt i has seed + i.
        buckets: timestep buckets T.
        num_train_timesteps: range of the timesteps.
    """

    fingerprint: str
    prompts_hash: str
    prompt_count: int
    steps: int
    guidance: float
    seed: int
    buckets: int
    num_train_timesteps: int


@dataclass(frozen=True)
class Calibration:
    """What every layer of one model saw.

    Attributes:
        meta: how it was made.
        records: module name to its records, one for each segment of the input.
        selection: the (prompt, step) pairs that were recorded; None for all.
    """

    meta: CalibrationMeta
    records: Mapping[str, tuple[HistogramRecord, ...]]
    selection: Selection | None = None

    @property
    def buckets(self) -> TimestepBuckets:
        """The timestep buckets, and which of them were reached."""
        seen = torch.zeros(self.meta.buckets, dtype=torch.bool)
        for segments in self.records.values():
            for record in segments:
                seen |= record.seen
        return TimestepBuckets(self.meta.num_train_timesteps, tuple(bool(s) for s in seen))

    def scales(self, name: str, observer: str, percentile: float = 99.999) -> Tensor | None:
        """Activation scales of one layer.

        Args:
            name: module name.
            observer: "absmax", "percentile", "squared_error" or "p2.4".
            percentile: in percent, for "percentile".

        Returns:
            float32 [segments, T], or None if the runs never reached the layer.
        """
        if not self.is_recorded(name):
            return None
        tables = [scale_table(record, observer, percentile) for record in self.records[name]]
        return torch.stack(tables)

    def is_recorded(self, name: str) -> bool:
        """Whether the runs reached a layer."""
        records = self.records.get(name, ())
        return bool(records) and all(bool(record.seen.any()) for record in records)

    def rows_per_step(self, name: str, layer: nn.Linear | nn.Conv2d) -> int | None:
        """Rows M of a layer's product in one denoising step of one prompt.

        With guidance that is a batch of two. It follows from how many numbers the layer read; of a
        convolution with stride and an odd size it may be a few too few.

        Args:
            name: of the layer.
            layer: for its sizes.

        Returns:
            At least 1; None if the runs never reached the layer.
        """
        if not self.is_recorded(name) or not self.meta.prompt_count:
            return None
        values = sum(int(record.counts.sum()) for record in self.records[name])
        pairs = self.meta.prompt_count * self.meta.steps
        if self.selection is not None:
            pairs = len(self.selection.pairs)
        rows = values / (pairs * layer.weight.shape[1])
        if isinstance(layer, nn.Conv2d):
            rows /= layer.stride[0] * layer.stride[1]
        return max(1, round(rows))

    def check(self, denoiser: nn.Module) -> None:
        """Refuse a model other than the one that was run.

        Raises:
            CalibrationMismatchError: if its config, tensor names, shapes or values differ.
        """
        check_fingerprint(
            denoiser,
            self.meta.fingerprint,
            "calibration was recorded",
            "calibrate this model, before it is quantized",
        )

    def digest(self) -> str:
        """SHA-256 of everything in it, 16 hex digits: what a checkpoint keeps of it."""
        digest = hashlib.sha256(json.dumps(asdict(self.meta), sort_keys=True).encode())
        digest.update(json.dumps(self._record_names()).encode())
        if self.selection is not None:
            digest.update(self.selection.digest().encode())
        for _, tensor in sorted(self._tensors().items()):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Write the file; an interrupted call leaves the old file or none.

        Raises:
            OutputError: if it cannot be written.
        """
        path = Path(path)
        header = {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "meta": json.dumps(asdict(self.meta)),
            "records": json.dumps(self._record_names()),
        }
        if self.selection is not None:
            header["selection"] = json.dumps(self.selection.to_dict())
        write_tensors(path, self._tensors(), header, "the calibration")

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read a file written by `save`.

        Raises:
            CalibrationError: if it is missing, truncated, of another kind or of an unknown version.
        """
        path = Path(path)
        if not path.is_file():
            raise CalibrationError(
                f"{path}: no such file; make it with `calibrate(...).save(path)`"
            )
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                _check_header(path, header)
                tensors = {name: file.get_tensor(name) for name in _TENSORS}
        except (SafetensorError, OSError) as error:
            raise CalibrationError(
                f"{path}: truncated or not a calibration ({error}); calibrate again"
            ) from error
        try:
            values = json.loads(header["meta"])
            meta = CalibrationMeta(**{f.name: values[f.name] for f in fields(CalibrationMeta)})
            names = [(str(name), int(count)) for name, count in json.loads(header["records"])]
            chosen = json.loads(header.get("selection", "null"))
            selection = None if chosen is None else Selection.from_dict(chosen)
        except (KeyError, TypeError, ValueError) as error:
            raise CalibrationError(f"{path}: broken header ({error!r}); calibrate again") from error
        return cls(meta, _split_records(path, meta, names, tensors), selection)

    def _record_names(self) -> list[tuple[str, int]]:
        return [(name, len(segments)) for name, segments in self.records.items()]

    def _tensors(self) -> dict[str, Tensor]:
        records = [record for segments in self.records.values() for record in segments]
        if not records:
            raise CalibrationError("calibration holds no records; run at least one prompt")
        return {
            name: torch.stack([getattr(record, name) for record in records]) for name in _TENSORS
        }


def _check_header(path: Path, header: dict[str, str]) -> None:
    if header.get("format") != FORMAT:
        raise CalibrationError(
            f"{path}: a safetensors file, but not a calibration; make one with `calibrate`"
        )
    if header.get("format_version") != str(FORMAT_VERSION):
        raise CalibrationError(
            f"{path}: calibration format {header.get('format_version')}, this version reads "
            f"{FORMAT_VERSION}; "
            "calibrate again, or upgrade ptq4adm"
        )


def _split_records(
    path: Path, meta: CalibrationMeta, names: list[tuple[str, int]], tensors: dict[str, Tensor]
) -> dict[str, tuple[HistogramRecord, ...]]:
    shape = (sum(count for _, count in names), meta.buckets)
    expected: dict[str, Any] = {
        "counts": (*shape, BINS),
        "exponent": shape,
        "minimum": shape,
        "maximum": shape,
    }
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected[name]:
            raise CalibrationError(
                f"{path}: {name} is {list(tensor.shape)}, needs {list(expected[name])}; calibrate "
                "again"
            )
    records, start = {}, 0
    for name, count in names:
        records[name] = tuple(
            HistogramRecord(*(tensors[key][i] for key in _TENSORS))
            for i in range(start, start + count)
        )
        start += count
    return records
