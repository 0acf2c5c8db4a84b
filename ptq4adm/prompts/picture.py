"""The coverage curve, as text and as a picture (matplotlib, the extra "demo")."""

from __future__ import annotations

from pathlib import Path

from ptq4adm.errors import ConfigError, MissingComponentError, OutputError
from ptq4adm.prompts.result import Augmentation

_FORMATS = ("png", "svg")
_BAR = 40  # characters of a full bar
_ROWS = 12


def draw_text(result: Augmentation, rows: int = _ROWS) -> str:
    """The curve as lines of text: a bar of pairs covered, and the numbers.

    Args:
        result: what to draw.
        rows: points shown, evenly spaced; the first and the last are among them.
    """
    last = len(result.curve) - 1
    shown = sorted({round(i * last / max(1, rows - 1)) for i in range(rows)})
    has_space = result.before.radius is not None
    lines = [
        f"{'prompts':>7}  {'pairs covered':<{_BAR}}  {'pairs':>6}  {'cells':>6}"
        + ("  radius    mean" if has_space else "")
    ]
    for i in shown:
        point = result.curve[i].coverage
        bar = "#" * round(_BAR * point.pairs)
        line = (
            f"{point.prompts:7d}  {bar:.<{_BAR}}  {point.pairs:6.1%}  {point.cells:6.1%}"
        )  # fmt: skip
        if point.radius is not None and point.mean_distance is not None:
            line += f"  {point.radius:6.3f}  {point.mean_distance:6.3f}"
        lines.append(line)
    return "\n".join(lines)


def draw_curve(path: str | Path, result: Augmentation) -> None:
    """Draw the curve as a PNG or SVG file, by the file's ending.

    Raises:
        ConfigError: if the ending is neither.
        MissingComponentError: if matplotlib is not installed.
        OutputError: if the file cannot be written.
    """
    path = Path(path)
    kind = path.suffix.lower().lstrip(".")
    if kind not in _FORMATS:
        raise ConfigError(f"{path}: a picture is a .png or a .svg file")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingComponentError(
            f"drawing needs matplotlib ({error}): pip install 'ptq4adm[demo]'"
        ) from error
    points = [point.coverage for point in result.curve]
    counts = [point.prompts for point in points]
    # no pyplot: its figures are global and it may look for a display
    figure = Figure(figsize=(8.0, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.plot(counts, [100 * point.pairs for point in points], label="pairs covered")
    axis.plot(counts, [100 * point.cells for point in points], label="cells covered")
    axis.axvline(result.seeds, color="gray", linestyle=":", label="seeds")
    axis.set(xlabel="prompts", ylabel="covered, %", ylim=(0, 102))
    if result.encoder is not None:
        other = axis.twinx()
        radii = [point.radius for point in points if point.radius is not None]
        means = [point.mean_distance for point in points if point.mean_distance is not None]
        other.plot(counts, radii, "--", color="tab:red", label="covering radius")
        other.plot(counts, means, "--", color="tab:purple", label="mean distance")
        other.set(ylabel=f"distance in {result.encoder}", ylim=(0, None))
        other.legend(loc="center right")
    axis.legend(loc="lower right")
    axis.set_title(f"domain {result.domain}: {result.stop}")
    try:
        figure.savefig(path, dpi=120, format=kind)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error}); choose a writable folder"
        ) from error
