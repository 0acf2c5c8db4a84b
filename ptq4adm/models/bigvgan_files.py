"""BigVGAN's published files: `args.yml` with the architecture, `best_netG.pt` with the weights.

The weights are stored as a direction and a length each ("weight norm"), `weight_v` and `weight_g`,
and become one tensor here. The filters of the activations are stored, too: they follow from a
formula, and are compared with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptq4adm.errors import CheckpointError
from ptq4adm.models.assign import build
from ptq4adm.models.bigvgan import BigVGAN, low_pass_filter
from ptq4adm.models.original import fold_norms, read_yaml
from ptq4adm.models.pickled import read_tensors

CONFIG_FILE, WEIGHTS_FILE = "args.yml", "best_netG.pt"
_ENTRY = "generator"
_ARGUMENTS = (
    "num_mels",
    "upsample_rates",
    "upsample_kernel_sizes",
    "upsample_initial_channel",
    "resblock",
    "resblock_kernel_sizes",
    "resblock_dilation_sizes",
    "activation",
    "snake_logscale",
)
# stored and computed in float32
_FILTER_TOLERANCE = 1e-5


def load_bigvgan(folder: str | Path, *, dtype: torch.dtype = torch.float32) -> BigVGAN:
    """Read a vocoder from its folder.

    Args:
        folder: holds `args.yml` and `best_netG.pt`.
        dtype: of the weights.

    Raises:
        MissingComponentError: if a file is missing.
        CheckpointError: if a file is broken, or they contradict each other; see its children.
    """
    folder = Path(folder)
    config = _config(folder / CONFIG_FILE)
    path = folder / WEIGHTS_FILE
    tensors = _without_filters(fold_norms(read_tensors(path, _ENTRY), str(path)), str(path))
    return build(
        lambda: BigVGAN(**config),
        tensors,
        str(path),
        dtype=dtype,
        file_name=lambda name: _file_name(name, config["resblock"]),
    )


def _config(path: Path) -> dict[str, Any]:
    content = read_yaml(path)
    missing = [name for name in _ARGUMENTS if name not in content]
    if missing:
        raise CheckpointError(
            f"{path}: names no {', '.join(missing)}; it is not the configuration of a BigVGAN"
        )
    config = {name: content[name] for name in _ARGUMENTS}
    config["resblock"] = str(config["resblock"])
    wanted = {"resblock": ("1", "2"), "activation": ("snakebeta", "snake")}
    for name, values in wanted.items():
        if config[name] not in values:
            raise CheckpointError(
                f"{path}: {name} is {config[name]!r}, known are {' and '.join(values)}"
            )
    pairs = (
        ("upsample_rates", "upsample_kernel_sizes"),
        ("resblock_kernel_sizes", "resblock_dilation_sizes"),
    )
    for first, second in pairs:
        if not (_is_list(config[first]) and _is_list(config[second])) or len(config[first]) != len(
            config[second]
        ):
            raise CheckpointError(f"{path}: {first} and {second} must be lists of one length")
    return config


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value)


def _without_filters(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    expected = low_pass_filter()
    found = {}
    for name, tensor in tensors.items():
        if not name.endswith(".filter"):
            found[name] = tensor
            continue
        is_known = tensor.numel() == expected.numel() and torch.allclose(
            tensor.float().flatten(), expected, rtol=0, atol=_FILTER_TOLERANCE
        )
        if not is_known:
            raise CheckpointError(
                f"{source}: {name} {list(tensor.shape)} is not the filter of a published BigVGAN; "
                "its activations would alias"
            )
    return found


def _file_name(name: str, resblock: str) -> str:
    """Name in the file of a tensor of `BigVGAN`."""
    parts = name.split(".")
    if parts[0] == "ups":
        parts.insert(2, "0")
    if parts[-1] in ("alpha", "beta"):
        parts.insert(-1, "act")
    if resblock == "2":
        parts = ["convs" if part == "convs1" else part for part in parts]
    return ".".join(parts)
