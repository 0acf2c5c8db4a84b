"""Resolution of backend names."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from ptq4adm import ops
from ptq4adm.errors import BackendUnavailableError, UnknownBackendError
from ptq4adm.ops import backends, compiled, cpu, triton_backend


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


def test_backend_of_a_later_version_raises() -> None:
    with pytest.raises(BackendUnavailableError, match="backend 'cuda' is not available"):
        ops.resolve_backend("cuda")


@pytest.fixture
def without_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if Triton were not installed."""
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in [name for name in sys.modules if name.startswith("ptq4adm.kernels.")]:
        monkeypatch.delitem(sys.modules, name)
    for cached in (triton_backend.import_reason, triton_backend._load):
        cached.cache_clear()
    yield
    for cached in (triton_backend.import_reason, triton_backend._load):
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
    assert not report["cuda"].available
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
