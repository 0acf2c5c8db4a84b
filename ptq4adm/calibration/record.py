"""Runs prompts through a float model and records the inputs of every layer that could be quantized.

Knows models only through `ptq4adm.protocols.DenoiserAdapter`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ptq4adm.calibration.fingerprint import fingerprint
from ptq4adm.calibration.hooks import LayerHooks
from ptq4adm.calibration.inputs import InputRecorder
from ptq4adm.calibration.prompts import check_prompts, prompts_hash
from ptq4adm.calibration.selection import Selection
from ptq4adm.calibration.signatures import scheduler_settings
from ptq4adm.calibration.storage import Calibration, CalibrationMeta
from ptq4adm.errors import (
    CalibrationError,
    CalibrationMismatchError,
    ConfigError,
    NonFiniteError,
)
from ptq4adm.protocols import DenoiserAdapter
from ptq4adm.quant.buckets import TimestepBuckets
from ptq4adm.quant.observers import HistogramObserver

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunSettings:
    """How the prompts are run.

    Args:
        steps: denoising steps.
        guidance: classifier-free guidance scale.
        seed: prompt i starts from the noise of seed + i.
        buckets: timestep buckets with their own scales.
        batch: prompts run at once; changes no result but rounding, and the choice of
            "density-diversity", whose features are of the first batch.

    Raises:
        ConfigError: if a value is out of range.
    """

    steps: int
    guidance: float
    seed: int = 0
    buckets: int = 10
    batch: int = 4

    def __post_init__(self) -> None:
        for name in ("steps", "buckets", "batch"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name}: got {value!r}, needs a whole number of at least 1")


class ActivationRecorder(LayerHooks):
    """Hooks that fill histograms of every layer's input.

    Args:
        denoiser: the float model.
        buckets: which timesteps share a histogram.
        segments: module name to the channels of the two parts of its input.
        calibration: records to go on from, or None.
        selection: the pairs that are recorded; None for all.
        inputs: keeps what the denoiser is given at them; None for nothing.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        buckets: TimestepBuckets,
        segments: dict[str, tuple[int, int]],
        calibration: Calibration | None = None,
        selection: Selection | None = None,
        inputs: InputRecorder | None = None,
    ) -> None:
        super().__init__(denoiser, segments)
        self.buckets, self.selection, self.inputs = buckets, selection, inputs
        self.observers = {name: self._observers(name, calibration) for name in self.layers}
        self._first = 0
        self._bucket: int | None = None
        # of the batch's prompts, those whose running step was chosen
        self._chosen: list[int] = []

    def start(self, prompts: Sequence[str], first: int) -> None:
        """Name the prompts of the run that follows; `first` is the index of the first one."""
        self.start_batch(prompts)
        self._first = first

    def begin_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find the step's bucket, and the samples of it that were chosen."""
        self._bucket = self.buckets.bucket_of(self.timestep)
        if self.selection is None:
            return
        first, count = self._first, len(self.prompts)
        self._chosen = [i for i in range(count) if (first + i, self.step) in self._pairs]
        if self.inputs is not None and self._chosen:
            if len(args) > 2 or not (args or "sample" in kwargs):
                raise CalibrationError(
                    f"inputs: the denoiser was called with {len(args)} arguments by position and "
                    f"{', '.join(kwargs) or 'none'} by name, and is recorded where it is called as "
                    "(sample, timestep, name=...); pass the others by name, or record no inputs"
                )
            # diffusers' name of the first argument
            given = {**kwargs, "sample": args[0] if args else kwargs["sample"]}
            halves = self.halves("sample", given["sample"])
            for i in self._chosen:
                rows = i + torch.arange(halves) * count
                self.inputs.add((first + i, self.step), self.timestep, rows, given)

    def see(self, name: str, x: Tensor, parts: Sequence[Tensor]) -> None:
        """Add one input, or its chosen samples, to the layer's histograms."""
        assert self._bucket is not None
        rows = None
        if self.selection is not None:
            if not self._chosen:
                return
            half = torch.arange(self.halves(name, x)) * len(self.prompts)
            rows = (half[:, None] + torch.tensor(self._chosen)).flatten().to(x.device)
        for part, observer in zip(parts, self.observers[name], strict=True):
            try:
                observer.observe(part if rows is None else part[rows], self._bucket)
            except NonFiniteError as error:
                raise NonFiniteError(self.describe_failure(name, x)) from error

    def calibration(self, meta: CalibrationMeta) -> Calibration:
        """A copy of what was recorded so far."""
        records = {
            name: tuple(observer.record() for observer in observers)
            for name, observers in self.observers.items()
        }
        return Calibration(meta, records, self.selection)

    @cached_property
    def _pairs(self) -> frozenset[tuple[int, int]]:
        return frozenset(() if self.selection is None else self.selection.pairs)

    def _observers(
        self, name: str, calibration: Calibration | None
    ) -> tuple[HistogramObserver, ...]:
        if calibration is not None:
            return tuple(HistogramObserver.from_record(r) for r in calibration.records[name])
        return tuple(HistogramObserver(self.buckets.count) for _ in self.segments.get(name, (0,)))


def record(
    adapter: DenoiserAdapter,
    pipe: Any,
    prompts: Sequence[str],
    settings: RunSettings,
    *,
    progress: bool = True,
    cache: str | Path | None = None,
    selection: Selection | None = None,
    inputs: InputRecorder | None = None,
) -> Calibration:
    """Run prompts and record what the denoiser's layers saw.

    Args:
        adapter: how the model is run.
        pipe: the float pipeline; it is not changed.
        prompts: none empty.
        settings: how they are run.
        progress: show a bar on a terminal.
        cache: folder that keeps the records after each batch. A call with the same model,
            scheduler, prompts and settings goes on where an interrupted one stopped, and returns at
            once if one was finished.
        selection: record these (prompt, step) pairs only, and run no prompt without one; None for
            all.
        inputs: keeps what the denoiser is given at them. Nothing is taken from the cache then: it
            holds no inputs.

    Raises:
        PromptError: if a prompt is empty.
        NonFiniteError: if an activation is NaN or infinite; names layer, step and prompt.
        CalibrationMismatchError: if the selection is another model's, scheduler's or run's.
        OutputError: if the cache cannot be written.
    """
    texts = check_prompts(prompts)
    denoiser = adapter.denoiser(pipe)
    meta = CalibrationMeta(
        fingerprint=fingerprint(denoiser),
        prompts_hash=prompts_hash(texts),
        prompt_count=0,
        steps=settings.steps,
        guidance=float(settings.guidance),
        seed=settings.seed,
        buckets=settings.buckets,
        num_train_timesteps=adapter.num_train_timesteps(pipe),
    )
    if selection is not None:
        _check_selection(selection, meta, denoiser, pipe)
    path = None
    if cache is not None:
        path = _cache_file(Path(cache), meta, scheduler_settings(pipe), selection)
    earlier = _read_cache(path, meta) if inputs is None else None
    done = 0 if earlier is None else earlier.meta.prompt_count
    if earlier is not None and done >= len(texts):
        # the same pairs may have been chosen by another strategy, in another order
        return replace(earlier, selection=selection)
    # no bucket has scales yet: the recorder only asks which bucket a timestep is in
    buckets = TimestepBuckets(meta.num_train_timesteps, (False,) * settings.buckets)
    recorder = ActivationRecorder(
        denoiser, buckets, adapter.segments(denoiser), earlier, selection, inputs
    )
    wanted = range(len(texts)) if selection is None else selection.prompts()
    bar = tqdm(
        total=len(wanted) * settings.steps,
        initial=sum(prompt < done for prompt in wanted) * settings.steps,
        desc="calibrate",
        unit="step",
        disable=None if progress else True,
    )
    with bar, recorder:
        for run in _runs([prompt for prompt in wanted if prompt >= done], settings.batch):
            recorder.start(texts[run.start : run.stop], run.start)
            adapter.run(
                pipe,
                recorder.prompts,
                steps=settings.steps,
                guidance=settings.guidance,
                seed=settings.seed + run.start,
                on_step=lambda *_: bar.update(len(recorder.prompts)),
            )
            # prompts of which nothing was chosen are done, too
            meta = replace(meta, prompt_count=len(texts) if run.stop > wanted[-1] else run.stop)
            if path is not None:
                recorder.calibration(meta).save(path)
    return recorder.calibration(meta)


def _runs(prompts: Sequence[int], batch: int) -> Iterator[range]:
    """Neighbouring prompts, up to `batch` at once: sample i of a run has the noise of seed + i."""
    start = 0
    for i, prompt in enumerate(prompts):
        is_last = i + 1 == len(prompts) or prompts[i + 1] != prompt + 1 or i + 1 - start == batch
        if is_last:
            yield range(prompts[start], prompt + 1)
            start = i + 1


def _check_selection(
    selection: Selection, meta: CalibrationMeta, denoiser: nn.Module, pipe: Any
) -> None:
    selection.meta.check(denoiser, pipe)
    for name in ("prompts_hash", "steps", "guidance", "seed"):
        chosen, given = getattr(selection.meta, name), getattr(meta, name)
        if chosen != given:
            raise CalibrationMismatchError(
                f"selection was made with {name} {chosen!r}, this run has {given!r}; run as it was "
                "made, or choose again"
            )


def _cache_file(
    folder: Path, meta: CalibrationMeta, scheduler: str, selection: Selection | None
) -> Path:
    content = json.dumps([asdict(meta), scheduler], sort_keys=True)
    content += "" if selection is None else selection.digest()
    key = hashlib.sha256(content.encode()).hexdigest()[:16]
    return folder / f"calibration-{key}.safetensors"


def _read_cache(path: Path | None, meta: CalibrationMeta) -> Calibration | None:
    if path is None or not path.is_file():
        return None
    try:
        earlier = Calibration.load(path)
    except CalibrationError as error:
        logger.warning("calibration cache is not readable and is made again: %s", error)
        return None
    if replace(earlier.meta, prompt_count=0) != meta:
        return None
    logger.info("calibration cache %s: %d prompts done", path, earlier.meta.prompt_count)
    return earlier
