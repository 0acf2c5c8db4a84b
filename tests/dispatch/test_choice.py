"""The choice that follows from a table, and float16 beside it."""

from __future__ import annotations

import pytest

from ptq4adm.dispatch import Choice, DispatchTable, LayerKey, Times, choose_backend, compare_float

KEY = LayerKey("linear", 4, 320, 640)
BOTH = ("triton", "cuda")


def _table(**times: Times) -> DispatchTable:
    """Times by M: m128=..."""
    return DispatchTable("GPU", ({},), {KEY: {int(m[1:]): t for m, t in times.items()}})


def _times(cuda: float, triton: float) -> Times:
    return Times(0, None, {"cuda": cuda, "triton": triton})


def _choose(table: DispatchTable | None, rows: int | None = None, **keywords: object) -> Choice:
    given = {"key": KEY, "candidates": BOTH, **keywords}
    return choose_backend(table, given.pop("key"), rows=rows, **given)  # type: ignore[arg-type]


def test_the_faster_one_is_taken_with_both_times_as_the_reason() -> None:
    assert _choose(_table(m128=_times(3, 4))) == Choice("cuda", "cuda 3 us, triton 4 us at M 128")
    assert _choose(_table(m128=_times(5, 4))) == Choice("triton", "triton 4 us, cuda 5 us at M 128")
    assert _choose(_table(m128=_times(4, 4))).backend == "triton"  # the usual one, if equal


def test_without_rows_the_sum_over_all_decides() -> None:
    table = _table(m128=_times(1, 2), m8192=_times(30, 20))
    assert _choose(table) == Choice("triton", "triton 22 us, cuda 31 us at M 128 + 8192")


def test_with_rows_the_nearest_decides() -> None:
    table = _table(m128=_times(1, 2), m8192=_times(30, 20))
    assert _choose(table, 128).backend == "cuda"
    assert _choose(table, 32).backend == "cuda"  # 4 times less
    assert _choose(table, 30000).backend == "triton"
    assert _choose(table, 8192).reason == "triton 20 us, cuda 30 us at M 8192"
    far = _choose(table, 31)
    assert far == Choice("triton", "no time near M 31")


def test_without_a_table_or_an_entry_the_usual_one_is_taken() -> None:
    table = _table(m128=_times(1, 2))
    assert _choose(None) == Choice("triton", "no table for this device")
    assert _choose(table, key=None).reason == "layers of this kind are not in tables"
    other = LayerKey("linear", 8, 320, 640)
    assert _choose(table, key=other) == Choice("triton", "the table has no w8a8 linear 320x640")
    assert _choose(table, candidates=("triton",)).backend == "triton"


def test_what_was_wrong_once_is_not_taken_however_fast() -> None:
    table = _table(m128=_times(1, 2), m512=Times(0, None, {"triton": 9.0}, {}, {"cuda": "differs"}))
    choice = _choose(table)
    assert choice.backend == "triton"
    assert "cuda failed when measured" in choice.reason
    # nor if it is the usual one
    wrong = _table(m128=Times(0, None, {"cuda": 9.0}, {}, {"triton": "differs"}))
    assert _choose(wrong).backend == "cuda"
    only = _table(m128=Times(0, 5.0, {}, {}, {"triton": "differs"}))
    assert _choose(only) == Choice("cuda", "no time; triton failed when measured: differs")
    all_wrong = _table(m128=Times(0, None, {}, {}, {"triton": "differs", "cuda": "crashed"}))
    assert _choose(all_wrong).backend == "triton"
    assert "all failed when measured" in _choose(all_wrong).reason


def test_only_rows_where_both_were_timed_are_compared() -> None:
    table = _table(m128=_times(5, 4), m512=Times(0, None, {"cuda": 1.0}))
    assert _choose(table) == Choice("triton", "triton 4 us, cuda 5 us at M 128")
    one = _table(m128=Times(0, None, {"cuda": 1.0}))
    assert _choose(one) == Choice("triton", "cuda measured, triton not: nothing to compare")
    other = _table(m128=Times(0, None, {"triton": 1.0}))
    assert _choose(other) == Choice("triton", "triton 1 us, cuda not measured at M 128")


@pytest.mark.parametrize(("is_fused", "packed"), [(True, 4.0), (False, 6.0)])
def test_float16_is_held_against_the_product_or_the_whole_layer(
    is_fused: bool, packed: float
) -> None:
    times = Times(0, 5.0, {"triton": 4.0}, {"triton": 6.0})
    table = _table(m128=times, m512=Times(0, None, {"triton": 1.0}, {"triton": 1.0}))
    found = compare_float(table, KEY, rows=None, backend="triton", is_fused=is_fused)
    assert found is not None
    assert (found.float16_us, found.packed_us, found.where) == (5.0, packed, "M 128")
    for rows, backend in ((None, "cuda"), (2, "triton")):
        assert compare_float(table, KEY, rows=rows, backend=backend, is_fused=True) is None
