"""Modules of no known family: quantized in place, calibrated by a function, without diffusers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ptq4adm
from ptq4adm.errors import MissingComponentError, UnsupportedModelError
from ptq4adm.nn import QuantizedLayer
from ptq4adm.protocols import Rule, SamplingDefaults


class Denoiser(nn.Module):
    """Two levels with a skip connection: a UNet in small."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 64, 3, padding=1)
        self.inner = nn.Sequential(nn.SiLU(), nn.Conv2d(64, 64, 3, padding=1))
        self.joined = nn.Conv2d(128, 64, 1)
        self.time = nn.Linear(1, 64)
        self.last = nn.Conv2d(64, 4, 3, padding=1)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        h = self.first(x) + self.time(timestep.reshape(1, 1) / 1000)[:, :, None, None]
        y: Tensor = self.last(self.joined(torch.cat([self.inner(h), 10 * h], dim=1)))
        return y


def run(
    model: nn.Module,
    prompts: Sequence[str],
    *,
    steps: int,
    guidance: float,
    seed: int,
    on_step: Any = None,
) -> Tensor:
    """A sampler of three lines: the text chooses a level of noise."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    x = torch.stack([torch.randn(4, 8, 8, generator=g) for g in generators])
    x = x * torch.tensor([guidance + len(p) / 50 for p in prompts])[:, None, None, None]
    for i in range(steps):
        t = 999 - i * 1000 // steps
        with torch.no_grad():
            x = x - 0.1 * model(x, torch.tensor(float(t)))
        if on_step is not None:
            on_step(i, t, x)
    return x


RULES = (Rule("first", "float", "few channels"), Rule("time", "w8", "one row"))
SEGMENTS = {"joined": (64, 64)}


@pytest.fixture
def model() -> Denoiser:
    torch.manual_seed(0)
    return Denoiser().eval().requires_grad_(False)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_static_scales_come_from_the_function(model: Denoiser) -> None:
    adapter = ptq4adm.ModuleAdapter(
        rules=RULES, segments=SEGMENTS, run=run, defaults=SamplingDefaults(4, 1.0)
    )
    prompts = ["a dog", "rain on a tin roof"]
    x, t = torch.randn(2, 4, 8, 8), torch.tensor(749.0)
    expected = model(x, t)
    calibration = ptq4adm.calibrate(model, prompts, adapter=adapter, progress=False)
    planned = ptq4adm.plan(model, None, calibration, adapter=adapter)
    assert [(row.name, row.scheme) for row in planned.rows] == [
        *(("first", "float"), ("inner.1", "w4a8"), ("joined", "w4a8")),
        *(("time", "w8"), ("last", "w4a8")),
    ]
    ptq4adm.quantize(model, None, calibration, adapter=adapter, progress=False)
    joined = model.joined
    assert isinstance(joined, QuantizedLayer)
    assert joined.layout.segments == (64, 64)
    assert joined.x_scale is not None
    # the halves have ranges of their own, one ten times the other's input
    assert float(joined.x_scale[1].max()) > 3 * float(joined.x_scale[0].max())
    assert 0 < relative(model(x, t), expected) < 0.25


def test_a_state_dict_goes_into_a_module_of_the_same_kind(model: Denoiser) -> None:
    adapter = ptq4adm.ModuleAdapter(rules=RULES, segments=SEGMENTS)
    config = ptq4adm.QuantConfig(scheme="w8a8", activation="dynamic")
    x, t = torch.randn(1, 4, 8, 8), torch.tensor(3.0)
    expected = model(x, t)
    ptq4adm.quantize(model, config, adapter=adapter, progress=False)
    torch.manual_seed(1)
    other = Denoiser().eval().requires_grad_(False)
    ptq4adm.quantize(other, config, adapter=adapter, progress=False)
    assert relative(other(x, t), expected) > 0.1
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x, t), model(x, t))
    assert relative(other(x, t), expected) < 0.02


def test_what_it_cannot_do_is_said(model: Denoiser) -> None:
    bare = ptq4adm.ModuleAdapter()
    with pytest.raises(MissingComponentError, match=r"no run=.*activation='dynamic'"):
        ptq4adm.calibrate(model, ["a dog"], adapter=bare, progress=False)
    with pytest.raises(UnsupportedModelError, match=r"pass adapter=ptq4adm\.ModuleAdapter\(\)"):
        ptq4adm.quantize(model, progress=False)
    with pytest.raises(UnsupportedModelError, match=r"single Linear.*from_float"):
        ptq4adm.plan(nn.Linear(64, 64), adapter=bare)
    with pytest.raises(UnsupportedModelError, match=r"str is no torch\.nn\.Module"):
        ptq4adm.plan("a folder", adapter=bare)


def test_diffusers_is_not_imported() -> None:
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("diffusers", "transformers"):
            raise ImportError("refused: " + name)
sys.meta_path.insert(0, Refuse())
import torch, ptq4adm
model = torch.nn.Sequential(torch.nn.Conv2d(64, 64, 3), torch.nn.SiLU()).requires_grad_(False)
config = ptq4adm.QuantConfig(activation="dynamic")
ptq4adm.quantize(model, config, adapter=ptq4adm.ModuleAdapter(), progress=False)
assert type(model[0]).__name__ == "W4A8Conv2d", model
assert model(torch.randn(1, 64, 5, 5)).shape == (1, 64, 3, 3)
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
