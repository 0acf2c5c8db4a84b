"""Which products the family ``sm90a`` of CUDA kernels takes, and how their rows become boxes.

These kernels get activations by the Tensor Memory Accelerator, which copies boxes out of a tensor
and writes zeros beyond its border. A tile's rows are one box of pixels of the output: ``columns`` x
``rows`` x ``images``, moved as a whole for every tap of the kernel. A product of rows is an image
of one row of M pixels, and its boxes are whole tiles. The order of boxes and pixels is in
``csrc/cuda/boxes.h``.
"""

from __future__ import annotations

from functools import cache

from ptq4adm.ops.arguments import Conv2dGeometry

LARGEST_SIDE = 256  # of a box, in any dimension


@cache
def cut_box(extent: tuple[int, int, int], block_m: int) -> tuple[int, int, int]:
    """Return the box that covers an output with the fewest tiles; of these, the widest.

    Neither side need divide the output's: what a box has beyond the border is multiplied in vain.

    Args:
        extent: columns, rows and images of the output.
        block_m: rows of a tile, the most pixels of a box.

    Returns:
        Columns, rows and images of a box.
    """
    best = (0, 0, 0)
    fewest = None
    width, height, count = extent
    for columns in _shares(width, block_m):
        for rows in _shares(height, block_m // columns):
            images = min(count, block_m // (columns * rows))
            tiles = box_count(extent, (columns, rows, images))
            if fewest is None or tiles < fewest:
                best, fewest = (columns, rows, images), tiles
    return best


def box_count(extent: tuple[int, int, int], box: tuple[int, int, int]) -> int:
    """Return how many boxes of a size cover an output; both columns, rows, images."""
    count = 1
    for whole, part in zip(extent, box, strict=True):
        count *= -(-whole // part)
    return count


def unfit_reason(geometry: Conv2dGeometry | None, *, is_aligned: bool) -> str | None:
    """Return why a product cannot have its activations as boxes, or None if it can.

    Args:
        geometry: of a convolution with a window; None for a product of rows.
        is_aligned: whether every row of activations begins at a multiple of 16 bytes.
    """
    if not is_aligned:
        return (
            "rows of activations must begin at multiples of 16 bytes (channels of each segment in "
            "whole sixteens, tensors at such addresses)"
        )
    if geometry is None:
        return None
    if geometry.stride != (1, 1):
        return f"stride {geometry.stride}: pixels of a box are neighbours, so it takes stride 1"
    if geometry.upsample is not None:
        return f"upsample {geometry.upsample}: a box is cut out of the image as it is in memory"
    return None


def _shares(size: int, most: int) -> list[int]:
    """Return the parts that cut a length into equal shares, at most ``most``, the largest first."""
    most = min(most, LARGEST_SIDE)
    fewest = -(-size // most)
    return sorted({-(-size // shares) for shares in range(fewest, size + 1)}, reverse=True)
