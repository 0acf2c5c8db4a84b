"""UNets of the latent-diffusion code ("openaimodel"), out of which Make-An-Audio and AudioLDM grew.

    time_embed.{0,2}                  two linears over a sinusoidal embedding
    film_emb                          AudioLDM only: a text vector, concatenated to the time's
    input_blocks.0.0                  first convolution
    input_blocks.i.0, .i.1            residual block, transformer; or .i.0.op, a downsampling
    middle_block.{0,1,2}              residual block, transformer, residual block
    output_blocks.i.{0,1,2}           residual block, transformer, upsampling
    out.{0,2}                         norm and last convolution

What the weights say of the architecture is read from their names and shapes. The number of heads is
not in them: a family knows it. The names are translated by diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ptq4adm.errors import CheckpointError
from ptq4adm.models.assign import build
from ptq4adm.models.pickled import few

PREFIX = "model.diffusion_model."
EMA_PREFIX = "model_ema."


@dataclass(frozen=True)
class UNetLayout:
    """What the names and shapes of an openaimodel UNet say.

    Attributes:
        in_channels: of the latents.
        out_channels: of the prediction.
        channels: of every level, the finest first.
        layers: residual blocks a level on the way down; one more on the way up.
        has_attention: whether the blocks of a level have a transformer.
        depth: transformer blocks in a transformer.
        context_dim: width of the text tokens; None if there are none.
        film_dim: width of the text vector that is concatenated to the time embedding; None if
            there is none.
        is_linear: whether transformers are entered by a linear instead of a 1x1 convolution.
        model_channels: of the first convolution; a quarter of the time embedding.
    """

    in_channels: int
    out_channels: int
    channels: tuple[int, ...]
    layers: int
    has_attention: tuple[bool, ...]
    depth: int
    context_dim: int | None
    film_dim: int | None
    is_linear: bool
    model_channels: int

    def config(self, heads: int | tuple[int, ...], **others: Any) -> dict[str, Any]:
        """Arguments of a `UNet2DConditionModel` of the same architecture.

        Args:
            heads: attention heads, one number or one a level.
            others: further arguments, such as `sample_size`.
        """
        kinds = ["CrossAttn" if has else "" for has in self.has_attention]
        config: dict[str, Any] = {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "down_block_types": tuple(f"{kind}DownBlock2D" for kind in kinds),
            "up_block_types": tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
            "block_out_channels": self.channels,
            "layers_per_block": self.layers,
            # diffusers' name for the number of heads
            "attention_head_dim": heads,
            "cross_attention_dim": self.context_dim or self.channels,
            "transformer_layers_per_block": self.depth,
            "use_linear_projection": self.is_linear,
        }
        if self.film_dim is not None:
            config["class_embed_type"] = "simple_projection"
            config["projection_class_embeddings_input_dim"] = self.film_dim
            config["class_embeddings_concat"] = True
        return {**config, **others}


def read_layout(tensors: Mapping[str, Tensor], source: str) -> UNetLayout:
    """Find out the architecture.

    Args:
        tensors: those of the UNet, without `PREFIX`.
        source: the file, for messages.

    Raises:
        CheckpointError: if it is not an openaimodel UNet, or of a kind that is not known here.
    """
    first = _tensor(tensors, "input_blocks.0.0.weight", source)
    channels, attention, layers = _levels(tensors, source)
    transformer = _transformer(tensors)
    context, depth = None, 1
    film = tensors.get("film_emb.weight")
    is_linear = False
    if transformer is not None:
        keys = _tensor(tensors, f"{transformer}.transformer_blocks.0.attn2.to_k.weight", source)
        context = None if film is not None else int(keys.shape[1])
        blocks = f"{transformer}.transformer_blocks."
        depth = len({n[len(blocks) :].split(".")[0] for n in tensors if n.startswith(blocks)})
        is_linear = _tensor(tensors, f"{transformer}.proj_in.weight", source).dim() == 2
    return UNetLayout(
        in_channels=int(first.shape[1]),
        out_channels=int(_tensor(tensors, "out.2.weight", source).shape[0]),
        channels=channels,
        layers=layers,
        has_attention=attention,
        depth=depth,
        context_dim=context,
        film_dim=None if film is None else int(film.shape[1]),
        is_linear=is_linear,
        model_channels=int(first.shape[0]),
    )


def load_unet(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    source: str,
    *,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """The UNet as a `UNet2DConditionModel`.

    Args:
        tensors: those of the UNet, without `PREFIX`.
        config: of `UNetLayout.config`.
        source: the file, for messages.
        dtype: of the weights.

    Raises:
        CheckpointError: if tensors are missing or unknown, or contradict the config; see children.
    """
    from diffusers import UNet2DConditionModel

    layers, attention = config["layers_per_block"], _has_attention(config)
    unet: nn.Module = build(
        lambda: UNet2DConditionModel(**config),
        {PREFIX + name: tensor for name, tensor in tensors.items()},
        source,
        dtype=dtype,
        file_name=lambda name: PREFIX + file_name(name, layers, attention),
        convert=lambda whole: _convert(whole, config),
    )
    return unet


def _convert(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    converted: dict[str, Tensor] = convert_ldm_unet_checkpoint(tensors, config)
    # the linear of the text vector is AudioLDM's own: the converter does not know it
    for part in ("weight", "bias"):
        if f"{PREFIX}film_emb.{part}" in tensors:
            converted[f"class_embedding.{part}"] = tensors[f"{PREFIX}film_emb.{part}"]
    return converted


_PARTS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "film_emb",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_RESNET_PARTS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)")


def file_name(name: str, layers: int, has_attention: Sequence[bool]) -> str:
    """Name in the file, without `PREFIX`, of a tensor of the `UNet2DConditionModel`.

    It tells what of the file is missing; the tensors themselves are renamed by diffusers.

    Args:
        name: in the model's state dict.
        layers: residual blocks a level on the way down.
        has_attention: of every level.
    """
    found = _BLOCK.match(name)
    if found is not None:
        start, rest = _place(found, layers, has_attention), name[found.end() :]
        if found[3] == "downsamplers":
            rest = rest.replace(".conv.", ".op.")
        is_resnet = found[3] == "resnets"
    else:
        part = next((part for part in _PARTS if name.startswith(f"{part}.")), None)
        if part is None:
            return name
        start, rest = _PARTS[part], name[len(part) :]
        is_resnet = ".resnets." in part
    if is_resnet:
        part, dot, last = rest[1:].rpartition(".")
        rest = f".{_RESNET_PARTS.get(part, part)}{dot}{last}"
    return start + rest


def _place(found: re.Match[str], layers: int, has_attention: Sequence[bool]) -> str:
    """Where the part of a level that `_BLOCK` found is in the file."""
    way, level, kind, layer = found[1], int(found[2]), found[3], int(found[4])
    if kind == "downsamplers":
        return f"input_blocks.{(level + 1) * (layers + 1)}.0"
    if kind == "upsamplers":
        after = 2 if has_attention[len(has_attention) - 1 - level] else 1
        return f"output_blocks.{level * (layers + 1) + layers}.{after}"
    part = 0 if kind == "resnets" else 1
    if way == "down":
        return f"input_blocks.{level * (layers + 1) + layer + 1}.{part}"
    return f"output_blocks.{level * (layers + 1) + layer}.{part}"


def _has_attention(config: Mapping[str, Any]) -> tuple[bool, ...]:
    return tuple(kind.startswith("CrossAttn") for kind in config["down_block_types"])


def averaged(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The averaged weights of the UNet ("EMA"), that training keeps beside its own.

    Args:
        tensors: the whole state dict.
        source: the file, for messages.

    Returns:
        Those of the UNet, without `PREFIX`.

    Raises:
        CheckpointError: if the file holds none, or not all.
    """
    names = [name for name in tensors if name.startswith(PREFIX)]
    # stored without the dots, which training's buffers cannot have in their names
    stored = {name: EMA_PREFIX + name.removeprefix("model.").replace(".", "") for name in names}
    missing = [ema for ema in stored.values() if ema not in tensors]
    if missing or not names:
        raise CheckpointError(
            f"{source}: averaged weights were asked for, and {len(missing)} are missing, such as "
            f"{few(missing)}; load it without ema"
        )
    return {name[len(PREFIX) :]: tensors[ema] for name, ema in stored.items()}


def has_averaged(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a state dict holds averaged weights of the UNet."""
    return any(name.startswith(EMA_PREFIX) for name in tensors)


def _levels(
    tensors: Mapping[str, Tensor], source: str
) -> tuple[tuple[int, ...], tuple[bool, ...], int]:
    """Channels and attention of every level, and residual blocks a level."""
    levels: list[list[tuple[int, bool]]] = [[]]
    block = 1
    while any(name.startswith(f"input_blocks.{block}.") for name in tensors):
        name = f"input_blocks.{block}"
        if f"{name}.0.op.weight" in tensors:
            levels.append([])
        else:
            conv = _tensor(tensors, f"{name}.0.in_layers.2.weight", source)
            levels[-1].append((int(conv.shape[0]), f"{name}.1.norm.weight" in tensors))
        block += 1
    layers = len(levels[0])
    blocks = {name.split(".")[1] for name in tensors if name.startswith("input_blocks.")}
    is_even = all(len(level) == layers and len(set(level)) == 1 for level in levels)
    if not layers or len(blocks) != block or not is_even:
        raise CheckpointError(
            f"{source}: the blocks {PREFIX}input_blocks do not form levels of equal blocks; "
            "this is not the UNet of a known family"
        )
    channels, attention = zip(*(level[0] for level in levels), strict=True)
    return channels, attention, layers


def _transformer(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of a transformer; all have the same form."""
    names = (name for name in tensors if name.endswith(".1.transformer_blocks.0.norm1.weight"))
    first = next(iter(sorted(names)), None)
    return None if first is None else first.removesuffix(".transformer_blocks.0.norm1.weight")


def _tensor(tensors: Mapping[str, Tensor], name: str, source: str) -> Tensor:
    if name not in tensors:
        raise CheckpointError(
            f"{source}: lacks {PREFIX}{name}; it is not the UNet of a known family, or not the "
            "whole of it"
        )
    return tensors[name]
