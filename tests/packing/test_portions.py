"""A model is filled a portion of its file at a time, and the file is not kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ptq4adm import TextToAudioPipeline
from ptq4adm.packing import portions
from ptq4adm.packing.checkpoint import load_denoiser, save_denoiser


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("elements", [1, 5000, 1 << 24])
def test_the_size_of_a_portion_changes_nothing(
    quantized: TextToAudioPipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    elements: int,
) -> None:
    save_denoiser(quantized.unet, tmp_path)
    monkeypatch.setattr(portions, "PORTION_ELEMENTS", elements)
    loaded = load_denoiser(tmp_path, backend=backend).state_dict()
    expected = quantized.unet.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    # one tensor that stays would keep its portion in memory
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_all_tensors_of_a_layer_are_in_one_portion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portions, "PORTION_ELEMENTS", 10)
    shapes = {"a.x": (4,), "a.y": (4,), "b.x": (4,), "c.x": (40,), "c.y": (), "d": (1,)}
    expected = {name: (shape, None) for name, shape in shapes.items()}
    one, two = Path("one"), Path("two")
    files = {name: two if name == "d" else one for name in shapes}
    assert list(portions._portions(expected, files)) == [
        (one, {"a": ["x", "y"]}),
        (one, {"b": ["x"]}),
        (one, {"c": ["x", "y"]}),
        (two, {"": ["d"]}),
    ]
