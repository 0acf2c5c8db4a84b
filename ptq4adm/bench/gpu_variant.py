"""A GPU computation that is checked and timed, and what its time is compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq4adm.bench.gpu_calls import Tile
from ptq4adm.bench.gpu_timing import GpuCall
from ptq4adm.bench.problem import relative_error
from ptq4adm.errors import BenchmarkError

COPY, INT8, FP16 = "copy", "int8", "fp16"  # names of measured ceilings
FLOAT = "torch-fp16"


@dataclass(frozen=True)
class GpuVariant:
    """One way to compute a layer, or a part of it.

    Attributes:
        name: column of the tables.
        call: what is timed.
        check: returns the error of the result; raises `BenchmarkError` if it is wrong.
        operations: multiplications and additions of a call; 0 for norms and gates.
        nbytes: least bytes that a call reads and writes.
        peak: the ceiling it works under.
        base: name of the float16 variant that does the same work; empty if float16 has none.
        tile: how the product is cut; None where that is not this package's.
        backend: whose kernel, of this package; empty for others.
    """

    name: str
    call: GpuCall
    check: Callable[[], float]
    operations: int
    nbytes: int
    peak: str
    base: str = FLOAT
    tile: Tile | None = None
    backend: str = ""

    @property
    def label(self) -> str:
        """Name and backend: what tells the variants of a layer apart."""
        return f"{self.name} {self.backend}".rstrip()


def check_close(name: str, got: Tensor, expected: Tensor, tolerance: float) -> float:
    """Relative RMS error of a result.

    Raises:
        BenchmarkError: if it has another shape, is not finite or not close.
    """
    if got.shape != expected.shape:
        raise BenchmarkError(
            f"{name}: result {list(got.shape)}, expected {list(expected.shape)}; it computes "
            "something else and is not timed"
        )
    error = relative_error(got, expected)
    if not error <= tolerance:  # NaN fails as well
        raise BenchmarkError(
            f"{name}: relative error {error:.3g} is above {tolerance:.3g}; the result is wrong and "
            "is not timed"
        )
    return error


def check_equal(name: str, got: Tensor, expected: Tensor) -> None:
    """Integers, or floats made of them: all of them, in every bit.

    Raises:
        BenchmarkError: if one differs.
    """
    if got.shape != expected.shape or not torch.equal(got, expected.to(got.dtype)):
        wrong = "all" if got.shape != expected.shape else int((got != expected).sum())
        raise BenchmarkError(
            f"{name}: {wrong} of {expected.numel()} exact results differ; nothing is timed, run "
            "pytest -m gpu"
        )


def check_steps(name: str, got: Tensor, expected: Tensor) -> float:
    """Share of int8 values that differ: at most one step, and at most 0.1 % of them.

    Raises:
        BenchmarkError: if more do, or by more.
    """
    if got.shape != expected.shape:
        raise BenchmarkError(f"{name}: result {list(got.shape)}, expected {list(expected.shape)}")
    difference = (got.int() - expected.int()).abs()
    share = float((difference > 0).double().mean())
    # one value of a tiny tensor is more than its 0.1 %
    if int(difference.max()) > 1 or share > max(1e-3, 1.5 / got.numel()):
        raise BenchmarkError(
            f"{name}: {100 * share:.3g} % of the int8 values differ from the reference, by up to "
            f"{int(difference.max())} steps (allowed: 0.1 %, one step); it is not timed"
        )
    return share
