"""The layers of the real models, read off their UNets: every matrix product of one step.

The UNets run once on PyTorch's meta device, so this costs no memory and a fraction of a second.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ptq4adm.errors import ConfigError
from ptq4adm.models import UNet2DAdapter, make_an_audio_unet, real_unet, tango_unet

BATCH = 2  # one prompt with classifier-free guidance
TIMESTEP = 500
CONV3X3, CONV3X3_DOWN, CONV3X3_UP, CONV1X1, LINEAR = (
    "conv3x3",
    "conv3x3-stride2",
    "conv3x3-upsample",
    "conv1x1",
    "linear",
)
KINDS = (CONV3X3, CONV3X3_DOWN, CONV3X3_UP, CONV1X1, LINEAR)


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one layer's call.

    Attributes:
        kind: one of `KINDS`.
        batch: B; 1 for linear layers, whose rows are in `height`.
        height: H of the input in memory; M for linear layers.
        width: W; 1 for linear layers.
        in_channels: C, or K of a linear layer.
        out_channels: N.
    """

    kind: str
    batch: int
    height: int
    width: int
    in_channels: int
    out_channels: int

    @property
    def kernel(self) -> int:
        """Rows (and columns) of the kernel; 1 for linear layers."""
        return 3 if self.kind.startswith("conv3x3") else 1

    @property
    def stride(self) -> int:
        """Step of the output."""
        return 2 if self.kind == CONV3X3_DOWN else 1

    @property
    def is_upsampled(self) -> bool:
        """Whether the input is doubled, nearest neighbour, before the convolution."""
        return self.kind == CONV3X3_UP

    @property
    def out_size(self) -> tuple[int, int]:
        """Ho and Wo."""
        if self.is_upsampled:
            return 2 * self.height, 2 * self.width
        return -(-self.height // self.stride), -(-self.width // self.stride)

    @property
    def M(self) -> int:  # noqa: N802 - the literature's name
        """Rows of the product."""
        return self.batch * self.out_size[0] * self.out_size[1]

    @property
    def N(self) -> int:  # noqa: N802 - the literature's name
        """Columns of the product."""
        return self.out_channels

    @property
    def K(self) -> int:  # noqa: N802 - the literature's name
        """Length of the sums."""
        return self.kernel**2 * self.in_channels

    @property
    def operations(self) -> int:
        """2 M N K."""
        return 2 * self.M * self.N * self.K

    def __str__(self) -> str:
        if self.kind == LINEAR:
            return f"linear {self.M}x{self.in_channels}->{self.N}"
        size = f"{self.batch}x{self.height}x{self.width}"
        return f"{self.kind} {size} {self.in_channels}->{self.N}"


@dataclass(frozen=True)
class ModelLayer:
    """A shape with how often one step of a model runs it.

    Attributes:
        model: a name of `MODELS`.
        shape: the sizes.
        count: calls a step.
    """

    model: str
    shape: LayerShape
    count: int


@dataclass(frozen=True)
class ModelSpec:
    """A UNet and what it is called with.

    Attributes:
        build: makes the UNet with random weights on a device.
        latents: C, H, W of the latents of a clip of 10.24 s (Make-An-Audio: 10 s).
        tokens: text tokens of the cross-attention; 0 for a model without.
    """

    build: Callable[[str], nn.Module]
    latents: tuple[int, int, int]
    tokens: int


_TEXT_WIDTH, _CLAP_WIDTH = 1024, 512
_AUDIOLDM_LATENTS = (8, 256, 16)
MODELS: dict[str, ModelSpec] = {
    "audioldm-s": ModelSpec(
        lambda device: real_unet("audioldm-s", device=device), _AUDIOLDM_LATENTS, 0
    ),
    "audioldm-l": ModelSpec(
        lambda device: real_unet("audioldm-l", device=device), _AUDIOLDM_LATENTS, 0
    ),
    # a caption of ten to twenty words: TANGO pads to the longest prompt of the batch
    "tango": ModelSpec(lambda device: tango_unet(device=device), _AUDIOLDM_LATENTS, 32),
    "make-an-audio": ModelSpec(lambda device: make_an_audio_unet(device=device), (4, 10, 80), 77),
}


def model_spec(model: str) -> ModelSpec:
    """The entry of `MODELS`.

    Raises:
        ConfigError: if the name is unknown.
    """
    if model not in MODELS:
        raise ConfigError(f"model {model!r} is unknown: expected one of {', '.join(MODELS)}")
    return MODELS[model]


def step_inputs(
    model: str, *, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Random arguments of one UNet step with guidance.

    Returns:
        latents: float32 [2, C, H, W].
        conditioning: the keyword arguments that follow the timestep.
    """
    return spec_inputs(model_spec(model), device=device, seed=seed)


def spec_inputs(
    spec: ModelSpec, *, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """`step_inputs` of a UNet that need not be in `MODELS`."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    latents = random(BATCH, *spec.latents)
    if spec.tokens == 0:
        labels = nn.functional.normalize(random(BATCH, _CLAP_WIDTH), dim=-1)
        return latents, {"encoder_hidden_states": None, "class_labels": labels}
    return latents, {"encoder_hidden_states": random(BATCH, spec.tokens, _TEXT_WIDTH)}


@cache
def model_layers(model: str) -> tuple[ModelLayer, ...]:
    """Every distinct shape among the layers of a model that quantization packs.

    Args:
        model: a name of `MODELS`.

    Returns:
        Shapes in the order of the UNet's first calls.

    Raises:
        ConfigError: if the name is unknown.
    """
    unet = model_spec(model).build("meta")
    rules = [r.pattern for r in UNet2DAdapter().rules(unet) if not r.is_sensitive]
    counts: Counter[LayerShape] = Counter()
    for name, module in unet.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        if any(fnmatchcase(name, pattern) for pattern in rules):
            continue  # stays float or weight-only
        module.register_forward_pre_hook(_counter(counts, is_upsampled="upsamplers" in name))
    latents, conditioning = step_inputs(model, device="meta")
    with torch.inference_mode():
        unet(latents, torch.tensor(TIMESTEP, device="meta"), **conditioning)
    return tuple(ModelLayer(model, shape, count) for shape, count in counts.items())


def _counter(counts: Counter[LayerShape], *, is_upsampled: bool) -> Callable[..., None]:
    def count(module: nn.Module, args: tuple[Any, ...]) -> None:
        counts[_shape_of(module, args[0], is_upsampled)] += 1

    return count


def _shape_of(module: nn.Module, x: Tensor, is_upsampled: bool) -> LayerShape:
    if isinstance(module, nn.Linear):
        rows = x.numel() // module.in_features
        return LayerShape(LINEAR, 1, rows, 1, module.in_features, module.out_features)
    assert isinstance(module, nn.Conv2d)
    batch, channels, height, width = x.shape
    if module.kernel_size == (1, 1):
        return LayerShape(CONV1X1, batch, height, width, channels, module.out_channels)
    if is_upsampled:
        height, width = height // 2, width // 2
        return LayerShape(CONV3X3_UP, batch, height, width, channels, module.out_channels)
    kind = CONV3X3 if module.stride == (1, 1) else CONV3X3_DOWN
    return LayerShape(kind, batch, height, width, channels, module.out_channels)
