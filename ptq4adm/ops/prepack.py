"""The weight order of each backend, derived from the canonical one and always invertible.

``reference`` and ``triton`` read the canonical order of ``ptq4adm.packing.layout``. ``cpu`` reads
panels of 16 output channels (N is zero-padded to a multiple of 16), so that one 32-byte load feeds
16 channels::

    4 bits, every 4 k: byte i = 0..31   | channel 8 + i / 4, k = i % 4 | channel i / 4, k = i % 4 |
                                          bits 7..4                      bits 3..0   (as w + 8)
    8 bits, every 4 k: byte i = 0..63     channel i / 4, k = i % 4       (signed)

The offset of 8 lets the kernel decode with one AND. ``cuda`` reads units of 16 channels (N is
zero-padded likewise) by 64 k in the order of the tensor core's registers, all k of 16 channels in
turn; a lane takes 16 bytes at a time (``csrc/cuda/fragments.h``)::

    4 bits, 512 bytes:  [lane][half h][step j] 32-bit words; byte b of a word
                          | k + 16 | k |      channel 8 h + lane / 4,
                          bits 7..4  3..0     k = 32 j + 4 (lane % 4) + b
    8 bits, 1024 bytes: [j][lane][h][k, k + 16] words of the same numbers, a byte each

A backend's order is never saved: modules invert it in ``state_dict``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ptq4adm.errors import ShapeError, UnknownBackendError
from ptq4adm.packing.layout import BLOCK_K, KLayout, pack_int4, unpack_int4

PANEL_N = 16  # output channels of one panel of cpu, one unit of cuda
CANONICAL_BACKENDS = ("reference", "triton")  # these read the weight as it is stored
PANEL_BACKENDS = ("cpu", "cuda")  # these read 16 channels at a time

# nibbles of a 32-bit word
_LOW, _HIGH = 0x0F0F0F0F, 0xF0F0F0F0 - (1 << 32)
_OFFSET = 0x88888888 - (1 << 32)  # turns two's complement into w + 8, and back
_HALF = PANEL_N // 2
_WORDS = BLOCK_K // 2 // 4  # 32-bit words of a block of a row
# bytes rearranged at once: they stay in the cache, and are so few (under 32768 words) that torch
# takes one thread; waiting for a second one, part after part, takes longer than the work, and ten
# times as long on a busy machine
_PART_BYTES = 1 << 17


def packed_shape(bits: int, out_features: int, k_padded: int, backend: str) -> tuple[int, int]:
    """Return the shape of ``qweight`` in a backend's order.

    Args:
        bits: 4 or 8.
        out_features: N.
        k_padded: length of a canonical row, a multiple of 64.
        backend: a resolved backend's name.

    Returns:
        (rows, columns) of the uint8 (4 bits) or int8 (8 bits) tensor.

    Raises:
        UnknownBackendError: if the backend has no weight order.
    """
    per_byte = 2 if bits == 4 else 1
    if backend in CANONICAL_BACKENDS:
        return out_features, k_padded // per_byte
    if backend in PANEL_BACKENDS:
        return -(-out_features // PANEL_N), PANEL_N * k_padded // per_byte
    raise UnknownBackendError(
        f"backend {backend!r} has no weight order in this version; use 'reference', 'cpu', "
        "'triton' or 'cuda'"
    )


def prepack(qweight: Tensor, *, bits: int, layout: KLayout, backend: str) -> Tensor:
    """Bring a canonical weight into a backend's order.

    Args:
        qweight: uint8 [N, Kp / 2] (4 bits) or int8 [N, Kp] (8 bits), canonical.
        bits: 4 or 8.
        layout: the layer's layout.
        backend: a resolved backend's name.

    Returns:
        The same dtype, of ``packed_shape``; for ``CANONICAL_BACKENDS`` the same tensor.

    Raises:
        ShapeError: if ``qweight`` does not have the canonical shape.
        UnknownBackendError: if the backend has no weight order.
    """
    out_features = qweight.shape[0]
    _check_shape(qweight, packed_shape(bits, out_features, layout.k_padded, "reference"))
    packed_shape(bits, out_features, layout.k_padded, backend)  # an unknown backend raises
    if backend in CANONICAL_BACKENDS:
        return qweight
    rest = -out_features % PANEL_N
    if rest:
        # channels of zeros, in four bits as in eight
        qweight = torch.nn.functional.pad(qweight, (0, 0, 0, rest))
    if backend == "cuda":
        return _to_fragments(unpack_int4(qweight) if bits == 4 else qweight, bits)
    # four k of a channel move as one 32-bit word
    if bits == 4:
        return _to_panels(qweight)
    words = qweight.contiguous().view(torch.int32).reshape(-1, PANEL_N, layout.k_padded // 4)
    return words.transpose(1, 2).contiguous().view(torch.int8).flatten(1)


def to_canonical(
    packed: Tensor, *, bits: int, layout: KLayout, out_features: int, backend: str
) -> Tensor:
    """Undo ``prepack``.

    Args:
        packed: the weight in the backend's order.
        bits: 4 or 8.
        layout: the layer's layout.
        out_features: N, which padded panels no longer show.
        backend: the backend whose order ``packed`` has.

    Returns:
        The canonical weight; for ``CANONICAL_BACKENDS`` the same tensor.

    Raises:
        ShapeError: if ``packed`` does not have the backend's shape.
        UnknownBackendError: if the backend has no weight order.
    """
    _check_shape(packed, packed_shape(bits, out_features, layout.k_padded, backend))
    if backend in CANONICAL_BACKENDS:
        return packed
    if backend == "cuda":
        w_q = _from_fragments(packed, bits, layout.k_padded)[:out_features].contiguous()
        return pack_int4(w_q) if bits == 4 else w_q
    if bits == 4:
        return _from_panels(packed.contiguous())[:out_features].contiguous()
    words = packed.contiguous().view(torch.int32).reshape(-1, layout.k_padded // 4, PANEL_N)
    w_q = words.transpose(1, 2).contiguous().view(torch.int8).reshape(-1, layout.k_padded)
    return w_q[:out_features].contiguous()


def _to_panels(qweight: Tensor) -> Tensor:
    """Bring uint8 [N, Kp / 2], N in whole panels, into order ``cpu``.

    A word of a row holds k and k + 32 of a block, a word of a panel channels c and c + 8: the low
    nibbles of two rows make one word, their high nibbles the word 32 k later.
    """
    panels, blocks = qweight.shape[0] // PANEL_N, 2 * qweight.shape[1] // BLOCK_K
    rows = qweight.contiguous().view(torch.int32).view(panels, 2, _HALF, blocks, _WORDS)
    words = rows.new_empty(panels, blocks, 2, _WORDS, _HALF)
    for part in _parts(panels, qweight.shape[1]):
        first, second = rows[part].unbind(1)  # [panels, 8, Kp / 64, 8] each
        low = (first & _LOW) | ((second & _LOW) << 4)
        high = ((first >> 4) & _LOW) | (second & _HIGH)
        words[part, :, 0] = (low ^ _OFFSET).permute(0, 2, 3, 1)
        words[part, :, 1] = (high ^ _OFFSET).permute(0, 2, 3, 1)
    return words.view(torch.uint8).view(panels, -1)


def _from_panels(packed: Tensor) -> Tensor:
    """Undo ``_to_panels``: uint8 [N in whole panels, Kp / 2]."""
    panels, blocks = packed.shape[0], packed.shape[1] // (_HALF * BLOCK_K)
    words = packed.view(torch.int32).view(panels, blocks, 2, _WORDS, _HALF)
    rows = words.new_empty(panels, 2, _HALF, blocks, _WORDS)
    for part in _parts(panels, packed.shape[1] // PANEL_N):
        # [panels, 8, Kp / 64, 8] each
        low, high = ((words[part, :, i] ^ _OFFSET).permute(0, 3, 1, 2) for i in range(2))
        rows[part, 0] = (low & _LOW) | ((high & _LOW) << 4)
        rows[part, 1] = ((low >> 4) & _LOW) | (high & _HIGH)
    return rows.view(torch.uint8).view(panels * PANEL_N, -1)


def _parts(panels: int, row_bytes: int) -> Iterator[slice]:
    """Slices of the panels that are rearranged at once."""
    count = max(1, _PART_BYTES // max(1, PANEL_N * row_bytes))
    return (slice(start, start + count) for start in range(0, panels, count))


def _to_fragments(w_q: Tensor, bits: int) -> Tensor:
    """Bring int8 [N, Kp], N in whole panels, into order ``cuda``."""
    # panel, half h, lane / 4, block of 64 k, step j, half of the step's k, lane % 4, byte
    axes = w_q.reshape(w_q.shape[0] // PANEL_N, 2, 8, w_q.shape[1] // BLOCK_K, 2, 2, 4, 4)
    if bits == 8:
        return axes.permute(0, 3, 4, 2, 6, 1, 5, 7).reshape(axes.shape[0], -1).contiguous()
    low, high = axes.unbind(5)
    nibbles = (low & 15) | (high << 4)
    ordered = nibbles.permute(0, 3, 2, 5, 1, 4, 6).reshape(axes.shape[0], -1)
    return ordered.contiguous().view(torch.uint8)


def _from_fragments(packed: Tensor, bits: int, k_padded: int) -> Tensor:
    """Undo ``_to_fragments``: int8 [N in whole panels, Kp]."""
    panels, blocks = packed.shape[0], k_padded // BLOCK_K
    if bits == 8:
        axes = packed.reshape(panels, blocks, 2, 8, 4, 2, 2, 4).permute(0, 5, 3, 1, 2, 6, 4, 7)
        return axes.reshape(panels * PANEL_N, k_padded)
    nibbles = packed.reshape(panels, blocks, 8, 4, 2, 2, 4).permute(0, 4, 2, 1, 5, 3, 6)
    both = torch.stack(((nibbles & 15).to(torch.int8), (nibbles >> 4).to(torch.int8)), dim=5)
    w_q = both.reshape(panels * PANEL_N, k_padded)
    return (w_q ^ 8) - 8  # a nibble is in two's complement


def _check_shape(qweight: Tensor, expected: tuple[int, int]) -> None:
    if tuple(qweight.shape) != expected:
        raise ShapeError(f"qweight {list(qweight.shape)}: expected {list(expected)}")
