"""The yaml of the latent-diffusion code beside a checkpoint: compared with what its weights say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ptq4adm.errors import CheckpointError
from ptq4adm.models.openai_unet import UNetLayout
from ptq4adm.models.original import read_yaml


def check_config(path: Path, layout: UNetLayout, betas: tuple[float, float]) -> int | None:
    """Compare a config with the weights; what it does not say is not compared.

    Args:
        path: the yaml file.
        layout: what the weights say.
        betas: first and last variance of the family's noise schedule.

    Returns:
        `num_heads`, which weights do not say; None if the config does not, either.

    Raises:
        CheckpointError: if it is not such a config, or contradicts the weights.
    """
    params = _section(read_yaml(path), ("model", "params"), path)
    unet = _section(params, ("unet_config", "params"), path)
    weights: dict[str, Any] = {
        "in_channels": layout.in_channels,
        "out_channels": layout.out_channels,
        "model_channels": layout.model_channels,
        "channel_mult": [width / layout.model_channels for width in layout.channels],
        "num_res_blocks": layout.layers,
        "transformer_depth": layout.depth,
        "context_dim": layout.context_dim,
        "extra_film_condition_dim": layout.film_dim,
        "attention_resolutions": {2**i for i, has in enumerate(layout.has_attention) if has},
    }
    for name, found in weights.items():
        said = unet.get(name, found)
        if name == "attention_resolutions" and isinstance(said, Sequence):
            said = set(said)
        if said != found:
            raise CheckpointError(
                f"{path}: {name} is {said}, but the weights have {found}; config and weights "
                "belong to different models"
            )
    for name, value in zip(("linear_start", "linear_end"), betas, strict=True):
        if params.get(name, value) != value:
            raise CheckpointError(
                f"{path}: {name} is {params[name]}, the family's is {value}; it is another model"
            )
    heads = unet.get("num_heads")
    if heads is None or heads == -1:
        return None
    if not isinstance(heads, int) or any(width % heads for width in layout.channels):
        raise CheckpointError(
            f"{path}: num_heads is {heads!r}, which does not divide {list(layout.channels)}"
        )
    return heads


def _section(content: Mapping[str, Any], names: Sequence[str], path: Path) -> Mapping[str, Any]:
    found: Any = content
    for name in names:
        found = found.get(name) if isinstance(found, Mapping) else None
    if not isinstance(found, Mapping):
        raise CheckpointError(
            f"{path}: has no section {'.'.join(names)}; it is not the config of such a model"
        )
    return found
