"""Programs of a few instructions: addresses, global memory, and blocks that share it."""

from __future__ import annotations

from emulator_programs import (
    BARRIER,
    COMMIT,
    EVERY,
    FIRST_COPY,
    LANES,
    WAIT,
    Case,
    Step,
    both,
    one,
)

ADDRESSES: dict[str, Case] = {
    "shared, past the end": (
        "store: out of bounds: byte 1024 of shared memory, which has 1024",
        [Step("store", offset=1024, threads=one(0))],
        [Step("store", offset=1020, threads=one(0))],
    ),
    "shared by a global instruction": (
        "load_l2_16: out of bounds: 16 bytes at 0x.*, in no registered memory",
        [Step("store_16", threads=one(0)), Step("load_l2_16", threads=one(0))],
        [Step("store_16", "buffer", threads=one(0)), Step("load_l2_16", "buffer", threads=one(0))],
    ),
    "global, past the end": (
        "load: out of bounds: 4 bytes at offset 256 of buffer, which has 256",
        [Step("load", "buffer", offset=256, threads=one(0))],
        [Step("load", "buffer", offset=252, threads=one(0))],
    ),
    "global, before the start": (
        "store_l2_16: out of bounds: 16 bytes at offset -16 of buffer, which has 256",
        [Step("store_l2_16", "buffer", offset=-16, threads=one(0))],
        [Step("store_l2_16", "buffer", offset=0, threads=one(0))],
    ),
    "not registered": (
        "load_stream_16: out of bounds",
        [Step("load_stream_16", "nowhere")],
        [Step("load_stream_16", "weights")],
    ),
    "copy from outside": (
        "copy_async_16: out of bounds: 16 bytes at offset 256 of weights, which has 256",
        [Step("copy_async_16", threads=one(0), source=("weights", 256)), COMMIT, WAIT],
        [Step("copy_async_16_invalid", threads=one(0), source=("weights", 256)), COMMIT, WAIT],
    ),
    "copy to global memory": (
        "copy_async_16: out of bounds: .* is not in shared memory",
        [Step("copy_async_16", "buffer", threads=one(0)), COMMIT, WAIT],
        [FIRST_COPY, COMMIT, WAIT],
    ),
    "matrix in global memory": (
        "load_matrix_x4: out of bounds: .* is not in shared memory",
        [Step("load_matrix_x4", "weights", threads=LANES)],
        [Step("store_16", threads=one(0)), BARRIER, Step("load_matrix_x4", threads=LANES)],
    ),
    "a word": (
        "store: misaligned: .* is no multiple of 4",
        [Step("store", offset=2, threads=one(0))],
        [Step("store", offset=4, threads=one(0))],
    ),
    "16 bytes": (
        "load_16: misaligned: .* is no multiple of 16",
        [Step("load_16", "weights", offset=8)],
        [Step("load_16", "weights", offset=16)],
    ),
    "a row of a matrix": (
        "load_matrix_x4: misaligned: .* is no multiple of 16",
        [Step("store_16", stride=16), BARRIER, Step("load_matrix_x4", offset=8)],
        [Step("store_16", stride=16), BARRIER, Step("load_matrix_x4", offset=16)],
    ),
    "source of a copy": (
        "copy_async_16: misaligned: .* is no multiple of 16",
        [Step("copy_async_16", threads=one(0), source=("weights", 8)), COMMIT, WAIT],
        [Step("copy_async_16", threads=one(0), source=("weights", 16)), COMMIT, WAIT],
    ),
    "target of a copy": (
        "copy_async_16: misaligned",
        [Step("copy_async_16_invalid", offset=24, threads=one(0)), COMMIT, WAIT],
        [Step("copy_async_16_invalid", offset=32, threads=one(0)), COMMIT, WAIT],
    ),
    "a counter": (
        "count_arrival: misaligned",
        [Step("count_arrival", "buffer", offset=6)],
        [Step("count_arrival", "buffer", offset=8)],
    ),
    "write to what is read only": (
        "store: writes weights, which is registered to be read only",
        [Step("store", "weights", threads=one(0))],
        [Step("store", "buffer", threads=one(0))],
    ),
    "count in what is read only": (
        "count_arrival: counts in weights, which is registered to be read only",
        [Step("count_arrival", "weights", threads=one(0))],
        [Step("count_arrival", "buffer", threads=one(0))],
    ),
    "unwritten workspace": (
        "load: reads byte 32 of workspace, which this launch has not written",
        [Step("load", "workspace", offset=32, threads=one(0))],
        [
            Step("store", "workspace", offset=32, threads=one(0)),
            Step("load", "workspace", offset=32, threads=one(0)),
        ],
    ),
    "constant after a write": (
        "load_stream_16: reads as constant byte 0 of buffer, which this launch writes",
        [Step("store", "buffer", threads=one(0)), Step("load_stream_16", "buffer", threads=one(0))],
        [Step("store", "buffer", threads=one(0)), Step("load_l2_16", "buffer", threads=one(0))],
    ),
    "write after a constant": (
        "store: writes byte 0 of buffer, which was read as constant",
        [Step("load_stream_16", "buffer", threads=one(0)), Step("store", "buffer", threads=one(0))],
        [Step("load_l2_16", "buffer", threads=one(0)), Step("store", "buffer", threads=one(0))],
    ),
}


FIRST, SECOND = (0, 0), (1, 1)
LAST = 1  # the count that the last of two blocks gets
# Each of two blocks writes its own 64 bytes of the workspace, and reads from the other's.
WORK = [
    Step("store", "workspace", 128 * block, stride=4, threads=(0, 15), blocks=(block, block))
    for block in (0, 1)
]


def read_others(when: int) -> list[Step]:
    return [
        Step("load_l2_16", "workspace", 128, threads=one(3), blocks=FIRST, when=when),
        Step("load_l2_16", "workspace", 0, threads=one(3), blocks=SECOND, when=when),
    ]


def count(offset: int = 128, blocks: tuple[int, int] = EVERY) -> Step:
    return Step("count_arrival", "buffer", offset, threads=one(0), blocks=blocks)


# how thread 0 tells the others what it has counted
TELL = [Step("store_loaded", threads=one(0)), BARRIER, Step("load")]
ARRIVE = [BARRIER, count(), *TELL]
REDUCE = [*WORK, *ARRIVE, *read_others(LAST)]

GLOBAL: dict[str, Case] = {
    "threads, read after write": (
        "load: race: reads byte 0 of buffer, which thread 1 wrote, and no barrier orders the two",
        *both(
            Step("store", "buffer", threads=one(1), blocks=FIRST),
            Step("load", "buffer", threads=one(2), blocks=FIRST),
        ),
    ),
    "threads, write after read": (
        "store: race: writes byte 0 of buffer, which thread 1 read, and no barrier",
        *both(
            Step("load", "buffer", threads=one(1), blocks=FIRST),
            Step("store", "buffer", threads=one(2), blocks=FIRST),
        ),
    ),
    "blocks, two writes": (
        r"block \(1, 0, 0\).* store: race: writes byte 0 of buffer, which block number 0 wrote",
        [Step("store", "buffer", threads=one(0))],
        [*ARRIVE, Step("store", "buffer", threads=one(0), when=LAST)],
    ),
    "blocks, write after read": (
        "store: race: writes byte 0 of buffer, which block number 0 read, and no counter",
        [
            Step("load", "buffer", threads=one(0), blocks=FIRST),
            Step("store", "buffer", threads=one(0), blocks=SECOND),
        ],
        [
            Step("load", "buffer", threads=one(0)),
            *[*ARRIVE, Step("store", "buffer", offset=4, threads=one(0), when=LAST)],
        ],
    ),
    "blocks, no counter": (
        "load_l2_16: race: reads byte 0 of workspace, which block number 0 wrote, and no counter",
        [*WORK, BARRIER, read_others(-1)[1]],
        REDUCE,
    ),
    "arrival without a barrier before": (
        "load_l2_16: race: reads byte 4 of workspace, which block number 0 wrote",
        [*WORK, count(), *TELL, *read_others(LAST)],
        REDUCE,
    ),
    "arrival without a barrier after": (
        "load_l2_16: race: reads byte 0 of workspace, which block number 0 wrote",
        [*WORK, BARRIER, count(), read_others(-1)[1]],
        REDUCE,
    ),
    "two counters": (
        "load_l2_16: race: reads byte 0 of workspace, which block number 0 wrote",
        [*WORK, BARRIER, count(128, FIRST), count(132, SECOND), BARRIER, read_others(-1)[1]],
        REDUCE,
    ),
    "a counter that is stored to": (
        "store: race: writes byte 128 of buffer, which block number 0 counted at",
        [count(128, FIRST), Step("store", "buffer", 128, threads=one(0), blocks=SECOND)],
        [*ARRIVE, Step("store", "buffer", 128, threads=one(0), when=LAST)],
    ),
    "a counter that is read": (
        "load: race: reads byte 128 of buffer, which block number 0 counted at",
        [count(128, FIRST), Step("load", "buffer", 128, threads=one(0), blocks=SECOND)],
        [*ARRIVE, Step("load", "buffer", 128, threads=one(0), when=LAST)],
    ),
    "an uninitialized counter": (
        "count_arrival: reads byte 0 of workspace, which this launch has not written",
        [Step("count_arrival", "workspace", threads=one(0))],
        [Step("count_arrival", "buffer", threads=one(0))],
    ),
}
