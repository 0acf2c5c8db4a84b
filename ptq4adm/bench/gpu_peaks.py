"""Ceilings of a GPU, measured: copies, int8 and float16 products, and an almost empty kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ptq4adm.bench.gpu_faults import FAULTS, describe_fault
from ptq4adm.bench.gpu_timing import GpuCall, Timer
from ptq4adm.bench.gpu_variant import COPY, FP16, INT8

NODE = "graph-node"
_LARGE, _TOY = 8192, 64
_NODES = 256
_UNITS = {COPY: "GB/s", INT8: "TOPS", FP16: "TOPS", NODE: "us"}


def measure_peaks(timer: Timer, *, seconds: float = 0.5) -> list[dict[str, Any]]:
    """One row a ceiling.

    Args:
        timer: of the device.
        seconds: for each.

    Returns:
        ``peak`` (`COPY`: bytes read and written by a copy of 1 GB; `INT8`: `torch._int_mm` and
        `FP16`: `torch.mm`, 8192 cubed; `NODE`: one of 256 one-element kernels in a graph),
        ``value``, ``unit``, ``failed`` (the reason, with no value). The best fifth of the replays
        counts: a ceiling is what can be reached.
    """
    device, is_gpu = timer.device, timer.device.type == "cuda"
    size = _LARGE if is_gpu else _TOY
    work = 2.0 * size**3
    source = torch.randint(-127, 128, (size * size * 8,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    ints = source[: size * size].reshape(size, size)
    halves = torch.randn(size, size, device=device, dtype=torch.float16)
    one = torch.zeros(1, device=device)

    def nodes() -> None:
        for _ in range(_NODES):
            one.add_(1.0)

    calls: dict[str, tuple[Callable[[], Any], float]] = {
        COPY: (lambda: target.copy_(source), 2.0 * source.numel() * 1e-9),
        INT8: (lambda: torch._int_mm(ints, ints.T), work * 1e-12),
        FP16: (lambda: torch.mm(halves, halves), work * 1e-12),
        NODE: (nodes, 0.0),
    }
    rows = []
    for name, (run, amount) in calls.items():
        row: dict[str, Any] = {"peak": name, "value": "", "unit": _UNITS[name], "failed": ""}
        rows.append(row)
        try:
            timing = timer.time({name: GpuCall(_ignoring(run))}, seconds=seconds)[name]
        except FAULTS as error:
            row["failed"] = describe_fault(error, device)
            continue
        value = timing.p20_us / _NODES if name == NODE else amount / (timing.p20_us * 1e-6)
        row["value"] = float(f"{value:.4g}")
    return rows


def _ignoring(run: Callable[[], Any]) -> Callable[[int], Any]:
    return lambda copy: run()  # noqa: ARG005 - there is one of everything


def peak_values(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Ceiling to its value, where it was measured: operations or bytes a second; seconds."""
    factor = {"GB/s": 1e9, "TOPS": 1e12, "us": 1e-6}
    return {
        row["peak"]: float(row["value"]) * factor[row["unit"]] for row in rows if not row["failed"]
    }
