"""Schemes under a size budget, as an integer program.

    minimise    sum over layers l and schemes s of x[l, s] error[l, s]                        (1)
    subject to  sum of x[l, s] bytes[l, s] + fixed bytes <= budget,
                sum over s of x[l, s] = 1 for every layer,  x in {0, 1}

Errors are taken to add up: they do while each is small and no two layers' errors are alike
(docs/mixed-precision.md has predicted beside measured ones). The solver is HiGHS, through scipy.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType

import numpy as np

from ptq4adm.errors import ConfigError, DependencyError, Ptq4admError
from ptq4adm.sensitivity.result import SCHEMES, LayerSensitivity, ParetoPoint, Sensitivity

_MB = 1e6
_POINTS = 24


def assign_schemes(sensitivity: Sensitivity, budget: float) -> dict[str, str]:
    """The schemes with the least summed error within a size.

    Args:
        sensitivity: of all layers that may take several schemes.
        budget: of the whole denoiser: up to 1 a share of its float16 bytes, above 1 in MB (10^6
            bytes).

    Returns:
        Layer to "w4a8", "w8a8" or "float": the `assignment` of `ptq4adm.quantize`.

    Raises:
        ConfigError: if the budget is not a number above 0, or too small; names the smallest.
        DependencyError: if scipy is not installed.
    """
    limit = budget_bytes(budget, sensitivity.float16_bytes, smallest_bytes(sensitivity))
    return _solve(sensitivity, limit)


def choose(sensitivity: Sensitivity, budget: float) -> Sensitivity:
    """The same with `chosen` and `pareto` filled in, as a report shows them."""
    chosen = assign_schemes(sensitivity, budget)
    return replace(sensitivity, chosen=chosen, pareto=pareto_curve(sensitivity))


def pareto_curve(sensitivity: Sensitivity, points: int = _POINTS) -> tuple[ParetoPoint, ...]:
    """Least predicted error at sizes between the smallest and all float.

    Args:
        sensitivity: what was measured.
        points: budgets, at even distances from the smallest size to 8 bits everywhere; no budget
            at all is one more.

    Returns:
        From the smallest size to the largest; a point that is no better than a smaller one is left
        out.

    Raises:
        DependencyError: if scipy is not installed.
    """
    low = smallest_bytes(sensitivity)
    high = max(low, sensitivity.size_of({layer.name: "w8a8" for layer in sensitivity.layers}))
    limits = [low + round((high - low) * i / max(1, points - 1)) for i in range(points)]
    limits.append(sensitivity.size_of({layer.name: "float" for layer in sensitivity.layers}))
    found: list[ParetoPoint] = []
    for limit in limits:
        schemes = _solve(sensitivity, max(low, limit))
        size, error = sensitivity.size_of(schemes), predicted_error(sensitivity, schemes)
        if not found or error < found[-1].error:
            found.append(ParetoPoint(size, size / sensitivity.float16_bytes, error))
    return tuple(found)


def predicted_error(sensitivity: Sensitivity, schemes: Mapping[str, str]) -> float:
    """Sum over layers of the error at their schemes."""
    return sum(layer.error_at(schemes[layer.name]) for layer in sensitivity.layers)


def smallest_bytes(sensitivity: Sensitivity) -> int:
    """Bytes of the denoiser with every layer at its smallest scheme."""
    return sensitivity.fixed_bytes + sum(min(x.bytes.values()) for x in sensitivity.layers)


def budget_bytes(budget: float, float16_bytes: int, smallest: int) -> int:
    """A budget in bytes.

    Args:
        budget: up to 1 a share of float16, above 1 in MB.
        float16_bytes: of the whole denoiser.
        smallest: that can be reached.

    Raises:
        ConfigError: if the budget is not a number above 0, or too small; names the smallest.
        DependencyError: if scipy is not installed: what has a budget will need it.
    """
    is_number = isinstance(budget, (int, float)) and not isinstance(budget, bool)
    if not (is_number and math.isfinite(budget) and budget > 0):
        raise ConfigError(
            f"budget: got {budget!r}, needs a share of float16 (0.30) or a size in MB above 1"
        )
    exact = budget * float16_bytes if budget <= 1 else budget * _MB
    # a share computed from bytes is those bytes again
    limit = math.floor(exact + 1e-6)
    if limit < smallest:
        share = math.ceil(1e4 * smallest / float16_bytes) / 1e4
        raise ConfigError(
            f"budget {budget}: {limit / _MB:.3f} MB cannot be reached; the smallest that can is "
            f"{share:.4f} of float16, {smallest / _MB:.3f} MB"
        )
    _scipy()
    return limit


def _solve(sensitivity: Sensitivity, limit: int) -> dict[str, str]:
    """Program (1), which has a solution."""
    layers = sensitivity.layers
    if not layers:
        return {}
    bound = limit
    while True:
        found = _solve_once(layers, bound - sensitivity.fixed_bytes)
        excess = sensitivity.size_of(found) - limit
        if excess <= 0:
            return found
        # the solver's integers are so within 1e-6, which can be some bytes of a large layer
        bound -= excess


def _solve_once(layers: Sequence[LayerSensitivity], limit: int) -> dict[str, str]:
    optimize = _scipy()
    errors = np.array([[layer.error_at(s) for s in SCHEMES] for layer in layers])  # [L, S]
    sizes = np.array([[float(layer.bytes[s]) for s in SCHEMES] for layer in layers])
    # numbers of about 1, which the solver's tolerances are made for
    errors = errors / max(float(errors.sum()), np.finfo(float).tiny) * len(layers)
    one_each = np.kron(np.eye(len(layers)), np.ones(len(SCHEMES)))
    with _silence():
        result = optimize.milp(
            errors.ravel(),
            integrality=np.ones(errors.size),
            bounds=optimize.Bounds(0, 1),
            constraints=[
                optimize.LinearConstraint(one_each, 1, 1),
                optimize.LinearConstraint(sizes.ravel()[None] / max(limit, 1), -np.inf, 1.0),
            ],
            options={"mip_rel_gap": 1e-6},
        )
    if result.x is None:
        raise Ptq4admError(
            f"the solver found no schemes within {limit} bytes ({result.message}); give a larger "
            "budget"
        )
    picked = result.x.reshape(errors.shape).argmax(axis=1)
    return {layer.name: SCHEMES[i] for layer, i in zip(layers, picked, strict=True)}


@contextmanager
def _silence() -> Iterator[None]:
    """Keep the solver's own prints, which some versions cannot be told to leave out, off stdout.

    They come from C: standard output is swapped below Python, for the whole process.
    """
    sys.stdout.flush()
    flush = ctypes.CDLL(None).fflush
    flush(None)
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _scipy() -> ModuleType:
    try:
        from scipy import optimize
    except ImportError as error:
        raise DependencyError(
            f"a size budget needs scipy, its solver ({error}); pip install 'ptq4adm[budget]'"
        ) from error
    module: ModuleType = optimize
    return module
