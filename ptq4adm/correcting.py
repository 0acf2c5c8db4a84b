"""`fit_correction`: the step correction of a quantized pipeline, from its float one.

At every step of one run over all prompts both models predict from the quantized model's latents,
(1) of `ptq4adm.models.correction` is fitted by least squares for every channel, and the corrected
prediction makes the next latents: what is fitted at a step is what that step will see.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ptq4adm.calibration import default_prompts
from ptq4adm.calibration.prompts import check_prompts
from ptq4adm.errors import ConfigError
from ptq4adm.models.correction import GuidedCall, StepCorrection
from ptq4adm.models.pipeline import TextToAudioPipeline
from ptq4adm.packing.checkpoint import is_quantized


def fit_correction(
    pipe: TextToAudioPipeline,
    reference: TextToAudioPipeline,
    prompts: Sequence[str] | None = None,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> StepCorrection:
    """Fit the correction of a quantized pipeline; `pipe.correction = ...` puts it to use.

    Both models run once over all prompts at once, at every step of the sampler.

    Args:
        pipe: quantized; it is not changed, and a correction that it has is not applied.
        reference: the float pipeline that it was made from.
        prompts: None for the listed ones of `ptq4adm.calibration.default_prompts`.
        steps: denoising steps; None for the pipeline's own.
        guidance: classifier-free guidance scale; None for the pipeline's own.
        seed: prompt i starts from the noise of seed + i; take others than calibration did.
        progress: show a bar on a terminal.

    Raises:
        ConfigError: if `pipe` is not quantized, or `reference` is.
        PromptError: if a prompt is empty.
    """
    if not is_quantized(pipe.unet) or is_quantized(reference.unet):
        raise ConfigError(
            "a step correction is fitted on a quantized pipeline and its float reference; got "
            f"{'a quantized' if is_quantized(pipe.unet) else 'a float'} pipeline and "
            f"{'a quantized' if is_quantized(reference.unet) else 'a float'} reference"
        )
    texts = check_prompts(default_prompts() if prompts is None else prompts)
    steps = pipe.defaults.steps if steps is None else steps
    guidance = pipe.defaults.guidance if guidance is None else guidance
    twin = copy.copy(pipe)
    with tqdm(total=steps, desc="correct", unit="step", disable=None if progress else True) as bar:
        fit = _Fit(copy.copy(reference), bar)
        # its scheduler knows at which step it is
        fit.reference.scheduler = twin.scheduler
        twin.correction = fit
        twin.denoise(twin.encode_prompts(texts), steps=steps, guidance=guidance, seed=seed)
    return fit.result(guidance)


def fit_line(found: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares of wanted ~ scale * found + offset, for every channel.

    Args:
        found: [B, C, H, W].
        wanted: the same shape.

    Returns:
        scale: float64 [C]; 1 where `found` is constant.
        offset: float64 [C].
    """
    x, y = (t.double().transpose(0, 1).flatten(1) for t in (found, wanted))  # [C, B * H * W]
    x_mean, y_mean = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
    variance = (x - x_mean).square().sum(1)
    covariance = ((x - x_mean) * (y - y_mean)).sum(1)
    scale = torch.where(variance > 0, covariance / variance, 1.0)
    return scale, y_mean[:, 0] - scale * x_mean[:, 0]


class _Fit:
    """Corrects by what it fits at each step, and keeps it."""

    def __init__(self, reference: TextToAudioPipeline, bar: tqdm) -> None:
        self.reference, self.bar = reference, bar
        self._lines: dict[float, tuple[Tensor, Tensor]] = {}

    def correct(self, prediction: Tensor, call: GuidedCall) -> Tensor:
        """The corrected prediction of a step."""
        wanted = self.reference.predict(call)
        scale, offset = fit_line(prediction, wanted)
        self._lines[float(call.timestep)] = scale.float().cpu(), offset.float().cpu()
        self.bar.update()
        scale, offset = (x.to(prediction.dtype)[:, None, None] for x in (scale, offset))
        return prediction * scale + offset

    def result(self, guidance: float) -> StepCorrection:
        """What was fitted, by rising timestep."""
        times = sorted(self._lines)
        scales, offsets = zip(*(self._lines[t] for t in times), strict=True)
        return StepCorrection(
            torch.tensor(times, dtype=torch.float64),
            torch.stack(scales),
            torch.stack(offsets),
            guidance,
        )
