"""The choice and float16 on a GPU, by a table with made-up times for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from ptq4adm import ops
from ptq4adm.dispatch import DispatchTable, LayerKey, Times, save_table
from ptq4adm.nn import W4A8Conv2d
from ptq4adm.nn.floating import use_float_where_faster

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
KEY = LayerKey("conv3x3", 4, 40, 72 * 9)


def test_a_moved_layer_follows_the_table_and_float16_is_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = ops.device_name("cuda")
    assert name == torch.cuda.get_device_name()
    times = {"triton": 3.0, "cuda": 2.0}
    table = DispatchTable(name, ({},), {KEY: {70: Times(0, 1.0, times, times)}})
    path = tmp_path / "table.json"
    save_table(path, DispatchTable(name, (dict.fromkeys(_COLUMNS, ""),), table.layers))
    monkeypatch.setenv("PTQ4ADM_DISPATCH", str(path))
    layer = W4A8Conv2d.from_float(nn.Conv2d(72, 40, 3, padding=1))
    state = {n: t.clone() for n, t in layer.state_dict().items()}
    x = torch.randn(2, 72, 7, 5)
    expected = layer(x)
    layer.cuda()
    has_cuda = any(s.available for s in ops.backend_report() if s.name.value == "cuda")
    assert layer.backend == ("cuda" if has_cuda else "triton")
    torch.testing.assert_close(layer(x.cuda()).cpu(), expected, rtol=1e-5, atol=1e-5)
    use_float_where_faster(layer)
    assert layer.is_float
    y = layer(x.cuda().half()).float().cpu()
    assert (y - expected).norm() / expected.norm() < 0.05
    assert all(torch.equal(t.cpu(), state[n]) for n, t in layer.state_dict().items())
    layer.cpu()
    assert not layer.is_float
    assert torch.equal(layer(x), expected)


_COLUMNS = ("date", "commit", "torch", "triton", "cuda", "driver")
