"""The choice that follows from a table: the faster correct backend, and whether float16 is faster.

Which rows M count: with the layer's own number known (from its calibration), the nearest measured
M, at most `FARTHEST` times more or less; without it all that were measured, each once, so that the
sum of the times decides. Only times of one run are compared with each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ptq4adm.dispatch.table import DispatchTable, LayerKey, Times

FARTHEST = 4.0  # an M more than so many times another says little about it


@dataclass(frozen=True)
class Choice:
    """A backend and why.

    Attributes:
        backend: its name.
        reason: in words; empty where there was nothing to choose.
    """

    backend: str
    reason: str = ""


@dataclass(frozen=True)
class FloatComparison:
    """Times of one layer in float16 and packed, at the same rows.

    Attributes:
        float16_us: of the float16 layer, summed over the rows that count.
        packed_us: of the packed one.
        where: which rows those are.
    """

    float16_us: float
    packed_us: float
    where: str


def choose_backend(
    table: DispatchTable | None,
    key: LayerKey | None,
    *,
    rows: int | None,
    candidates: Sequence[str],
) -> Choice:
    """The faster correct one of several backends that can run.

    Args:
        table: of the device; None if there is none.
        key: the layer; None if layers of its kind are not measured.
        rows: M of one call, where it is known.
        candidates: backends that can run, the usual one first: it is taken where nothing was
            measured, and where times are equal.
    """
    usual = candidates[0]
    if len(candidates) == 1:
        return Choice(usual, "the only one that can run here")
    if table is None:
        return Choice(usual, "no table for this device")
    if key is None:
        return Choice(usual, "layers of this kind are not in tables")
    found = table.find(key)
    if not found:
        return Choice(usual, f"the table has no {key}")
    failed = {name: why for times in found.values() for name, why in times.failed.items()}
    correct = [name for name in candidates if name not in failed]
    if not correct:
        return Choice(usual, f"all failed when measured, {usual} with: {failed[usual]}")
    timed = [name for name in correct if any(name in t.product for t in found.values())]
    shared = {M: t for M, t in found.items() if all(name in t.product for name in timed)}
    counted = _nearest(shared, rows) if timed else []
    if not counted:
        why = "no time" if rows is None else f"no time near M {rows}"
        if usual in failed:
            why += f"; {usual} failed when measured: {failed[usual]}"
        return Choice(correct[0], why)
    if usual in correct and usual not in timed:
        return Choice(usual, f"{', '.join(timed)} measured, {usual} not: nothing to compare")
    totals = {name: sum(found[M].product[name] for M in counted) for name in timed}
    best = min(timed, key=lambda name: totals[name])
    parts = [f"{name} {totals[name]:.4g} us" for name in sorted(timed, key=totals.__getitem__)]
    parts += [f"{name} failed when measured" for name in candidates if name in failed]
    parts += [f"{name} not measured" for name in correct if name not in timed]
    return Choice(best, f"{', '.join(parts)} at {_describe(counted)}")


def compare_float(
    table: DispatchTable, key: LayerKey, *, rows: int | None, backend: str, is_fused: bool
) -> FloatComparison | None:
    """Times of a layer in float16 and on a backend; None if they were not both measured.

    Args:
        table: of the device.
        key: the layer.
        rows: M of one call, where it is known.
        backend: that the packed layer runs on.
        is_fused: whether a norm or gate hands the layer int8, which costs about what that norm or
            gate costs in float: then the product alone is compared, else product and quantizer.
    """
    found = table.find(key)
    packed = {M: (t.product if is_fused else t.layer) for M, t in found.items()}
    both = {M: t for M, t in found.items() if t.float16 is not None and backend in packed[M]}
    counted = _nearest(both, rows)
    if not counted:
        return None
    return FloatComparison(
        sum(both[M].float16 or 0.0 for M in counted),
        sum(packed[M][backend] for M in counted),
        _describe(counted),
    )


def _nearest(found: Mapping[int, Times], rows: int | None) -> list[int]:
    if rows is None or not found:
        return sorted(found)
    nearest = min(found, key=lambda M: _ratio(M, rows))
    return [nearest] if _ratio(nearest, rows) <= FARTHEST else []


def _ratio(M: int, other: int) -> float:
    """How many times the larger is the smaller: 128 is as far from 64 as from 256."""
    return max(M, other) / max(min(M, other), 1)


def _describe(counted: Sequence[int]) -> str:
    if len(counted) == 1:
        return f"M {counted[0]}"
    return f"M {' + '.join(map(str, counted))}"
