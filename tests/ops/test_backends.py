"""Resolution of backend names."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from ptq4adm import ops
from ptq4adm.errors import BackendUnavailableError, UnknownBackendError
from ptq4adm.ops import backends, compiled, cpu, cuda_backend, lazy, triton_backend


@pytest.fixture(autouse=True)
def _forget_resolutions() -> None:
    backends._resolve.cache_clear()


@pytest.fixture
def without_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_IMPORT_ERROR", ImportError("no module named _cpu"))


def test_auto_takes_the_compiled_backend_on_the_cpu(isa) -> None:  # noqa: ARG001
    assert ops.resolve_backend("auto") == "cpu"
    assert ops.resolve_backend("auto", torch.device("meta")) == "reference"


@pytest.mark.usefixtures("without_extension")
def test_auto_takes_the_reference_without_the_compiled_module() -> None:
    assert ops.resolve_backend("auto", "cpu") == "reference"


@pytest.mark.usefixtures("without_extension")
def test_named_backend_that_is_not_built_raises_with_a_remedy() -> None:
    with pytest.raises(BackendUnavailableError, match=r"no module named _cpu.*PTQ4ADM_BUILD=cpu"):
        ops.resolve_backend("cpu")
    with pytest.raises(BackendUnavailableError, match="PTQ4ADM_BUILD=cpu"):
        ops.quantize_int8(torch.zeros(2, 2), backend="cpu")


def test_unknown_name_raises() -> None:
    with pytest.raises(UnknownBackendError, match="backend 'gpu' is unknown; use one of reference"):
        ops.resolve_backend("gpu")


class _CudaError(RuntimeError):
    pass


class _FakeCuda:
    """The compiled CUDA module on a machine with one GPU, or with what a test changes."""

    CudaError = _CudaError

    def __init__(self) -> None:
        self.capability = (9, 0)
        self.has_code = True
        self.error: str | None = None

    def archs(self) -> str:
        return "80;89"

    def runtime_version(self) -> int:
        return 13000

    def driver_version(self) -> int:
        return 12040

    def device_count(self) -> int:
        if self.error is not None:
            raise _CudaError(f"cudaGetDeviceCount: {self.error}")
        return 1

    def has_code_for(self, device: int) -> bool:
        assert device == 0
        return self.has_code

    def device_info(self, device: int) -> SimpleNamespace:
        assert device == 0
        major, minor = self.capability
        return SimpleNamespace(
            name="a GPU",
            major=major,
            minor=minor,
            multiprocessors=132,
            shared_bytes_per_block=227 * 1024,
        )


def _forget_cuda() -> None:
    for name in ("_import", "_machine_reason", "_device_reason"):
        getattr(cuda_backend, name).cache_clear()
    lazy.load.cache_clear()


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[_FakeCuda]:
    _forget_cuda()
    fake = _FakeCuda()
    monkeypatch.setitem(sys.modules, "ptq4adm._cuda", fake)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(triton_backend, "import_reason", lambda: None)
    monkeypatch.setattr(triton_backend, "unavailable_reason", lambda device: None)  # noqa: ARG005
    yield fake
    monkeypatch.undo()
    _forget_cuda()


def test_cuda_that_is_not_built_raises_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    _forget_cuda()
    monkeypatch.setitem(sys.modules, "ptq4adm._cuda", None)
    message = r"backend 'cuda' is not available: .*_cuda cannot be imported .*PTQ4ADM_BUILD=cuda"
    x = torch.zeros(2, 4)
    for call in (
        lambda: ops.resolve_backend("cuda", "cuda"),
        lambda: ops.quantize_int8(x, backend="cuda"),
        lambda: torch.ops.ptq4adm.geglu_quantize(x, backend="cuda"),
    ):
        with pytest.raises(BackendUnavailableError, match=message):
            call()
    _forget_cuda()


def test_cuda_is_taken_by_name_and_says_what_it_runs_on(fake_cuda: _FakeCuda) -> None:  # noqa: ARG001
    assert ops.resolve_backend("cuda", "cuda") == "cuda"
    status = backends._status(ops.BackendName.CUDA, "cuda")
    assert status.available
    assert status.detail == (
        "built for 80;89, on a GPU (compute capability 9.0, 132 multiprocessors, 227 KiB shared "
        "memory a block)"
    )


def test_cuda_on_cpu_tensors_is_refused(fake_cuda: _FakeCuda) -> None:  # noqa: ARG001
    with pytest.raises(BackendUnavailableError, match="run on CUDA devices, not on 'cpu'"):
        ops.resolve_backend("cuda", "cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"error": "no CUDA-capable device is detected (cudaErrorNoDevice)"},
            r"cudaGetDeviceCount: no CUDA-capable device is detected \(cudaErrorNoDevice\); the "
            r"module is built with CUDA 13.0, the driver is for 12.4; use backend='triton'",
        ),
        ({"capability": (7, 5)}, "a GPU has compute capability 7.5; the kernels need 8.0 or newer"),
        (
            {"has_code": False, "capability": (12, 0)},
            "compute capability 12.0, and the module is built for 80;89; reinstall with "
            "PTQ4ADM_BUILD=cuda PTQ4ADM_CUDA_ARCHS=120",
        ),
    ],
)
def test_cuda_says_why_a_machine_cannot_run_it(
    fake_cuda: _FakeCuda, change: dict[str, object], message: str
) -> None:
    for name, value in change.items():
        setattr(fake_cuda, name, value)
    with pytest.raises(BackendUnavailableError, match=message):
        ops.resolve_backend("cuda", "cuda")


def test_cuda_needs_triton_and_a_torch_that_sees_the_gpu(
    fake_cuda: _FakeCuda,  # noqa: ARG001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendUnavailableError, match="this torch does not"):
        ops.resolve_backend("cuda", "cuda")
    monkeypatch.setattr(triton_backend, "import_reason", lambda: "there is no triton")
    with pytest.raises(BackendUnavailableError, match="quantizers are Triton's, and there is no"):
        ops.resolve_backend("cuda", "cuda")


@pytest.fixture
def without_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if Triton were not installed."""
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in [name for name in sys.modules if name.startswith("ptq4adm.kernels.")]:
        monkeypatch.delitem(sys.modules, name)
    for cached in (triton_backend.import_reason, lazy.load):
        cached.cache_clear()
    yield
    for cached in (triton_backend.import_reason, lazy.load):
        cached.cache_clear()


@pytest.mark.usefixtures("without_triton")
def test_triton_that_is_not_installed_is_refused_with_a_remedy(monkeypatch) -> None:
    message = r"triton cannot be imported .*pip install 'ptq4adm\[gpu\]'"
    with pytest.raises(BackendUnavailableError, match=message):
        ops.resolve_backend("triton")
    with pytest.raises(BackendUnavailableError, match=message):
        ops.quantize_int8(torch.zeros(2, 2), backend="triton")
    report = {status.name.value: status for status in ops.backend_report()}
    assert not report["triton"].available
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert ops.resolve_backend("auto", "cuda") == "reference"


def test_auto_takes_triton_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "unavailable_reason", lambda device: None)  # noqa: ARG005
    monkeypatch.setattr(triton_backend, "describe", lambda device: f"a GPU of kind {device}")
    assert ops.resolve_backend("auto", "cuda") == "triton"
    assert ops.resolve_backend("auto", "cpu") != "triton"


# what a machine says is asked in a process of its own: this one may interpret kernels
_ASK = """
import torch
from ptq4adm import ops
try:
    ops.resolve_backend("triton", {device!r})
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize(
    ("device", "interpreted", "message"),
    [
        (
            "cpu",
            False,
            "run on CUDA devices, not on 'cpu'; move the model to a GPU",
        ),
        ("cuda", False, "torch finds no CUDA device; use backend='cpu'"),
        ("cuda", True, r"interpreted on the CPU \(TRITON_INTERPRET=1\); unset it"),
        ("cpu", True, "^$"),
    ],
)
def test_triton_says_where_it_can_run(device: str, interpreted: bool, message: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", _ASK.format(device=device)],
        env=environment | ({"TRITON_INTERPRET": "1"} if interpreted else {}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.search(message, done.stdout.strip()), done.stdout


def test_cpu_backend_refuses_another_device(isa) -> None:  # noqa: ARG001
    with pytest.raises(BackendUnavailableError, match="cannot run on device 'cuda'"):
        ops.resolve_backend("cpu", "cuda")


def test_enum_and_string_name_the_same_backend() -> None:
    assert ops.resolve_backend(ops.BackendName.REFERENCE) == "reference"
    assert ops.resolve_backend("REFERENCE") == "reference"


def test_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="ptq4adm.ops.backends")
    ops.resolve_backend("auto")
    ops.resolve_backend("auto")
    assert len(caplog.records) == 1
    assert "backend auto on cpu" in caplog.text


def test_report_names_every_backend_and_why_it_is_missing() -> None:
    report = {status.name.value: status for status in ops.backend_report()}
    assert list(report) == ["reference", "cpu", "triton", "cuda"]
    assert report["reference"].available
    if not report["cuda"].available:
        assert "use backend='triton', 'cpu' or 'reference'" in report["cuda"].detail


def test_report_of_the_cpu_names_instruction_set_and_threads() -> None:
    detail = ops.backend_report()[1].detail
    assert detail.startswith(("avx512_vnni", "avx_vnni", "avx2", "scalar"))
    assert f"{torch.get_num_threads()} threads" in detail


def test_kernels_can_be_held_to_an_instruction_set() -> None:
    best = cpu.default_isa()
    try:
        cpu.limit_isa("scalar")
        assert cpu.default_isa() == "scalar"
        cpu.limit_isa("auto")
        assert cpu.default_isa() == best
        with pytest.raises(ValueError, match="isa 'sse' is unknown"):
            cpu.limit_isa("sse")
        assert cpu.default_isa() == best
    finally:
        cpu.limit_isa("auto")
