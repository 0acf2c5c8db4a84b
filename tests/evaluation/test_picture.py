"""The picture of two spectrograms: a PNG, one colour scale, clear errors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from ptq4adm.errors import MissingComponentError, OutputError, ShapeError
from ptq4adm.evaluation.picture import draw_mel_pair


def _draw(path: Path, left: torch.Tensor, right: torch.Tensor) -> None:
    draw_mel_pair(path, left, right, titles=("float", "W4A8"), title="a dog barks")


def test_draws_a_png_of_both(tmp_path: Path) -> None:
    matplotlib_image = pytest.importorskip("matplotlib.image", reason="needs the extra 'demo'")
    path = tmp_path / "mel.png"
    _draw(path, torch.zeros(50, 64), torch.full((50, 64), -3.0))
    pixels = matplotlib_image.imread(path)
    assert pixels.shape[1] > 2 * pixels.shape[0]
    middle = pixels.shape[0] // 2
    left, right = (
        pixels[middle, pixels.shape[1] // 4, :3],
        pixels[middle, pixels.shape[1] * 5 // 8, :3],
    )
    # one colour scale: a quieter picture is darker, not stretched to the same colours
    assert left.sum() > right.sum() + 0.2


def test_missing_matplotlib_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingComponentError, match=r"ptq4adm\[demo\]"):
        _draw(tmp_path / "mel.png", torch.zeros(5, 64), torch.zeros(5, 64))


def test_bad_shapes_and_an_unwritable_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match="mels"):
        _draw(tmp_path / "mel.png", torch.zeros(5, 64), torch.zeros(6, 64))
    with pytest.raises(OutputError, match="choose a writable folder"):
        _draw(tmp_path / "missing" / "mel.png", torch.zeros(5, 64), torch.zeros(5, 64))
