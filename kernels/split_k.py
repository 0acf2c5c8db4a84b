"""Split K: several programs sum one tile, and the last to arrive finishes it.

Each writes its int32 partial sums to a slab of its own and counts itself; the last one adds the
slabs up. Integer sums do not depend on the order, so the result is exact and the same every time,
and one launch does it all. The counters are zero again when the kernel ends.

    slabs     int32 [splits, tiles, BLOCK_N * BLOCK_M]      counters  int32 [tiles]
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_SUPPLY = 1 << 18  # counters made at once: 1 MiB, for the captures of some dozen steps of a UNet


@triton.jit
def store_partial(
    acc,  # int32 [BLOCK_N, BLOCK_M]
    slab_ptr,
    counter_ptr,
    split,
    tile,
    tiles,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Write a partial sum and return how many were there before it."""
    slab = (split * tiles + tile).to(tl.int64) * (BLOCK_N * BLOCK_M)
    tl.store(slab_ptr + slab + slab_offsets(BLOCK_N, BLOCK_M), acc)
    # every thread's stores come before the one thread's count
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel", scope="gpu")


@triton.jit
def sum_partials(
    slab_ptr,
    first,
    last,
    tile,
    tiles,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Sum of the slabs ``first .. last - 1`` of a tile."""
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    for split in range(first, last):
        slab = (split * tiles + tile).to(tl.int64) * (BLOCK_N * BLOCK_M)
        # from L2, where other multiprocessors wrote it
        acc += tl.load(slab_ptr + slab + slab_offsets(BLOCK_N, BLOCK_M), cache_modifier=".cg")
    return acc


@triton.jit
def slab_offsets(BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """Place of each element of a tile in its slab, [BLOCK_N, BLOCK_M]."""
    return tl.arange(0, BLOCK_N)[:, None] + tl.arange(0, BLOCK_M)[None, :] * BLOCK_N


class _Counters:
    """Zeroed counters: one stretch a stream, and one a launch in a CUDA graph.

    Launches on one stream follow each other, so they share. Launches in graphs may run beside
    anything: each gets counters that nothing else uses, ever, so what they come from is kept.
    """

    def __init__(self) -> None:
        self._of_stream: dict[tuple[torch.device, int], Tensor] = {}
        self._left: dict[torch.device, Tensor] = {}
        self._kept: list[Tensor] = []

    def take(self, device: torch.device, tiles: int) -> Tensor:
        """Return zeroed int32 [tiles] that every launch leaves zeroed."""
        if device.type != "cuda":
            return torch.zeros(tiles, dtype=torch.int32, device=device)
        if torch.cuda.is_current_stream_capturing():
            return self._take_for_good(device, tiles)
        self._refill(device)
        key = (device, torch.cuda.current_stream(device).cuda_stream)
        found = self._of_stream.get(key)
        if found is None or found.numel() < tiles:
            # an earlier, smaller one may still be counted in: the stream frees it in order
            found = torch.zeros(max(tiles, 4096), dtype=torch.int32, device=device)
            self._of_stream[key] = found
        return found[:tiles]

    def _refill(self, device: torch.device) -> None:
        """Make counters ahead of the next capture, which cannot make any that stay zeroed."""
        left = self._left.get(device)
        if left is None or left.numel() < _SUPPLY // 2:
            made = torch.zeros(_SUPPLY, dtype=torch.int32, device=device)
            self._kept.append(made)
            self._left[device] = made

    def _take_for_good(self, device: torch.device, tiles: int) -> Tensor:
        left = self._left.get(device)
        if left is None or left.numel() < tiles:
            # from the graph's own memory, and zeroed anew at every replay: right, but one node more
            return torch.zeros(tiles, dtype=torch.int32, device=device)
        self._left[device] = left[tiles:]
        return left[:tiles]


_counters = _Counters()


def workspace(
    device: torch.device, splits: int, tiles: int, tile_size: int
) -> tuple[Tensor | None, Tensor | None]:
    """Return slabs and counters, both int32, for a product; (None, None) for one split."""
    if splits == 1:
        return None, None
    slabs = torch.empty(splits * tiles * tile_size, dtype=torch.int32, device=device)
    return slabs, _counters.take(device, tiles)


def first_splits(splits: int, K: int, K2: int) -> int:
    """Return how many splits the first of two segments gets: its share of k, at least one each."""
    if K2 == 0 or splits == 1:
        return splits
    return min(max(round(splits * K / (K + K2)), 1), splits - 1)
