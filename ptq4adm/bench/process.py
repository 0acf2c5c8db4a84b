"""A child process that answers requests: its own instruction sets, its own memory.

Libraries choose their kernels when they are imported, so an instruction set is forbidden by the
environment of a new process. One JSON object a line goes in and comes out; what libraries print
goes to standard error.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from types import TracebackType
from typing import Any

from ptq4adm.errors import BenchmarkError, ConfigError

NATIVE, AVX2 = "native", "avx2"
ISAS = (NATIVE, AVX2)
# What each library reads. ONNX Runtime reads nothing: what it runs is measured and reported.
_AVX2_ENVIRONMENT = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "DNNL_MAX_CPU_ISA": "AVX2",
    "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}


def kernel_isa(isa: str) -> str:
    """Name that the compiled module has for an instruction set of `ISAS`.

    Raises:
        ConfigError: if it is not one of them.
    """
    if isa not in ISAS:
        raise ConfigError(f"isa {isa!r} is unknown: expected one of {', '.join(ISAS)}")
    return "auto" if isa == NATIVE else isa


def is_restricted(isa: str) -> bool:
    """Whether this process's environment forbids what lies beyond an instruction set."""
    if isa == NATIVE:
        return not any(name in os.environ for name in _AVX2_ENVIRONMENT)
    return all(os.environ.get(name) == value for name, value in _AVX2_ENVIRONMENT.items())


class Worker:
    """A child process; use it as a context.

    Args:
        isa: one of `ISAS`.

    Raises:
        ConfigError: if the instruction set is unknown.
    """

    def __init__(self, isa: str) -> None:
        kernel_isa(isa)
        environment = {k: v for k, v in os.environ.items() if k not in _AVX2_ENVIRONMENT}
        if isa == AVX2:
            environment |= _AVX2_ENVIRONMENT
        # a checkout's folder kernels/ must not be found as the top-level package of that name
        environment["PYTHONSAFEPATH"] = "1"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ptq4adm.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def ask(self, do: str, **arguments: Any) -> Any:
        """Send one request and wait for its answer.

        Args:
            do: name of a function in `ptq4adm.bench.worker`.
            **arguments: its arguments, as JSON can carry them.

        Raises:
            BenchmarkError: if the request failed, or the process ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            cause = "out of memory?" if code == -9 else "see its messages above"
            raise BenchmarkError(f"benchmark process for {do!r} ended with code {code}: {cause}")
        answer = json.loads(line)
        if "error" in answer:
            raise BenchmarkError(answer["error"])
        return answer["result"]

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it died with a request unread
                self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and not isinstance(error, BenchmarkError):
            self._process.kill()  # interrupted: do not wait for the step in progress
        self.close()
