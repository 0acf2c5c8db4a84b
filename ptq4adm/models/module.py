"""An adapter for denoisers of no known family: any `nn.Module`, with or without diffusers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ptq4adm.errors import MissingComponentError, UnsupportedModelError
from ptq4adm.protocols import Rule, SamplingDefaults, StepCallback

Run = Callable[..., Tensor]


class ModuleAdapter:
    """Says of a module what calibration and quantization ask of a model family.

    It is passed by name: ``ptq4adm.quantize(unet, adapter=ModuleAdapter())``. As it is, it will do
    for dynamic activation scales; static ones need `run`. A saved state dict is loaded into a
    module that was quantized in the same way.

    Args:
        rules: layers that do not take the config's scheme, such as the first and the last.
        segments: layers whose input is a concatenation of two tensors with different ranges:
            module name to (channels of the first, channels of the second).
        run: ``run(module, prompts, steps=, guidance=, seed=, on_step=)`` denoises one batch as
            generation does and returns latents; see `ptq4adm.protocols.DenoiserAdapter.run`. It
            calls the module with the timestep as the second argument, or as ``timestep=``.
        num_train_timesteps: T; timesteps are in 0 .. T - 1.
        defaults: steps and guidance to calibrate with when the caller names none.
    """

    family = "module"
    denoiser_name = "model"

    def __init__(
        self,
        *,
        rules: Sequence[Rule] = (),
        segments: Mapping[str, tuple[int, int]] | None = None,
        run: Run | None = None,
        num_train_timesteps: int = 1000,
        defaults: SamplingDefaults | None = None,
    ) -> None:
        self._rules = tuple(rules)
        self._segments = dict(segments or {})
        self._run = run
        self._num_train_timesteps = num_train_timesteps
        self._defaults = defaults or SamplingDefaults(steps=25, guidance=1.0)

    def denoiser(self, pipe: Any) -> nn.Module:
        """The module itself.

        Raises:
            UnsupportedModelError: if it is none, or a layer without a parent to put another into.
        """
        if not isinstance(pipe, nn.Module):
            raise UnsupportedModelError(
                f"{type(pipe).__name__} is no torch.nn.Module; pass the denoiser itself"
            )
        if isinstance(pipe, (nn.Linear, nn.Conv2d)):
            raise UnsupportedModelError(
                f"a single {type(pipe).__name__} cannot be replaced in place; use "
                "ptq4adm.W4A8Linear.from_float or ptq4adm.W4A8Conv2d.from_float"
            )
        return pipe

    def rules(self, denoiser: nn.Module) -> Sequence[Rule]:  # noqa: ARG002
        """Those that were given."""
        return self._rules

    def segments(self, denoiser: nn.Module) -> dict[str, tuple[int, int]]:  # noqa: ARG002
        """Those that were given."""
        return self._segments

    def num_train_timesteps(self, pipe: Any) -> int:  # noqa: ARG002
        """The number that was given."""
        return self._num_train_timesteps

    def sampling_defaults(self, pipe: Any) -> SamplingDefaults:  # noqa: ARG002
        """Those that were given."""
        return self._defaults

    def run(
        self,
        pipe: Any,
        prompts: Sequence[str],
        *,
        steps: int,
        guidance: float,
        seed: int,
        on_step: StepCallback | None = None,
    ) -> Tensor:
        """Call the function that was given.

        Raises:
            MissingComponentError: if none was.
        """
        if self._run is None:
            raise MissingComponentError(
                f"{type(pipe).__name__}: its adapter has no run=, so it cannot be calibrated; give "
                "one, or quantize with activation='dynamic'"
            )
        return self._run(pipe, prompts, steps=steps, guidance=guidance, seed=seed, on_step=on_step)
