"""Tensors out of a TensorFlow checkpoint, without TensorFlow.

A checkpoint is two files. `.data-00000-of-00001` is the tensors' bytes, one after the other.
`.index` is a sorted table from names to protocol buffers, which say where each tensor lies:

    block:  entries, restart offsets, their count | compression: 1 byte | checksum: 4 bytes
    entry:  shared, own, length (varints) | own bytes of the key | value
    end:    position and size of the metaindex and of the index block (varints), ..., 8 magic bytes

The index block's values are positions and sizes of the blocks that hold the entries. Only float32
tensors of one uncompressed shard are read; checkpoints hold nothing else here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ptq4adm.errors import CheckpointError, TruncatedCheckpointError

_MAGIC = bytes.fromhex("57fb808b247547db")
_FOOTER = 48
_TRAILER = 5  # after a block: its compression, and a checksum
_FLOAT = 1
# fields of BundleEntryProto, of its shape, and of a dimension
_DTYPE, _SHAPE, _SHARD, _OFFSET, _SIZE = 1, 2, 3, 4, 5
_DIMENSION, _DIMENSION_SIZE = 2, 1
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def read_bundle(index: bytes, data: bytes) -> dict[str, Tensor]:
    """Read every float32 tensor of a checkpoint of one shard.

    Args:
        index: content of the `.index` file.
        data: content of the `.data-00000-of-00001` file.

    Returns:
        names to float32 tensors; those of other types (a step counter) are passed over.

    Raises:
        TruncatedCheckpointError: if either file is cut short or damaged.
        CheckpointError: if it is no such checkpoint, is compressed, or has several shards.
    """
    if len(index) < _FOOTER or not index.endswith(_MAGIC):
        raise CheckpointError(
            f"index of {len(index)} bytes: not the .index file of a TensorFlow checkpoint; give "
            "the file itself"
        )
    footer = len(index) - _FOOTER
    try:
        start, at = _varint(index, footer)
        _, at = _varint(index, at)
        start, at = _varint(index, at)
        size, _ = _varint(index, at)
        tensors, blocks = {}, index[:footer]
        for _, handle in _entries(blocks, start, size):
            start, at = _varint(handle, 0)
            size, _ = _varint(handle, at)
            for key, value in _entries(blocks, start, size):
                fields = _fields(value)
                # the empty key holds the header
                if key and fields.get(_DTYPE) == _FLOAT:
                    tensors[key.decode()] = _tensor(key.decode(), fields, data)
    except (IndexError, UnicodeDecodeError) as error:
        raise TruncatedCheckpointError(
            f"index of {len(index)} bytes: cut short or damaged ({error}); copy it again"
        ) from error
    return tensors


def _tensor(name: str, fields: dict[int, int | bytes], data: bytes) -> Tensor:
    if fields.get(_SHARD, 0) != 0:
        raise CheckpointError(f"{name}: lies in another shard; a checkpoint of one is needed")
    shape = _shape(fields.get(_SHAPE, b""))
    offset, size = fields.get(_OFFSET, 0), fields.get(_SIZE, 0)
    if not isinstance(offset, int) or not isinstance(size, int) or size != 4 * math.prod(shape):
        raise TruncatedCheckpointError(
            f"{name}: {size!r} bytes for shape {shape} of float32: damaged; copy it again"
        )
    if offset + size > len(data):
        raise TruncatedCheckpointError(
            f"{name}: ends at byte {offset + size}, the data file has {len(data)}; copy it again"
        )
    if size == 0:
        return torch.empty(shape)
    # a copy, as the file's bytes may not be written to
    values = bytearray(data[offset : offset + size])
    return torch.frombuffer(values, dtype=torch.float32).reshape(shape)


def _shape(content: int | bytes) -> tuple[int, ...]:
    sizes = []
    for number, value in _messages(content):
        if number == _DIMENSION:
            size = _fields(value).get(_DIMENSION_SIZE, 0)
            sizes.append(size if isinstance(size, int) else -1)
    return tuple(sizes)


def _entries(table: bytes, start: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of one block."""
    block = table[start : start + size]
    if len(block) != size or start + size + _TRAILER > len(table):
        raise IndexError(f"a block ends at byte {start + size}")
    if table[start + size] != 0:
        raise CheckpointError("the index is compressed, which checkpoints of TensorFlow are not")
    restarts = int.from_bytes(block[-4:], "little")
    end = size - 4 * (restarts + 1)
    at, key = 0, b""
    while at < end:
        shared, at = _varint(block, at)
        own, at = _varint(block, at)
        length, at = _varint(block, at)
        key = key[:shared] + _take(block, at, own)
        yield key, _take(block, at + own, length)
        at += own + length


def _fields(message: int | bytes) -> dict[int, int | bytes]:
    """The last value of each field."""
    return dict(_messages(message))


def _messages(message: int | bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and values of a protocol buffer, in order."""
    if not isinstance(message, bytes):
        raise IndexError("a number where a message was expected")
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == _VARINT:
            value, at = _varint(message, at)
            yield tag >> 3, value
            continue
        if kind == _BYTES:
            length, at = _varint(message, at)
        elif kind in (_FIXED64, _FIXED32):
            length = 8 if kind == _FIXED64 else 4
        else:
            raise IndexError(f"a field of kind {kind}")
        yield tag >> 3, _take(message, at, length)
        at += length


def _take(content: bytes, at: int, length: int) -> bytes:
    part = content[at : at + length]
    if len(part) != length:
        raise IndexError(f"{length} bytes at {at} of {len(content)}")
    return part


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """A number of 7 bits a byte, and where it ends."""
    value = shift = 0
    while True:
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at
