"""Paired output error: the same recorded inputs through the float model and through a changed one.

    error = mean over pairs b of |e_q[b] - e[b]|^2 / |e[b]|^2,   e = e_u + g (e_c - e_u)      (1)

`e` is the prediction after guidance combined its two halves with scale g: what the sampler gets.
One layer at a time is packed as `quantize` would pack it, run, and taken out again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ptq4adm.calibration import Calibration, ChosenInputs
from ptq4adm.config import DEFAULT_PAIRS, QuantConfig
from ptq4adm.errors import CalibrationError, ConfigError, NonFiniteError
from ptq4adm.models import find_adapter
from ptq4adm.nn import StepIndex, attach_step_hook
from ptq4adm.nn.replace import replace_layers
from ptq4adm.protocols import DenoiserAdapter
from ptq4adm.quantization import PlanRow, QuantPlan, plan
from ptq4adm.replacing import planned_layer
from ptq4adm.rounding import Replay
from ptq4adm.sensitivity.result import MEASURED, SCHEMES, LayerSensitivity, Sensitivity


def measure_sensitivity(
    pipe: Any,
    calibration: Calibration | None,
    inputs: ChosenInputs,
    config: QuantConfig | None = None,
    *,
    pairs: int = DEFAULT_PAIRS,
    guidance: float | None = None,
    progress: bool = True,
    adapter: DenoiserAdapter | None = None,
) -> Sensitivity:
    """Output error (1) of every layer alone at 4 and at 8 bits.

    Layers whose scheme is decided by the family's rules or the config's overrides stay float and
    are not measured. It takes two runs of the model over the pairs for every other layer.

    Args:
        pipe: a float pipeline, or a bare denoiser; the same when this returns, or raises.
        calibration: activation scales; may be None with `activation="dynamic"`.
        inputs: recorded on this very model.
        config: observers, groups, overrides; its own scheme does not matter. None for the default.
        pairs: how many of the inputs to replay, spread evenly over their timesteps.
        guidance: g of (1); None for the calibration's, or without one the pipeline's own.
        progress: show a bar on a terminal.
        adapter: for a model of no known family; None finds the family's.

    Raises:
        ConfigError: if `pairs` is not 1 or more, or the model is quantized.
        CalibrationError: if activations are to be static and there is no calibration, or no layer
            is free to take several schemes.
        CalibrationMismatchError: if calibration or inputs are another model's.
        NonFiniteError: if an activation or an error is NaN or infinite.
        UncalibratedStepError: if inputs are of a timestep without scales.
    """
    model = _Model(pipe, calibration, inputs, config or QuantConfig(), adapter)
    errors = _OutputErrors(model, spread(inputs, pairs), guidance)
    names = list(model.layers)
    if not names:
        raise CalibrationError(
            "no layer can take several schemes: rules and overrides name them all; give fewer "
            "overrides"
        )
    layers = []
    sizes = model.sizes
    bar = tqdm(names, desc="sensitivity", unit="layer", disable=None if progress else True)
    for name in bar:
        found = {scheme: errors.measure({name: scheme}) for scheme in MEASURED}
        parameters = sum(p.numel() for p in model.layers[name].parameters())
        layers.append(LayerSensitivity(name, parameters, sizes.bytes[name], found))
    return Sensitivity(
        fingerprint=inputs.fingerprint,
        pairs=errors.pairs,
        float16_bytes=sizes.float16_bytes,
        fixed_bytes=sizes.fixed_bytes,
        layers=tuple(layers),
    )


def resize(
    sensitivity: Sensitivity,
    pipe: Any,
    calibration: Calibration | None,
    config: QuantConfig | None = None,
    *,
    adapter: DenoiserAdapter | None = None,
) -> Sensitivity:
    """The same errors with the sizes that another config or number of timestep buckets gives.

    A layer that this config keeps at one scheme is no longer listed.

    Args:
        sensitivity: of this very model.
        pipe: a float pipeline, or a bare denoiser.
        calibration: as `plan` takes it.
        config: as `plan` takes it.
        adapter: for a model of no known family; None finds the family's.

    Raises:
        CalibrationMismatchError: if it was measured on another model.
        ConfigError: if a layer may take several schemes here, and was not measured.
    """
    sensitivity.check((adapter or find_adapter(pipe)).denoiser(pipe))
    sizes = _Sizes(pipe, calibration, config or QuantConfig(), adapter)
    known = {layer.name: layer for layer in sensitivity.layers}
    missing = [name for name in sizes.bytes if name not in known]
    if missing:
        raise ConfigError(
            f"sensitivity: {len(missing)} layers such as {missing[0]!r} were not measured, and may "
            "take several schemes here; measure with the same overrides"
        )
    layers = tuple(replace(known[name], bytes=found) for name, found in sizes.bytes.items())
    return replace(
        sensitivity,
        float16_bytes=sizes.float16_bytes,
        fixed_bytes=sizes.fixed_bytes,
        layers=layers,
        chosen=None,
        pareto=(),
    )


def output_error(
    pipe: Any,
    calibration: Calibration | None,
    inputs: ChosenInputs,
    schemes: Mapping[str, str],
    config: QuantConfig | None = None,
    *,
    pairs: int = DEFAULT_PAIRS,
    guidance: float | None = None,
) -> float:
    """Output error (1) with all these layers at their schemes together.

    Args:
        pipe: a float pipeline, or a bare denoiser; the same when this returns, or raises.
        calibration: as for `measure_sensitivity`.
        inputs: as for `measure_sensitivity`.
        schemes: layer to "w4a8", "w8a8" or "float"; other layers stay float.
        config: as for `measure_sensitivity`.
        pairs: as for `measure_sensitivity`.
        guidance: as for `measure_sensitivity`.

    Raises:
        ConfigError: if a layer is not free to take several schemes.
        NonFiniteError: if an activation or an error is NaN or infinite.
    """
    model = _Model(pipe, calibration, inputs, config or QuantConfig(), None)
    unknown = sorted(set(schemes) - set(model.layers))
    if unknown:
        raise ConfigError(
            f"schemes: {unknown[0]!r} is no layer that may take several schemes; see plan()"
        )
    return _OutputErrors(model, spread(inputs, pairs), guidance).measure(schemes)


def spread(inputs: ChosenInputs, pairs: int) -> ChosenInputs:
    """At most `pairs` of the inputs, evenly spread over them in order of timestep.

    Raises:
        ConfigError: if `pairs` is not a whole number of at least 1.
    """
    if isinstance(pairs, bool) or not isinstance(pairs, int) or pairs < 1:
        raise ConfigError(f"pairs: got {pairs!r}, needs a whole number of at least 1")
    total = len(inputs.pairs)
    count = min(pairs, total)
    # the middle of each of `count` equal parts
    place = ((torch.arange(count) + 0.5) * total / count).long() if count else torch.arange(0)
    kept = inputs.timesteps.argsort(descending=True, stable=True)[place].sort().values
    return replace(
        inputs,
        pairs=inputs.pairs[kept],
        timesteps=inputs.timesteps[kept],
        sample=inputs.sample[kept],
        arguments={name: tensor[kept] for name, tensor in inputs.arguments.items()},
    )


class _Sizes:
    """The plans of all schemes, and what they weigh.

    Attributes:
        rows: scheme to name to row.
        bytes: layer that takes whatever scheme the config names to its bytes at each.
        float16_bytes: of the whole denoiser.
        fixed_bytes: of all that is not in `bytes`.
    """

    def __init__(
        self,
        pipe: Any,
        calibration: Calibration | None,
        config: QuantConfig,
        adapter: DenoiserAdapter | None,
    ) -> None:
        # sensitive layers are what is measured best: no rule decides for them here
        free_config = replace(config, protect_sensitive=False)
        plans: dict[str, QuantPlan] = {
            scheme: plan(pipe, replace(free_config, scheme=scheme), calibration, adapter=adapter)
            for scheme in SCHEMES
        }
        self.rows: dict[str, dict[str, PlanRow]] = {
            scheme: {row.name: row for row in found.rows} for scheme, found in plans.items()
        }
        self.bytes = {
            name: {scheme: self.rows[scheme][name].bytes_after for scheme in SCHEMES}
            for name in self.rows["float"]
            if all(self.rows[scheme][name].scheme == scheme for scheme in SCHEMES)
        }
        smallest = plans["w4a8"]
        self.float16_bytes = smallest.bytes_before
        free = sum(found["w4a8"] for found in self.bytes.values())
        self.fixed_bytes = smallest.bytes_after - free


class _Model:
    """A float model, and its layers packed at any scheme."""

    def __init__(
        self,
        pipe: Any,
        calibration: Calibration | None,
        inputs: ChosenInputs,
        config: QuantConfig,
        adapter: DenoiserAdapter | None,
    ) -> None:
        if config.activation == "static" and calibration is None:
            raise CalibrationError(
                "static activation scales need a calibration, and none was given; pass "
                "ptq4adm.calibrate(pipe), or QuantConfig(activation='dynamic')"
            )
        self.config, self.calibration = config, calibration
        self.pipe, self.adapter = pipe, adapter or find_adapter(pipe)
        self.denoiser = self.adapter.denoiser(pipe)
        self.sizes = _Sizes(pipe, calibration, config, adapter)
        inputs.check(self.denoiser)
        modules = dict(self.denoiser.named_modules())
        self.layers: dict[str, nn.Module] = {name: modules[name] for name in self.sizes.bytes}
        self.step: StepIndex | None = None
        if config.activation == "static" and calibration is not None:
            device = next(self.denoiser.parameters()).device
            self.step = StepIndex(calibration.buckets, device)

    def guidance(self) -> float:
        """The calibration's scale, or without one the pipeline's own."""
        if self.calibration is not None:
            return self.calibration.meta.guidance
        return self.adapter.sampling_defaults(self.pipe).guidance

    @contextmanager
    def changed(self, schemes: Mapping[str, str]) -> Iterator[None]:
        """The model with some layers packed; as it was afterwards, whatever happens."""
        packed = {
            name: planned_layer(
                self.layers[name],
                self.sizes.rows[scheme][name],
                self.config,
                self.calibration,
                self.step,
            )
            for name, scheme in schemes.items()
            if scheme != "float"
        }
        hook = None if self.step is None else attach_step_hook(self.denoiser, self.step)
        try:
            replace_layers(self.denoiser, packed)
            yield
        finally:
            # by name: whichever were put in are taken out
            replace_layers(self.denoiser, {name: self.layers[name] for name in packed})
            if hook is not None:
                hook.remove()


class _OutputErrors:
    """The float predictions of some inputs, and what others are compared with them."""

    def __init__(self, model: _Model, inputs: ChosenInputs, guidance: float | None) -> None:
        self.model, self.pairs = model, len(inputs.pairs)
        if guidance is None and inputs.sample.shape[1] == 2:
            guidance = model.guidance()
        self.replay = Replay(inputs, guidance=guidance)
        self.reference = list(self._predictions())

    def measure(self, schemes: Mapping[str, str]) -> float:
        """Equation (1) with layers at schemes."""
        total = 0.0
        with self.model.changed(schemes):
            for expected, found in zip(self.reference, self._predictions(), strict=True):
                signal = expected.square().flatten(1).sum(dim=1)
                noise = (found - expected).square().flatten(1).sum(dim=1)
                total += float((noise / signal).sum())
        if not math.isfinite(total):
            raise NonFiniteError(
                f"the output error with {dict(schemes)} is {total}: the float model's prediction "
                "is zero, NaN or infinite, or that of the quantized layers is; record inputs of a "
                "run that ends well"
            )
        return total / self.pairs

    @torch.no_grad()
    def _predictions(self) -> Iterator[Tensor]:
        """Of every batch, float64 [B, C, h, w]."""
        device = next(self.model.denoiser.parameters()).device
        for batch in self.replay.batches(device):
            flat = self.replay.call(self.model.denoiser, batch).double().cpu()
            yield self.replay.guided(flat)
