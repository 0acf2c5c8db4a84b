"""The main job: config, model family and calibration become a plan, the plan packed modules.

Everything that can be refused is refused before a module is touched. `save_pipeline` and
`load_pipeline` keep the result in an ordinary diffusers folder.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ptq4adm.calibrating import calibrate, check_float
from ptq4adm.calibration import Calibration, ChosenInputs
from ptq4adm.config import DEFAULT_BUCKETS, QuantConfig, Scheme
from ptq4adm.errors import (
    CalibrationError,
    CalibrationMismatchError,
    MissingComponentError,
    NonFiniteError,
)
from ptq4adm.models import TextToAudioPipeline, families, find_adapter, save_components
from ptq4adm.nn import StepIndex, StorageLayer, attach_step_hook
from ptq4adm.nn.conv import padding_reason, unsupported_reason
from ptq4adm.nn.fuse import fuse_blocks
from ptq4adm.nn.replace import check_finite, check_hooks, replace_layers
from ptq4adm.ops import resolve_backend
from ptq4adm.packing.checkpoint import QuantState, is_quantized, mark_quantized, save_denoiser
from ptq4adm.packing.folders import atomic_folder
from ptq4adm.protocols import DenoiserAdapter
from ptq4adm.quant.layers import quantizable_layers
from ptq4adm.quant.plan import PlanRow, QuantPlan, choose_schemes, plan_row
from ptq4adm.replacing import layer_tasks, planned_layer, put_rows
from ptq4adm.rounding import Replay, Rounder
from ptq4adm.rounding.methods import ROUNDERS, check_rounder

__all__ = [
    "PlanRow",
    "QuantPlan",
    "calibrate",
    "load_pipeline",
    "plan",
    "quantize",
    "save_pipeline",
]

logger = logging.getLogger(__name__)


def plan(
    pipe: Any,
    config: QuantConfig | None = None,
    calibration: Calibration | None = None,
    *,
    assignment: Mapping[str, str] | None = None,
    adapter: DenoiserAdapter | None = None,
) -> QuantPlan:
    """What `quantize` would do; nothing is changed, and no calibration is needed to ask.

    Args:
        pipe: a pipeline, or a bare denoiser.
        config: None for the default.
        calibration: None counts the scale tables of ten buckets.
        assignment: layer to scheme, of `ptq4adm.assign_schemes`; the config's overrides win over
            it.
        adapter: for a model of no known family; None finds the family's.

    Raises:
        PatternError: if an override matches no layer, or an assigned layer does not exist.
        CalibrationMismatchError: if the calibration is another model's.
    """
    return _Job(pipe, config or QuantConfig(), calibration, adapter, assignment or {}).plan()


def quantize(
    pipe: Any,
    config: QuantConfig | None = None,
    calibration: Calibration | None = None,
    *,
    inputs: ChosenInputs | str | Path | None = None,
    rounder: Rounder | None = None,
    progress: bool = True,
    assignment: Mapping[str, str] | None = None,
    adapter: DenoiserAdapter | None = None,
) -> QuantPlan:
    """Replace the layers of a pipeline's denoiser, or of a bare one, in place, and fuse its blocks.

    All checks come first and all new modules are made before the first is put in: a call that fails
    or is interrupted leaves the model as it was.

    Args:
        pipe: a pipeline, or a bare denoiser.
        config: None for the default, W4A8.
        calibration: of this very model; not needed with `activation="dynamic"`.
        inputs: what `calibrate(..., inputs=FILE)` kept of this very model, or its file; needed for
            every `rounding` but "nearest".
        rounder: the method that `config.rounding` names, with other settings than its default.
        progress: show a bar on a terminal.
        assignment: layer to scheme, of `ptq4adm.assign_schemes`; the config's overrides win over
            it.
        adapter: for a model of no known family; None finds the family's.

    Returns:
        What was done.

    Raises:
        CalibrationError: if activations are to be static and there is no calibration, or the
            rounding looks at inputs and there are none.
        CalibrationMismatchError: if the calibration or the inputs are another model's.
        NonFiniteError: if a weight is NaN or infinite; names it.
        PatternError: if an override matches no layer, or an assigned layer does not exist.
        UnsupportedLayerError: if an override asks for what a layer cannot be.
        BackendUnavailableError: if the named backend cannot run here.
        ConfigError: if the model is quantized already, or a rounder is given for "nearest" or for
            another method than its own.
    """
    job = _Job(pipe, config or QuantConfig(), calibration, adapter, assignment or {})
    if rounder is not None:
        check_rounder(rounder, job.config.rounding)
    job.check(inputs)
    job.rounder = rounder
    result = job.plan()
    job.apply(result, progress)
    logger.info("quantized %s: %s", type(job.denoiser).__name__, result.summary())
    return result


def save_pipeline(pipe: Any, out: str | Path, *, overwrite: bool = False) -> Path:
    """Write a pipeline, quantized or not, as a diffusers folder; all of it or nothing.

    Args:
        pipe: of this package or of diffusers.
        out: the folder; made, with its parents.
        overwrite: whether a folder with content may be replaced.

    Returns:
        The folder's absolute path.

    Raises:
        OutputError: if `out` exists with content, or cannot be written.
        MissingComponentError: if the pipeline lacks a component.
    """
    adapter = find_adapter(pipe)
    denoiser = adapter.denoiser(pipe)
    own = (adapter.denoiser_name,) if is_quantized(denoiser) else ()
    with atomic_folder(out, overwrite=overwrite) as folder:
        save_components(pipe, folder, skip=own)
        for name in own:
            save_denoiser(denoiser, folder / name)
    return Path(out).absolute()


def load_pipeline(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    **original: Any,
) -> TextToAudioPipeline:
    """Read a pipeline: a folder in diffusers' layout, or the files that a model was published as.

    Args:
        path: a folder in diffusers' layout, with a float or a quantized denoiser; the folder or
            .ckpt file of a Make-An-Audio; the .ckpt file of an AudioLDM.
        device: where the modules go.
        dtype: of the float modules, and of the tensors between layers.
        backend: which kernels a quantized denoiser runs on.
        original: for published files, what they do not say: see `MakeAnAudio.from_original` and
            `AudioLDM.from_original` (tokenizer, heads, ema).

    Raises:
        MissingComponentError: if the folder or a component is missing.
        CheckpointError: if a file is broken; see its children.
        UnsupportedModelError: if the folder is of no family that is known.
        ConfigError: if `original` is not for these files.
        BackendUnavailableError: if the named backend cannot run here.
    """
    return families.load_pipeline(path, device=device, dtype=dtype, backend=backend, **original)


@dataclass
class _Job:
    """One model with one config: checks, plan, replacement."""

    pipe: Any
    config: QuantConfig
    calibration: Calibration | None
    given_adapter: DenoiserAdapter | None
    assignment: Mapping[str, str]

    def __post_init__(self) -> None:
        self.adapter = self.given_adapter or find_adapter(self.pipe)
        self.denoiser: nn.Module = self.adapter.denoiser(self.pipe)
        check_float(self.denoiser)
        self.layers = quantizable_layers(self.denoiser)
        self.segments = self.adapter.segments(self.denoiser)
        self.inputs: ChosenInputs | None = None
        self.rounder: Rounder | None = None
        if self.calibration is not None:
            self.calibration.check(self.denoiser)
            self._check_segments(self.calibration)

    def check(self, inputs: ChosenInputs | str | Path | None = None) -> None:
        """Refuse what `plan` tolerates because it changes nothing, and read the inputs."""
        resolve_backend(self.config.backend, next(self.denoiser.parameters()).device)
        check_finite(self.denoiser)
        check_hooks(self.layers)
        if self.config.activation == "static" and self.calibration is None:
            if any(row.activation != "float" for row in self.plan().rows):
                raise CalibrationError(
                    "static activation scales need a calibration, and none was given; pass "
                    "calibration=ptq4adm.calibrate(pipe), or QuantConfig(activation='dynamic')"
                )
        if self.config.activation == "dynamic" and self.calibration is not None:
            logger.warning("activation='dynamic' measures every input: the calibration is not used")
        self._check_inputs(inputs)

    def plan(self) -> QuantPlan:
        """The table, from names and shapes alone."""
        # a convolution whose padding cannot be expressed stays the module that it is
        layers = {
            name: layer for name, layer in self.layers.items() if padding_reason(layer) is None
        }
        unsupported = {
            n: reason for n, layer in layers.items() if (reason := unsupported_reason(layer))
        }
        protects = self.config.protect_sensitive and self.config.scheme == Scheme.W4A8
        rules = [
            (rule.pattern, rule.scheme, rule.reason)
            for rule in self.adapter.rules(self.denoiser)
            if protects or not rule.is_sensitive
        ]
        choices = choose_schemes(layers, self.config, rules, unsupported, self.assignment)
        rows = tuple(
            plan_row(
                name,
                layer,
                choices[name],
                segments=self.segments.get(name),
                buckets=self._buckets(name),
                group_size=self.config.group_size,
            )
            for name, layer in layers.items()
        )
        return QuantPlan(rows, *self._other_bytes(layers), self.config)

    def apply(self, result: QuantPlan, progress: bool) -> None:
        """Make every new module, then put them in."""
        step = self._step()
        replacements: dict[str, StorageLayer] = {}
        for row in tqdm(
            result.rows, desc="quantize", unit="layer", disable=None if progress else True
        ):
            try:
                replacements[row.name] = planned_layer(
                    self.layers[row.name], row, self.config, self.calibration, step
                )
            except NonFiniteError as error:
                raise NonFiniteError(f"layer {row.name!r}: {error}") from error
        self._round(result, replacements, progress)
        replace_layers(self.denoiser, replacements)
        if step is not None:
            attach_step_hook(self.denoiser, step)
        logger.info("fused %s", fuse_blocks(self.denoiser).summary())
        digest = (
            self.calibration.digest() if step is not None and self.calibration is not None else None
        )
        mark_quantized(self.denoiser, QuantState(self.config, digest))

    def _round(
        self, result: QuantPlan, replacements: dict[str, StorageLayer], progress: bool
    ) -> None:
        """Choose the integers of the new modules by the config's method."""
        if self.inputs is None:
            return
        rounder = self.rounder or ROUNDERS[self.config.rounding]
        replay = Replay(self.inputs, guidance=self._guidance())
        tasks = layer_tasks(self.layers, result.rows, replacements, self.calibration)
        put_rows(replacements, rounder(self.denoiser, tasks, replay, progress=progress))

    def _guidance(self) -> float | None:
        """The calibration's scale, or without one the pipeline's own; a bare denoiser has none."""
        if self.calibration is not None:
            return self.calibration.meta.guidance
        try:
            return self.adapter.sampling_defaults(self.pipe).guidance
        except MissingComponentError:
            return None

    def _step(self) -> StepIndex | None:
        if self.config.activation != "static" or self.calibration is None:
            return None
        return StepIndex(self.calibration.buckets, next(self.denoiser.parameters()).device)

    def _buckets(self, name: str) -> int:
        if self.config.activation == "dynamic":
            return 0
        if self.calibration is None:
            return DEFAULT_BUCKETS
        # a layer that the calibration runs never reached measures its input
        return self.calibration.meta.buckets if self.calibration.is_recorded(name) else 0

    def _check_inputs(self, inputs: ChosenInputs | str | Path | None) -> None:
        rounding = self.config.rounding
        if rounding == "nearest":
            if inputs is not None:
                logger.warning("rounding='nearest' looks at no inputs: they are not used")
            return
        if inputs is None:
            raise CalibrationError(
                f"rounding={rounding!r} looks at the model's inputs, and none were given; record "
                "them with ptq4adm.calibrate(pipe, strategy='activation-aware', size=256, "
                "inputs=FILE), and pass inputs=FILE"
            )
        self.inputs = inputs if isinstance(inputs, ChosenInputs) else ChosenInputs.load(inputs)
        self.inputs.check(self.denoiser)

    def _check_segments(self, calibration: Calibration) -> None:
        for name in self.layers:
            wanted = len(self.segments.get(name, (0,)))
            found = len(calibration.records.get(name, ()))
            if found != wanted:
                raise CalibrationMismatchError(
                    f"calibration has {found} records for layer {name!r}, needs {wanted}; "
                    "calibrate this model"
                )

    def _other_bytes(self, layers: dict[str, nn.Linear | nn.Conv2d]) -> tuple[int, int]:
        planned = {id(tensor) for layer in layers.values() for tensor in layer.parameters()}
        tensors = (*self.denoiser.parameters(), *self.denoiser.buffers())
        others = [t for t in tensors if id(t) not in planned]
        return 2 * sum(t.numel() for t in others), sum(t.numel() * t.element_size() for t in others)
