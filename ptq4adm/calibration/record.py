"""Runs prompts through a float model and records the inputs of every layer that could be quantized.

Knows models only through `ptq4adm.protocols.DenoiserAdapter`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ptq4adm.calibration.fingerprint import fingerprint
from ptq4adm.calibration.prompts import check_prompts, prompts_hash
from ptq4adm.calibration.storage import Calibration, CalibrationMeta
from ptq4adm.errors import CalibrationError, ConfigError, NonFiniteError
from ptq4adm.protocols import DenoiserAdapter
from ptq4adm.quant.buckets import TimestepBuckets, find_timestep, single_timestep
from ptq4adm.quant.layers import quantizable_layers
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
        batch: prompts run at once; changes no result but rounding.

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


class ActivationRecorder:
    """Hooks on a denoiser and its layers that fill histograms; use it as a context.

    Args:
        denoiser: the float model.
        buckets: which timesteps share a histogram.
        segments: module name to the channels of the two parts of its input.
        calibration: records to go on from, or None.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        buckets: TimestepBuckets,
        segments: dict[str, tuple[int, int]],
        calibration: Calibration | None = None,
    ) -> None:
        self.denoiser = denoiser
        self.buckets = buckets
        self.layers = quantizable_layers(denoiser)
        if not self.layers:
            raise CalibrationError(
                f"{type(denoiser).__name__} has no float linear or convolution to record; "
                "calibrate a model before it is quantized"
            )
        self.segments = segments
        self.observers = {name: self._observers(name, calibration) for name in self.layers}
        self.prompts: Sequence[str] = ()
        self.calls = 0
        self._timestep = 0.0
        self._bucket: int | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> ActivationRecorder:
        self._handles.append(
            self.denoiser.register_forward_pre_hook(self._set_bucket, with_kwargs=True)
        )
        for name, layer in self.layers.items():
            self._handles.append(layer.register_forward_pre_hook(self._layer_hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def start_batch(self, prompts: Sequence[str]) -> None:
        """Name the prompts of the runs that follow, for messages."""
        self.prompts, self.calls = prompts, 0

    def calibration(self, meta: CalibrationMeta) -> Calibration:
        """A copy of what was recorded so far."""
        records = {
            name: tuple(observer.record() for observer in observers)
            for name, observers in self.observers.items()
        }
        return Calibration(meta, records)

    def _observers(
        self, name: str, calibration: Calibration | None
    ) -> tuple[HistogramObserver, ...]:
        if calibration is not None:
            return tuple(HistogramObserver.from_record(r) for r in calibration.records[name])
        return tuple(HistogramObserver(self.buckets.count) for _ in self.segments.get(name, (0,)))

    def _set_bucket(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._timestep = single_timestep(find_timestep(args, kwargs))
        self._bucket = self.buckets.bucket_of(self._timestep)
        self.calls += 1

    def _layer_hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        observers = self.observers[name]
        widths = self.segments.get(name)

        def observe(layer: nn.Module, args: tuple[Any, ...]) -> None:
            x: Tensor = args[0]
            channel_dim = 1 if isinstance(layer, nn.Conv2d) else -1
            parts = (x,) if widths is None else x.split(widths, dim=channel_dim)
            assert self._bucket is not None
            for part, observer in zip(parts, observers, strict=True):
                try:
                    observer.observe(part, self._bucket)
                except NonFiniteError as error:
                    raise NonFiniteError(self._describe_failure(name, x)) from error

        return observe

    def _describe_failure(self, name: str, x: Tensor) -> str:
        return (
            f"layer {name!r}: its input holds NaN or infinite values at step {self.calls} "
            f"(timestep {self._timestep:g}) of prompt {self._failed_prompts(x)}; "
            "look for broken weights before this layer, or run the model in float32"
        )

    def _failed_prompts(self, x: Tensor) -> str:
        """The prompts of the samples that are not finite; all if they cannot be told apart."""
        count = len(self.prompts)
        if count == 0 or x.dim() < 2 or x.shape[0] % count:
            return ", ".join(repr(p) for p in self.prompts)
        is_finite = torch.isfinite(x).flatten(1).all(dim=1)
        # with guidance the batch holds every prompt twice, one whole half after the other
        failed = sorted({int(i) % count for i in torch.nonzero(~is_finite)})
        return ", ".join(repr(self.prompts[i]) for i in failed or range(count))


def record(
    adapter: DenoiserAdapter,
    pipe: Any,
    prompts: Sequence[str],
    settings: RunSettings,
    *,
    progress: bool = True,
    cache: str | Path | None = None,
) -> Calibration:
    """Run every prompt and record what the denoiser's layers saw.

    Args:
        adapter: how the model is run.
        pipe: the float pipeline; it is not changed.
        prompts: none empty.
        settings: how they are run.
        progress: show a bar on a terminal.
        cache: folder that keeps the records after each batch. A call with the same model, prompts
            and settings goes on where an interrupted one stopped, and returns at once if one was
            finished.

    Raises:
        PromptError: if a prompt is empty.
        NonFiniteError: if an activation is NaN or infinite; names layer, step and prompt.
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
    path = None if cache is None else _cache_file(Path(cache), meta)
    earlier = _read_cache(path, meta)
    done = 0 if earlier is None else earlier.meta.prompt_count
    if earlier is not None and done >= len(texts):
        return earlier
    # no bucket has scales yet: the recorder only asks which bucket a timestep is in
    buckets = TimestepBuckets(meta.num_train_timesteps, (False,) * settings.buckets)
    recorder = ActivationRecorder(denoiser, buckets, adapter.segments(denoiser), earlier)
    total = len(texts) * settings.steps
    bar = tqdm(
        total=total,
        initial=done * settings.steps,
        desc="calibrate",
        unit="step",
        disable=None if progress else True,
    )
    with bar, recorder:
        for start in range(done, len(texts), settings.batch):
            part = texts[start : start + settings.batch]
            recorder.start_batch(part)
            adapter.run(
                pipe,
                part,
                steps=settings.steps,
                guidance=settings.guidance,
                seed=settings.seed + start,
                on_step=lambda *_: bar.update(len(recorder.prompts)),
            )
            meta = replace(meta, prompt_count=start + len(part))
            if path is not None:
                recorder.calibration(meta).save(path)
    return recorder.calibration(meta)


def _cache_file(folder: Path, meta: CalibrationMeta) -> Path:
    key = hashlib.sha256(json.dumps(asdict(meta), sort_keys=True).encode()).hexdigest()[:16]
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
