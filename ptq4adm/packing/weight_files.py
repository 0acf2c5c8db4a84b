"""Which files of a folder hold a model's tensors: one, or shards with an index, of one variant."""

from __future__ import annotations

import json
from pathlib import Path

from ptq4adm.errors import CheckpointError, MissingComponentError, TruncatedCheckpointError

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
INDEX_SUFFIX = ".index.json"


def variant_name(name: str, variant: str | None) -> str:
    """File name of a variant, as diffusers writes it: `a.safetensors` to `a.fp16.safetensors`."""
    stem, dot, ending = name.partition(".")
    return name if variant is None else f"{stem}.{variant}{dot}{ending}"


def find_weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The files of a saved model; shards in the order of their names.

    Args:
        folder: as written by this package, or by diffusers' `save_pretrained`.
        variant: None, or the name under which the weights were saved.

    Raises:
        MissingComponentError: if there are none, or a shard is missing; names other variants.
        TruncatedCheckpointError: if the index is cut short.
        CheckpointError: if the index names a file outside of the folder.
    """
    single = folder / variant_name(WEIGHTS_FILE, variant)
    if single.is_file():
        return [single]
    for name in _index_names(variant):
        if (folder / name).is_file():
            return _shards(folder / name)
    others = sorted(p.name for p in folder.glob("diffusion_pytorch_model.*safetensors*"))
    hint = f"; it has {', '.join(others[:3])}: name their variant" if others else ""
    raise MissingComponentError(f"{single}: missing{hint or '; copy the whole model folder'}")


def _index_names(variant: str | None) -> list[str]:
    """As diffusers names the index of shards: its present way, and the one before."""
    name = WEIGHTS_FILE + INDEX_SUFFIX
    if variant is None:
        return [name]
    return [f"{name.removesuffix('json')}{variant}.json", variant_name(name, variant)]


def _shards(index: Path) -> list[Path]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        names = sorted(set(content["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TruncatedCheckpointError(
            f"{index}: cut short or not an index of shards ({error!r}); copy the model again"
        ) from error
    files = []
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index}: names {name!r}, which is not a file beside it")
        if not (index.parent / name).is_file():
            raise MissingComponentError(
                f"{index.parent / name}: missing, one of {len(names)} shards; copy the whole model "
                "folder"
            )
        files.append(index.parent / name)
    return files
