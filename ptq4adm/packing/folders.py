"""Output folders that are written in full, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ptq4adm.errors import OutputError


def check_output(out: str | Path, *, overwrite: bool = False) -> None:
    """Refuse an output folder before any work is done for it.

    Raises:
        OutputError: if `out` is a file, or a folder with content and `overwrite` is False, or lies
            below a file, or may not be written.
    """
    out = Path(out).absolute()
    if out.is_dir():
        if any(out.iterdir()) and not overwrite:
            raise OutputError(
                f"{out}: exists and is not empty; choose another output, or overwrite it"
            )
    elif out.exists():
        raise OutputError(f"{out}: exists and is not a folder; choose another output")
    check_parent(out)


def check_parent(out: Path) -> None:
    """Refuse a place below a file, or where nothing may be written.

    Raises:
        OutputError: says which folder it is.
    """
    out = out.absolute()
    parent = next(p for p in out.parents if p.exists())
    if not parent.is_dir():
        raise OutputError(f"{out}: {parent} is a file, not a folder; choose another output")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{out}: no permission to write in {parent}; choose another output")


@contextmanager
def atomic_folder(out: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A new folder beside `out` that takes its place when the block ends without an error.

    An interruption at any point leaves `out` as it was: the block's folder is deleted.

    Raises:
        OutputError: if `out` exists and may not be replaced, or cannot be made.
    """
    out = Path(out).absolute()
    check_output(out, overwrite=overwrite)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    previous = out.with_name(f".{out.name}.{os.getpid()}.previous")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    except OSError as error:
        raise OutputError(f"{out}: cannot be made ({error}); choose another output") from error
    try:
        yield partial
        if out.exists():
            out.rename(previous)
        partial.rename(out)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{out}: cannot be written ({error}); choose another output") from error
    finally:
        if previous.exists() and not out.exists():
            previous.rename(out)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(previous, ignore_errors=True)
