"""Tensors out of the files that `torch.save` wrote: nothing but tensors, and no code is ever run.

A pickle may name any function and have it called. These files are read by torch's restricted
unpickler, which calls only what rebuilds tensors. Trainers leave names of their own classes beside
the weights, as keys: a name is harmless, and stands for nothing here; a call of it is refused.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptq4adm.errors import (
    CheckpointError,
    MissingComponentError,
    TruncatedCheckpointError,
    UnsafeCheckpointError,
)

_ZIP = b"PK\x03\x04"
_PICKLE = b"\x80"
# what torch raises for a broken or forbidden file, by version and by how it is broken
_FAILURES = (
    pickle.UnpicklingError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    struct.error,
    TypeError,
    ValueError,
)


def read_tensors(path: str | Path, entry: str | None = None) -> dict[str, Tensor]:
    """Read the state dict of a file that `torch.save` or safetensors wrote.

    The weights stay in the file: they are mapped, and read when they are used. Only files of torch
    versions before 1.6 are read as a whole.

    Args:
        path: a pickled file (.ckpt, .pt, .pth, .bin), or one that ends in .safetensors.
        entry: the state dict's key where the file holds more, such as "state_dict"; a file that is
            a state dict itself is taken, too.

    Returns:
        Names to tensors on the CPU, as they are stored.

    Raises:
        MissingComponentError: if there is no such file.
        UnsafeCheckpointError: if it asks for code to be run.
        TruncatedCheckpointError: if it is cut short.
        CheckpointError: if it is something else, or holds something else than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingComponentError(f"{path}: no such file; copy it there, or name another")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    content = _read_pickle(path)
    if entry is not None and isinstance(content, Mapping) and entry in content:
        content = content[entry]
    return _checked(path, content)


def take(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}


def few(names: Iterable[str], shown: int = 3) -> str:
    """The first of many names, and how many there are, for messages."""
    listed = sorted(names)
    rest = f" and {len(listed) - shown} more" if len(listed) > shown else ""
    return ", ".join(map(repr, listed[:shown])) + rest


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise TruncatedCheckpointError(
            f"{path}: cut short or damaged ({error}); copy it again"
        ) from error


def _read_pickle(path: Path) -> Any:
    with path.open("rb") as file:
        start = file.read(len(_ZIP))
    is_zip = start == _ZIP
    if is_zip and not zipfile.is_zipfile(path):
        # the list of what a zip file holds is its end
        raise TruncatedCheckpointError(f"{path}: the end is missing; copy or download it again")
    if not is_zip and not start.startswith(_PICKLE):
        raise CheckpointError(
            f"{path}: begins with {start!r}, so torch.save did not write it; "
            "download the file itself, not a page or a pointer to it"
        )
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else []
        # the older format is read without names of its own, and as a whole
        with torch.serialization.safe_globals([(_inert(name), name) for name in named]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except _FAILURES as error:
        text = str(error).split("\n", maxsplit=1)[0]
        if isinstance(error, pickle.UnpicklingError) and "truncated" not in text:
            raise UnsafeCheckpointError(
                f"{path}: it asks for more than tensors, which is refused, and nothing of it was "
                f"run ({_reason(error)}); get the weights as .safetensors, or from their authors"
            ) from error
        raise TruncatedCheckpointError(
            f"{path}: cut short or damaged ({text or type(error).__name__}); copy it again"
        ) from error


def _inert(name: str) -> type:
    """A class that stands for a name of the file: good as a key, refused where it is called."""

    def refuse(cls: type, *args: Any, **kwargs: Any) -> Any:
        del args, kwargs
        raise pickle.UnpicklingError(f"call of {cls.__name__}")

    return type(name, (), {"__new__": refuse})


def _reason(error: BaseException) -> str:
    """What was asked for: torch wraps it into advice that would have the code run."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).split("Please", maxsplit=1)[0].split("\n", maxsplit=1)[0].rstrip(". ")


def _checked(path: Path, content: Any) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path}: expected a dictionary of tensors, got {type(content).__name__}"
        )
    others = [f"{k} ({type(v).__name__})" for k, v in content.items() if not _is_plain(v)]
    if others:
        raise CheckpointError(
            f"{path}: expected nothing but tensors, got {few(others)}; "
            "this is another kind of checkpoint"
        )
    if not content:
        raise CheckpointError(f"{path}: holds no tensor")
    return {str(name): tensor.detach() for name, tensor in content.items()}


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_quantized
