"""Pictures of spectrograms (matplotlib, the extra "demo")."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ptq4adm.errors import MissingComponentError, OutputError, ShapeError
from ptq4adm.evaluation.mel import DB_PER_NEPER

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

RANGE_DB = 80.0  # below the loudest bin: what is darker is not heard beside it


def draw_mel_pair(
    path: str | Path,
    left: Tensor,
    right: Tensor,
    *,
    titles: tuple[str, str],
    title: str,
    frames_per_second: float = 100.0,
) -> None:
    """Draw two log-mel spectrograms side by side with one colour scale, as a PNG file.

    Args:
        path: the PNG file to write.
        left: [T, F] natural logarithm of mel magnitudes.
        right: the same shape.
        titles: over the left and the right one.
        title: over both.
        frames_per_second: of the T axis.

    Raises:
        MissingComponentError: if matplotlib is not installed.
        ShapeError: if the two are not of one shape.
        OutputError: if the file cannot be written.
    """
    if left.shape != right.shape or left.dim() != 2:
        raise ShapeError(
            f"mels: expected two tensors [T, F] of one shape, got {tuple(left.shape)} and "
            f"{tuple(right.shape)}"
        )
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingComponentError(
            f"drawing needs matplotlib ({error}): pip install 'ptq4adm[demo]'"
        ) from error
    decibels = [DB_PER_NEPER * mel.detach().double().cpu().numpy() for mel in (left, right)]
    # no pyplot: its figures are global and it may look for a display
    figure = Figure(figsize=(11.0, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    _fill(figure, decibels, titles, frames_per_second)
    figure.suptitle(title, wrap=True)
    try:
        figure.savefig(Path(path), dpi=120, format="png")
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error}); choose a writable folder"
        ) from error


def _fill(
    figure: Figure,
    decibels: Sequence[np.ndarray],
    titles: tuple[str, str],
    frames_per_second: float,
) -> None:
    """Draw both spectrograms and the colour scale that they share."""
    top = max(float(d.max()) for d in decibels)
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    for axis, decibel, name in zip(axes, decibels, titles, strict=True):
        image = axis.imshow(
            decibel.T,
            origin="lower",
            aspect="auto",
            interpolation="nearest",
            cmap="magma",
            vmin=top - RANGE_DB,
            vmax=top,
            extent=(0.0, decibel.shape[0] / frames_per_second, 0.0, decibel.shape[1]),
        )
        axis.set_title(name)
        axis.set_xlabel("time, s")
    axes[0].set_ylabel("mel bin")
    figure.colorbar(image, ax=list(axes), label="magnitude, dB")
