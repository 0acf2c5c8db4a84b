"""Files that are written whole or not at all, and what a set's files have in common."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ptq4adm.errors import OutputError
from ptq4adm.packing.folders import check_parent


def check_output_file(path: Path, *, overwrite: bool = True) -> None:
    """Refuse a file that cannot be written, before minutes are spent on what goes into it.

    Args:
        path: of the file; its folder need not exist.
        overwrite: whether an existing file may be replaced.

    Raises:
        OutputError: if `path` is a folder, lies below a file or where nothing may be written, or
            exists and may not be replaced.
    """
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; name a file in it")
    if path.exists() and not overwrite:
        raise OutputError(
            f"{path}: exists already; choose another file, or pass overwrite (--overwrite)"
        )
    check_parent(path)


def write_whole(path: Path, write: Callable[[Path], object], what: str) -> None:
    """Write a file beside `path` that then takes its place.

    Args:
        path: of the file; its folder is made.
        write: fills the file it is given.
        what: is written, for the message.

    Raises:
        OutputError: if it cannot be written; the old file, or none, is left.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        mode = partial.stat().st_mode
        write(partial)
        # safetensors makes files that only their owner can read, whatever the umask says
        partial.chmod(mode)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{path}: cannot write {what} ({error}); choose another place") from error
    finally:
        if partial.parent.is_dir():
            partial.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any], what: str) -> None:
    """Write a JSON file, whole or not at all."""
    text = json.dumps(content, indent=1)
    write_whole(path, lambda p: p.write_text(text, encoding="utf-8"), what)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str], what: str
) -> None:
    """Write a safetensors file, whole or not at all."""
    write_whole(path, lambda p: save_file(dict(tensors), p, metadata=dict(header)), what)
