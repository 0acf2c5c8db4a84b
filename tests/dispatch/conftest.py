"""Tables of times that nobody measured, for devices that do not exist."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ptq4adm.dispatch import DispatchTable, LayerKey, Times, save_table
from ptq4adm.ops import backends

DEVICE = "Test GPU 1"
RUN = {"date": "2026-01-02 03:04", "commit": "abc", "torch": "t", "triton": "u", "cuda": "v",
       "driver": "w"}  # fmt: skip
MakeTable = Callable[..., DispatchTable]


def make_table(layers: dict[LayerKey, dict[int, Times]], device: str = DEVICE) -> DispatchTable:
    return DispatchTable(device, (RUN,), layers)


@pytest.fixture
def fake_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU as a GPU on which triton and cuda can run: for all but calls of their kernels."""
    statuses = backends._status

    def status(name: backends.BackendName, device_type: str) -> backends.BackendStatus:
        is_gpu = name in (backends.BackendName.TRITON, backends.BackendName.CUDA)
        if not is_gpu:
            return statuses(name, device_type)
        return backends.BackendStatus(name, True, "a test", device_type)

    monkeypatch.setattr(backends, "_status", status)
    monkeypatch.setattr(backends, "_CANDIDATES", {"cpu": backends._CANDIDATES["cuda"]})
    monkeypatch.setattr(backends, "_resolve", lambda name, _: "triton" if name == "auto" else name)
    monkeypatch.setattr(
        backends, "device_name", lambda device: DEVICE if str(device) == "cpu" else None
    )
    monkeypatch.setattr("ptq4adm.nn.floating.device_name", lambda _: DEVICE)
    yield
    backends._choose.cache_clear()


@pytest.fixture
def use_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[dict[LayerKey, dict[int, Times]]], DispatchTable]:
    """Write a table and let the environment variable name it."""

    def use(layers: dict[LayerKey, dict[int, Times]]) -> DispatchTable:
        table = make_table(layers)
        save_table(tmp_path / "table.json", table)
        monkeypatch.setenv("PTQ4ADM_DISPATCH", str(tmp_path / "table.json"))
        return table

    return use
