"""Maps of fragments.h: every place once, no bank of shared memory asked twice at a time."""

from __future__ import annotations

from types import ModuleType

import pytest


@pytest.fixture
def maps(matmul_emulated: ModuleType) -> ModuleType:
    return matmul_emulated


def _conflicts(addresses: list[int], width: int) -> int:
    """Most different 128-byte lines that a bank must serve, over phases of 128 bytes of lanes."""
    lanes = 128 // width
    worst = 0
    for first in range(0, len(addresses), lanes):
        lines: dict[int, set[int]] = {}
        for address in addresses[first : first + lanes]:
            for word in range(address // 4, (address + width) // 4):
                lines.setdefault(word % 32, set()).add(word // 32)
        worst = max(worst, *(len(found) for found in lines.values()))
    return worst


def test_activations_meet_no_bank_conflict(maps: ModuleType) -> None:
    for chunk in range(4):
        for row in range(0, 128, 8):  # one matrix of ldmatrix: eight rows of 16 bytes
            assert _conflicts([maps.tile_offset(row + i, chunk) for i in range(8)], 16) == 1
    for first in range(0, 256, 32):  # the copies of a warp
        threads = range(first, first + 32)
        assert _conflicts([maps.tile_offset(t // 4, t % 4) for t in threads], 16) == 1
    everywhere = {maps.tile_offset(row, chunk) for row in range(128) for chunk in range(4)}
    assert everywhere == set(range(0, 128 * 64, 16))


@pytest.mark.parametrize("columns", [32, 64, 128])
def test_results_meet_no_bank_conflict(maps: ModuleType, columns) -> None:
    for row in range(0, 64, 8):
        for column in range(0, columns, 8):  # a fragment's pairs
            lanes = [(row + lane // 4, column + lane % 4 * 2) for lane in range(32)]
            assert _conflicts([maps.stage_offset(*at, columns, 0) for at in lanes], 8) == 1
    for first in range(0, 64 * columns // 4, 32):  # fours of a row
        places = [divmod(4 * i, columns) for i in range(first, first + 32)]
        assert _conflicts([maps.stage_offset(*at, columns, 0) for at in places], 16) == 1
    everywhere = {maps.stage_offset(r, c, columns, 0) for r in range(64) for c in range(columns)}
    assert everywhere == set(range(0, 64 * columns * 4, 4))


def test_gated_columns_pair_values_with_their_gates(maps: ModuleType) -> None:
    N = 96
    seen = []
    for first in (0, 64):
        for column in range(64):
            channel = maps.tile_channel(first, column, N, True)
            if column % 32 < 16 and channel < N:
                assert maps.tile_channel(first, column + 16, N, True) == channel + N // 2
            seen.append(channel)
    assert sorted(channel for channel in seen if channel < N) == list(range(N))
