"""What depends on the machine: where kernels run, and the launch itself."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ptq4adm.errors import BackendUnavailableError
from ptq4adm.kernels import launch

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda"), torch.device("meta")

interpreted_only = pytest.mark.skipif(
    not launch.IS_INTERPRETED, reason="kernels are compiled in this process"
)


class _Kernel:
    """Records what it is launched with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **keywords: self.calls.append((grid, args, keywords))


def test_launch_passes_arguments_on_and_fuses_no_products() -> None:
    kernel = _Kernel()
    launch.launch(kernel, (2, 3), CPU, 1, None, SIZE=4, num_warps=8)  # type: ignore[arg-type]
    assert kernel.calls == [
        ((2, 3), (1, None), {"SIZE": 4, "num_warps": 8, "enable_fp_fusion": False})
    ]


@pytest.mark.parametrize("grid", [(0,), (3, 0), (0, 5, 1)])
def test_an_empty_grid_launches_nothing(grid) -> None:
    kernel = _Kernel()
    launch.launch(kernel, grid, CPU)  # type: ignore[arg-type]
    assert kernel.calls == []


@interpreted_only
def test_the_interpreter_is_no_gpu() -> None:
    assert launch.capability(CPU) == 0
    assert launch.multiprocessors(CPU) == 4
    assert launch.device_name(CPU) == "interpreter"
    assert launch.unavailable_reason(CPU) is None


@interpreted_only
def test_interpreted_kernels_refuse_a_gpu() -> None:
    reason = launch.unavailable_reason(CUDA)
    assert reason is not None
    assert "TRITON_INTERPRET=1" in reason
    assert "unset it to use the GPU" in reason


@interpreted_only
def test_an_interpreter_compiles_nothing() -> None:
    message = "cannot be compiled in a process with TRITON_INTERPRET=1; unset it"
    with pytest.raises(BackendUnavailableError, match=message), launch.compile_only(80):
        pass


@pytest.mark.parametrize("device", [CPU, META])
def test_compiled_kernels_need_a_gpu(monkeypatch, device) -> None:
    monkeypatch.setattr(launch, "IS_INTERPRETED", False)
    reason = launch.unavailable_reason(device)
    assert reason is not None
    assert f"not on '{device.type}'" in reason
    assert "TRITON_INTERPRET=1 before Python starts" in reason


def test_a_machine_without_a_gpu_is_told_what_to_use(monkeypatch) -> None:
    monkeypatch.setattr(launch, "IS_INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    launch._gpu_reason.cache_clear()
    reason = launch.unavailable_reason(CUDA)
    launch._gpu_reason.cache_clear()
    assert reason == "torch finds no CUDA device; use backend='cpu' or 'reference'"


@pytest.mark.parametrize(("major", "minor", "fits"), [(7, 5, False), (8, 0, True), (9, 0, True)])
def test_old_gpus_are_refused_by_name(monkeypatch, major, minor, fits) -> None:
    properties = SimpleNamespace(major=major, minor=minor, multi_processor_count=40)
    monkeypatch.setattr(launch, "IS_INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    for cached in (launch._properties, launch._gpu_reason):
        cached.cache_clear()
    try:
        reason = launch.unavailable_reason(CUDA)
        assert launch.multiprocessors(CUDA) == 40
    finally:
        for cached in (launch._properties, launch._gpu_reason):
            cached.cache_clear()
    if fits:
        assert reason is None
    else:
        assert reason is not None
        assert reason.startswith("Tesla T4 has compute capability 7.5; the kernels need 8.0")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "nvidia_h100_80gb_hbm3"),
        ("NVIDIA A100-SXM4-40GB", "nvidia_a100_sxm4_40gb"),
        ("  GeForce RTX 4090 / D ", "geforce_rtx_4090_d"),
    ],
)
def test_names_of_devices_are_names_of_files(monkeypatch, name, expected) -> None:
    monkeypatch.setattr(launch, "IS_INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    launch._device_name.cache_clear()
    try:
        assert launch.device_name(CUDA) == expected
    finally:
        launch._device_name.cache_clear()


_COMPILE = """
import torch, triton, triton.language as tl
from triton.runtime.driver import driver
from ptq4adm.kernels import launch

@triton.jit
def copy(x_ptr, y_ptr, n, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n), mask=offs < n)

cpu = torch.device("cpu")
x, y = torch.ones(8), torch.zeros(8)
before = driver._active
with launch.compile_only(90, multiprocessors=132) as hopper:
    assert (launch.capability(cpu), launch.multiprocessors(cpu)) == (90, 132)
    assert launch.device_name(cpu) == "sm_90" and launch.unavailable_reason(cpu) is None
    with launch.compile_only(80) as ampere:
        launch.launch(copy, (4,), cpu, x, y, 8, SIZE=8, num_warps=1)
    assert launch.capability(cpu) == 90
    launch.launch(copy, (4,), cpu, x, y, 8, SIZE=8, num_warps=2)
    launch.launch(copy, (0,), cpu, x, y, 8, SIZE=8, num_warps=2)
assert driver._active is before and "not on 'cpu'" in launch.unavailable_reason(cpu)
(first,), (second,) = ampere.compiled, hopper.compiled
assert (first.name, first.grid, first.options["SIZE"]) == ("copy", (4,), 8)
assert ".target sm_80" in first.kernel.asm["ptx"] and ".target sm_90" in second.kernel.asm["ptx"]
assert (first.kernel.metadata.num_warps, second.kernel.metadata.num_warps) == (1, 2)
assert not y.any(), "a kernel ran"
"""


def test_compile_only_compiles_for_a_gpu_and_runs_nothing(tmp_path) -> None:
    script = tmp_path / "script.py"  # triton.jit reads the source from a file
    script.write_text(_COMPILE)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script)],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
