"""`calibrate`: a pipeline's own defaults, the choice of what is recorded, and the recording."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ptq4adm.calibration import (
    Calibration,
    CalibrationStrategy,
    InputRecorder,
    RunSettings,
    Selection,
    SelectionSettings,
    default_prompts,
    fingerprint,
    prompts_hash,
    record,
    record_signatures,
    select_pairs,
)
from ptq4adm.calibration.prompts import check_prompts
from ptq4adm.calibration.signatures import scheduler_settings
from ptq4adm.config import DEFAULT_BUCKETS
from ptq4adm.errors import ConfigError
from ptq4adm.models import find_adapter
from ptq4adm.nn.replace import check_finite
from ptq4adm.packing.checkpoint import is_quantized
from ptq4adm.protocols import DenoiserAdapter, SamplingDefaults

logger = logging.getLogger(__name__)

# unless told: scales belong to buckets of timesteps, and more steps fall into the same ones
_MOST_STEPS = 25


def calibrate(  # noqa: PLR0913 - how prompts are run is one flat list of numbers
    pipe: Any,
    prompts: Sequence[str] | None = None,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    buckets: int | None = None,
    batch: int = 4,
    progress: bool = True,
    cache: str | Path | None = None,
    strategy: str | CalibrationStrategy | SelectionSettings | None = None,
    size: int | None = None,
    inputs: str | Path | None = None,
    adapter: DenoiserAdapter | None = None,
) -> Calibration:
    """Run prompts through a float pipeline and record what its denoiser's layers see.

    With a strategy the prompts run twice: once for signatures of every (prompt, step) pair, and
    those with a chosen pair again, to record what the layers see at the chosen pairs alone.

    Args:
        pipe: the pipeline; it is not changed.
        prompts: None for the listed ones of `ptq4adm.calibration.default_prompts`.
        steps: denoising steps; None for the pipeline's own number, at most 25.
        guidance: classifier-free guidance scale; None for the pipeline's own.
        seed: prompt i starts from the noise of seed + i; also the seed of the choice.
        buckets: timestep buckets with their own scales; None for ten, or one a step if there are
            fewer steps.
        batch: prompts run at once.
        progress: show a bar on a terminal.
        cache: folder in which an interrupted calibration goes on, and a finished one is found
            again.
        strategy: which pairs are recorded: "activation-aware", "random", "uniform-steps",
            "skewed-steps", "density-diversity", a function like them, or `SelectionSettings` for
            more than a name; None records all.
        size: pairs to choose; None for 256, or all if there are fewer.
        inputs: file that keeps what the denoiser is given at the chosen pairs; needs a strategy.
        adapter: for a model of no known family; None finds the family's.

    Returns:
        The records; with a strategy its `selection` has the pairs, what they cover, and warnings.

    Raises:
        PromptError: if a prompt is empty.
        ConfigError: if the strategy is unknown, or the size does not fit the prompts and buckets.
        NonFiniteError: if a weight or an activation is NaN or infinite.
        MissingComponentError: if `pipe` is a bare denoiser.
        OutputError: if a file cannot be written.
    """
    chosen_by = _selection_settings(strategy, size, seed)
    if chosen_by is None and (size is not None or inputs is not None):
        given = "size" if size is not None else "inputs"
        raise ConfigError(
            f"{given}: is of a choice of pairs, and strategy is None, which records all; name a "
            "strategy, such as 'activation-aware'"
        )
    adapter = adapter or find_adapter(pipe)
    defaults = adapter.sampling_defaults(pipe)
    steps = calibration_steps(defaults) if steps is None else steps
    settings = RunSettings(
        steps=steps,
        guidance=defaults.guidance if guidance is None else guidance,
        seed=seed,
        buckets=min(DEFAULT_BUCKETS, steps) if buckets is None else buckets,
        batch=batch,
    )
    denoiser = adapter.denoiser(pipe)
    check_float(denoiser)
    check_finite(denoiser)
    texts = check_prompts(default_prompts() if prompts is None else prompts)
    if chosen_by is None:
        return record(adapter, pipe, texts, settings, progress=progress, cache=cache)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if cache is not None:
            folder = Path(cache) / f"signatures-{_run_key(pipe, denoiser, texts, settings)}"
        signatures = record_signatures(adapter, pipe, texts, settings, folder, progress=progress)
        selection = select_pairs(signatures, settings.buckets, chosen_by)
    _tell(selection)
    kept = None if inputs is None else InputRecorder(len(selection.pairs))
    calibration = record(
        adapter,
        pipe,
        texts,
        settings,
        progress=progress,
        cache=cache,
        selection=selection,
        inputs=kept,
    )
    if kept is not None and inputs is not None:
        kept.result(calibration.meta.fingerprint).save(inputs)
    return calibration


def calibration_steps(defaults: SamplingDefaults) -> int:
    """Steps that a calibration takes, unless told."""
    return min(defaults.steps, _MOST_STEPS)


def check_float(denoiser: nn.Module) -> None:
    """Refuse a model that is quantized.

    Raises:
        ConfigError: if it is.
    """
    if is_quantized(denoiser):
        raise ConfigError(
            f"{type(denoiser).__name__} is quantized already; load the float model to calibrate or "
            "quantize it"
        )


def _selection_settings(
    strategy: str | CalibrationStrategy | SelectionSettings | None, size: int | None, seed: int
) -> SelectionSettings | None:
    if strategy is None:
        return None
    if not isinstance(strategy, SelectionSettings):
        return SelectionSettings(strategy=strategy, size=size, seed=seed)
    if size is not None:
        raise ConfigError("size: is in the settings that `strategy` is; give it there")
    return strategy


def _run_key(pipe: Any, denoiser: nn.Module, texts: list[str], settings: RunSettings) -> str:
    """What signatures depend on, 16 hex digits: other runs have folders of their own."""
    run = [settings.steps, float(settings.guidance), settings.seed]
    content = [fingerprint(denoiser), scheduler_settings(pipe), prompts_hash(texts), run]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _tell(selection: Selection) -> None:
    logger.info(
        "%s chose %d pairs of %d prompts: %.1f %% of the range bins, %.3f from the bulk",
        selection.strategy,
        len(selection.pairs),
        len(selection.meta.prompt_keys),
        100 * selection.coverage,
        selection.distance,
    )
    for warning in selection.warnings:
        logger.warning("calibration set: %s", warning)
