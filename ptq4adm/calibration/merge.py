"""One calibration from several, of parts of one list of prompts: exact, in any order the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ptq4adm.calibration.storage import Calibration
from ptq4adm.errors import CalibrationError, CalibrationMismatchError
from ptq4adm.quant.observers import HistogramObserver, HistogramRecord


def merge_calibrations(
    parts: Sequence[Calibration], *, prompts_hash: str, seed: int
) -> Calibration:
    """What would have been recorded if one run had made all of them.

    Args:
        parts: of one model with one set of settings, each of other prompts.
        prompts_hash: of the whole list.
        seed: of the whole list's first prompt.

    Raises:
        CalibrationError: if there is none.
        CalibrationMismatchError: if they are of different models, or were made in different ways.
    """
    if not parts:
        raise CalibrationError("calibrations: got none to merge, needs at least one")
    if any(part.selection is not None for part in parts):
        raise CalibrationMismatchError(
            "calibrations of chosen pairs cannot be merged: a choice is made from all prompts at "
            "once; calibrate in one process, or without a strategy"
        )
    metas = [
        replace(part.meta, prompts_hash=prompts_hash, prompt_count=0, seed=seed) for part in parts
    ]
    for part, meta in zip(parts, metas, strict=True):
        if meta != metas[0] or part.records.keys() != parts[0].records.keys():
            raise CalibrationMismatchError(
                f"calibrations of different models or settings cannot be merged: {metas[0]}, and "
                f"{meta}; calibrate all parts alike"
            )
    count = sum(part.meta.prompt_count for part in parts)
    records = {
        name: tuple(
            _merge([part.records[name][i] for part in parts]) for i, _ in enumerate(segments)
        )
        for name, segments in parts[0].records.items()
    }
    return Calibration(replace(metas[0], prompt_count=count), records)


def _merge(records: Sequence[HistogramRecord]) -> HistogramRecord:
    observer = HistogramObserver.from_record(records[0])
    for record in records[1:]:
        observer.add(record)
    return observer.record()
