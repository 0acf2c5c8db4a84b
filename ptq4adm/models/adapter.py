"""What calibration and quantization ask of a pipeline, whatever its family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ptq4adm.models.pipeline import TextToAudioPipeline
from ptq4adm.models.unet2d import UNet2DAdapter
from ptq4adm.protocols import Rule, SamplingDefaults, StepCallback

# of a model that attends to text; AudioLDM's attn2 attends to the image as attn1 does
_TEXT_RULES = tuple(
    Rule(
        f"*.attn2.{name}",
        "w8",
        "sees the text: computed once a prompt, and its error is in every step alike; weight-only",
    )
    for name in ("to_k", "to_v")
)


class PipelineAdapter(UNet2DAdapter):
    """Pipelines of one family, of this package or with the same components as attributes.

    Beside the rules of every UNet, keys and values of a text are weight-only.

    Args:
        pipeline_class: the family's pipeline.
    """

    def __init__(self, pipeline_class: type[TextToAudioPipeline]) -> None:
        self.pipeline_class = pipeline_class
        self.family = pipeline_class.family

    def denoiser(self, pipe: Any) -> nn.Module:
        """The pipeline's UNet."""
        unet: nn.Module = pipe.unet
        return unet

    def rules(self, denoiser: nn.Module) -> Sequence[Rule]:
        """As for a bare UNet; keys and values of a text, with one width for all levels, too."""
        rules = super().rules(denoiser)
        config = getattr(denoiser, "config", None)
        attends_to_text = isinstance(getattr(config, "cross_attention_dim", None), int)
        return (*rules, *_TEXT_RULES) if attends_to_text else rules

    def num_train_timesteps(self, pipe: Any) -> int:
        """The scheduler's number."""
        return int(pipe.scheduler.config.num_train_timesteps)

    def sampling_defaults(self, pipe: Any) -> SamplingDefaults:
        """The pipeline's own steps and guidance."""
        return self.as_pipeline(pipe).defaults

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
        """Encode and denoise; see `TextToAudioPipeline.denoise`."""
        ours = self.as_pipeline(pipe)
        return ours.denoise(
            ours.encode_prompts(prompts),
            steps=steps,
            guidance=guidance,
            seed=seed,
            callback=on_step,
        ).float()

    def as_pipeline(self, pipe: Any) -> TextToAudioPipeline:
        """The same components as a pipeline of this package; no weight is copied."""
        if isinstance(pipe, TextToAudioPipeline):
            return pipe
        parts = {name: getattr(pipe, name) for name in self.pipeline_class.component_names}
        return self.pipeline_class(**parts, defaults=self.pipeline_class.family_defaults)
