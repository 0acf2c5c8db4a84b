"""Every `UNet2DConditionModel`: which layers stay, and where its skip connections join."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from ptq4adm.errors import MissingComponentError, UnsupportedLayerError
from ptq4adm.protocols import Rule, SamplingDefaults, StepCallback

# a bare UNet does not carry the number; every published model of the class was trained with it
BARE_NUM_TRAIN_TIMESTEPS = 1000

_RULES = (
    Rule(
        "conv_in",
        "float",
        "sees the latents, 4 or 8 channels: nothing to save, and its error reaches every layer",
    ),
    Rule("conv_out", "float", "its error is the output's error"),
    Rule("time_embedding.*", "w8", "one row a step: weight-only, activations stay float"),
    Rule("class_embedding", "w8", "one row a prompt: weight-only, activations stay float"),
    Rule("class_embedding.*", "w8", "one row a prompt: weight-only, activations stay float"),
    Rule("add_embedding.*", "w8", "one row a prompt: weight-only, activations stay float"),
    Rule("*.time_emb_proj", "w8", "one row a step: weight-only, activations stay float"),
)

# sensitive layers together weigh at most this share: in a UNet of few levels the first and the last
# are a large part of it, and 8 bits for them would cost what 4 bits saved
_SENSITIVE_SHARE = 1 / 16


class UNet2DAdapter:
    """A bare `UNet2DConditionModel`: it can be quantized and packed, not run from prompts."""

    family = "unet2d-condition"
    denoiser_name = "unet"

    def denoiser(self, pipe: Any) -> nn.Module:
        """The UNet itself."""
        unet: nn.Module = pipe
        return unet

    def rules(self, denoiser: nn.Module) -> Sequence[Rule]:
        """First and last convolution stay float, embeddings are weight-only int8.

        Sensitive are the shortcuts, then the convolutions of the last and of the first resolution,
        as long as all of them are at most a sixteenth of the weights (docs/mixed-precision.md).
        """
        last = len(_children(denoiser, "up_blocks")) - 1
        groups = (
            ("*.conv_shortcut",),
            (f"up_blocks.{last}.resnets.*.conv?",),
            ("down_blocks.0.resnets.*.conv?", "down_blocks.0.downsamplers.*"),
        )
        weights = {n: p.numel() for n, p in denoiser.named_parameters() if n.endswith(".weight")}
        room = _SENSITIVE_SHARE * sum(weights.values())
        rules = []
        for patterns in groups:
            room -= sum(
                count
                for name, count in weights.items()
                if any(fnmatchcase(name.removesuffix(".weight"), p) for p in patterns)
            )
            if room < 0:
                break
            reason = "sensitive: where most of the error of 4 bits comes from, and few weights"
            rules += [Rule(pattern, "w8a8", reason, is_sensitive=True) for pattern in patterns]
        return (*rules, *_RULES)

    def segments(self, denoiser: nn.Module) -> dict[str, tuple[int, int]]:
        """Shortcut convolutions of the up blocks: their input is [hidden states, skip].

        The 3x3 convolution of the same block sees the concatenation only after a GroupNorm, which
        gives both halves one range, so it is not here.

        Returns:
            Module name to (hidden channels, skip channels).

        Raises:
            UnsupportedLayerError: if the blocks do not have the structure of
                `UNet2DConditionModel`.
        """
        skips = [_channels(denoiser, "conv_in", "out_channels")]
        for block in _children(denoiser, "down_blocks"):
            for j, _ in enumerate(_children(block, "resnets")):
                skips.append(_channels(block, f"resnets.{j}", "out_channels"))
            if getattr(block, "downsamplers", None) is not None:
                skips.append(_channels(block, "downsamplers.0", "out_channels"))
        found: dict[str, tuple[int, int]] = {}
        for i, block in enumerate(_children(denoiser, "up_blocks")):
            for j, resnet in enumerate(_children(block, "resnets")):
                name = f"up_blocks.{i}.resnets.{j}"
                total = _channels(block, f"resnets.{j}", "in_channels")
                if not skips or skips[-1] >= total:
                    raise UnsupportedLayerError(
                        f"{name}: input of {total} channels does not end in a skip connection of "
                        "the down blocks "
                        f"({skips[-1:] or 'none left'}); this is not a UNet2DConditionModel's "
                        "structure"
                    )
                skip = skips.pop()
                if getattr(resnet, "conv_shortcut", None) is not None:
                    found[f"{name}.conv_shortcut"] = (total - skip, skip)
        return found

    def num_train_timesteps(self, pipe: Any) -> int:  # noqa: ARG002
        """1000: see `BARE_NUM_TRAIN_TIMESTEPS`."""
        return BARE_NUM_TRAIN_TIMESTEPS

    def sampling_defaults(self, pipe: Any) -> SamplingDefaults:
        """Refused: a bare UNet is not sampled.

        Raises:
            MissingComponentError: always.
        """
        raise _needs_pipeline(pipe)

    def run(
        self,
        pipe: Any,
        prompts: Sequence[str],  # noqa: ARG002
        *,
        steps: int,  # noqa: ARG002
        guidance: float,  # noqa: ARG002
        seed: int,  # noqa: ARG002
        on_step: StepCallback | None = None,  # noqa: ARG002
    ) -> Tensor:
        """Refused: a bare UNet has no text encoder and no scheduler.

        Raises:
            MissingComponentError: always.
        """
        raise _needs_pipeline(pipe)


def _needs_pipeline(pipe: Any) -> MissingComponentError:
    return MissingComponentError(
        f"{type(pipe).__name__} is a bare denoiser: no text encoder, no scheduler; "
        "pass the whole pipeline, or quantize with activation='dynamic', which needs no calibration"
    )


def _children(module: nn.Module, name: str) -> list[nn.Module]:
    children = getattr(module, name, None)
    if not isinstance(children, nn.ModuleList):
        raise _unknown_structure(module, name)
    return list(children)


def _channels(module: nn.Module, name: str, attribute: str) -> int:
    try:
        value = getattr(module.get_submodule(name), attribute)
    except AttributeError as error:
        raise _unknown_structure(module, name) from error
    return int(value)


def _unknown_structure(module: nn.Module, name: str) -> UnsupportedLayerError:
    return UnsupportedLayerError(
        f"{type(module).__name__} has no {name} of a UNet2DConditionModel; "
        "only that structure is known here"
    )
