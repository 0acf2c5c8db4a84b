"""The reader of TensorFlow's checkpoints, on ones that a writer of their format made."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ptq4adm.errors import CheckpointError, TruncatedCheckpointError
from ptq4adm.evaluation.tf_bundle import read_bundle

_INT64 = 9


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _block(entries: list[tuple[bytes, bytes]]) -> bytes:
    """Keys share what they begin with, as LevelDB's tables do."""
    out, last = b"", b""
    for key, value in entries:
        shared = 0
        while shared < min(len(key), len(last)) and key[shared] == last[shared]:
            shared += 1
        out += _varint(shared) + _varint(len(key) - shared) + _varint(len(value))
        out += key[shared:] + value
        last = key
    return out + bytes(4) + (1).to_bytes(4, "little")


def write_bundle(
    tensors: dict[str, Tensor], *, per_block: int = 3, compression: int = 0, shard: int = 0
) -> tuple[bytes, bytes]:
    """Index and data of a checkpoint, with a step counter that is no float."""
    data, entries = b"", [(b"", _field(1, 1))]
    items = {**tensors, "global_step": torch.tensor(300)}
    for name in sorted(items):
        tensor = items[name]
        content = tensor.contiguous().numpy().tobytes()
        shape = b"".join(_field(2, _field(1, size)) for size in tensor.shape)
        entry = _field(1, 1 if tensor.dtype == torch.float32 else _INT64) + _field(2, shape)
        entry += _field(3, shard) if shard else b""
        entry += _field(4, len(data)) if data else b""  # a zero is left out
        entry += _field(5, len(content)) + _varint(6 << 3 | 5) + b"\1\2\3\4"
        entries.append((name.encode(), entry))
        data += content
    index, handles = b"", []
    for start in range(0, len(entries), per_block):
        block = _block(entries[start : start + per_block])
        last = entries[start : start + per_block][-1][0]
        handles.append((last + b"~", _varint(len(index)) + _varint(len(block))))
        index += block + bytes([compression]) + bytes(4)
    table = _block(handles)
    footer = _varint(len(index)) + _varint(0) + _varint(len(index)) + _varint(len(table))
    index += table + bytes([compression]) + bytes(4)
    return index + footer.ljust(40, b"\0") + bytes.fromhex("57fb808b247547db"), data


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    shapes = {"conv2d/kernel": (7, 3, 1, 5), "conv2d_1/kernel": (2, 1, 5, 200), "dense/bias": (1,)}
    shapes |= {"conv2d/bias": (5,), "beta1_power": (), "empty": (0, 3), "x" * 300: (3,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("per_block", [1, 3, 100])
def test_reads_what_was_written(tensors: dict[str, Tensor], per_block: int) -> None:
    found = read_bundle(*write_bundle(tensors, per_block=per_block))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor)


def test_another_file_a_compressed_one_and_several_shards_are_refused(
    tensors: dict[str, Tensor],
) -> None:
    with pytest.raises(CheckpointError, match=r"not the \.index file"):
        read_bundle(b"PK" + bytes(100), b"")
    with pytest.raises(CheckpointError, match="compressed"):
        read_bundle(*write_bundle(tensors, compression=1))
    with pytest.raises(CheckpointError, match="another shard"):
        read_bundle(*write_bundle(tensors, shard=1))


def test_every_cut_of_the_index_is_a_clear_error(tensors: dict[str, Tensor]) -> None:
    index, data = write_bundle(tensors)
    for cut in range(0, len(index) - 48, 7):
        with pytest.raises(CheckpointError):
            read_bundle(index[:cut] + index[-48:], data)


def test_data_that_is_cut_short_names_the_tensor(tensors: dict[str, Tensor]) -> None:
    index, data = write_bundle(tensors)
    with pytest.raises(TruncatedCheckpointError, match=r"x: ends at byte \d+"):
        read_bundle(index, data[:-4])
