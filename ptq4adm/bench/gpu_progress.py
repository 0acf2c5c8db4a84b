"""Progress bars, where tqdm is installed: a bare GPU machine may not have it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def with_progress(
    items: Iterable[T], name: str, unit: str, *, total: int | None = None, is_shown: bool = True
) -> Iterable[T]:
    """The same items, with a bar on a terminal.

    Args:
        items: what is gone through.
        name: of the bar.
        unit: of an item.
        total: how many there are, where they have no length.
        is_shown: whether a bar is wanted.
    """
    if not is_shown or importlib.util.find_spec("tqdm") is None:
        return items
    from tqdm.auto import tqdm

    bar: Iterable[T] = tqdm(items, desc=name, unit=unit, total=total, disable=None)
    return bar
