"""Resolution of backend names."""

from __future__ import annotations

import logging

import pytest
import torch

from ptq4adm import ops
from ptq4adm.errors import BackendUnavailableError, UnknownBackendError
from ptq4adm.ops import backends, compiled, cpu


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


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_backend_of_a_later_version_raises(name) -> None:
    with pytest.raises(BackendUnavailableError, match=f"backend '{name}' is not available"):
        ops.resolve_backend(name)


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
    assert "use backend='cpu' or 'reference'" in report["cuda"].detail


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
