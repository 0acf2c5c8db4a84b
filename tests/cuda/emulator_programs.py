"""Programs of a few instructions: what threads of one block must not do to each other."""

from __future__ import annotations

from dataclasses import dataclass

EVERY = (0, 1023)


@dataclass(frozen=True)
class Step:
    """One instruction of the threads and blocks named (first and last); the others pass it by.

    The address is ``offset + stride * thread`` in ``space``; a store writes 1000 block + thread.
    """

    instruction: str
    space: str = "shared"
    offset: int = 0
    stride: int = 0
    threads: tuple[int, int] = EVERY
    blocks: tuple[int, int] = EVERY
    source: tuple[str, int] = ("weights", 0)
    when: int = -1  # only by threads that loaded this last


def one(thread: int) -> tuple[int, int]:
    return (thread, thread)


BARRIER = Step("block_barrier")
COMMIT = Step("copy_async_commit")
WAIT = Step("copy_async_wait<0>")
COPY = Step("copy_async_16", stride=16)
FIRST_COPY = Step("copy_async_16", threads=one(0))
LANES = (0, 31)


def both(first: Step, second: Step) -> tuple[list[Step], list[Step]]:
    """The two without and with a barrier between."""
    return [first, second], [first, BARRIER, second]


# what the error says, the wrong program, and the nearest right one
Case = tuple[str, list[Step], list[Step]]

SHARED: dict[str, Case] = {
    "unwritten": (
        "warp 1, lane 3: load: reads shared byte 64, which nothing has written",
        [Step("load", offset=64, threads=one(35))],
        [Step("store", offset=64, threads=one(35)), Step("load", offset=64, threads=one(35))],
    ),
    "read after write": (
        "lane 2: load: race: reads shared byte 0, which thread 1 wrote since the last barrier",
        *both(Step("store", threads=one(1)), Step("load", threads=one(2))),
    ),
    "write after write": (
        "store_16: race: writes shared byte 4, which thread 1 wrote",
        *both(Step("store", offset=4, threads=one(1)), Step("store_16", offset=0, threads=one(40))),
    ),
    "write after read": (
        "store: race: writes shared byte 0, which thread 7 read",
        *(
            [Step("store", threads=one(0)), BARRIER, *program]
            for program in both(Step("load", threads=one(7)), Step("store", threads=one(8)))
        ),
    ),
    "write after several read": (
        "store: race: writes shared byte 0, which several threads read",
        *(
            [Step("store", threads=one(0)), BARRIER, *program]
            for program in both(Step("load"), Step("store", threads=one(8)))
        ),
    ),
    "matrix of a lane's own bytes": (
        "load_matrix_x4: race: reads shared byte 0, which thread 0 wrote",
        *both(Step("store_16", stride=16), Step("load_matrix_x4", stride=16)),
    ),
    "write after a matrix was read": (
        "store_16: race: writes shared byte 0, which several threads read",
        *(
            [Step("store_16", stride=16), BARRIER, *program]
            for program in both(
                Step("load_matrix_x4", stride=16), Step("store_16", stride=16, threads=one(0))
            )
        ),
    ),
    "past the instructions": (
        "block_barrier: shared byte 8 was changed, and by none of the instructions",
        [Step("plain_store", offset=8, threads=one(0)), BARRIER],
        [Step("store", offset=8, threads=one(0)), BARRIER],
    ),
    "past the instructions, at the end": (
        "exit: shared byte 8 was changed, and by none of the instructions",
        [Step("plain_store", offset=8, threads=one(0))],
        [Step("store", offset=8, threads=one(0))],
    ),
}
COPIES: dict[str, Case] = {
    "read without a wait": (
        "load: reads shared byte 0, whose cp.async thread 0 has not waited for",
        [FIRST_COPY, COMMIT, Step("load", threads=one(0)), WAIT],
        [FIRST_COPY, COMMIT, WAIT, Step("load", threads=one(0))],
    ),
    "read without a wait after a barrier": (
        "load: reads shared byte 0, whose cp.async thread 0 has not waited for",
        [FIRST_COPY, COMMIT, BARRIER, Step("load", threads=one(9)), BARRIER, WAIT],
        [FIRST_COPY, COMMIT, WAIT, BARRIER, Step("load", threads=one(9))],
    ),
    "wait before the commit": (
        "load: reads shared byte 0, whose cp.async thread 0 has not waited for",
        [FIRST_COPY, WAIT, Step("load", threads=one(0))],
        [FIRST_COPY, COMMIT, WAIT, Step("load", threads=one(0))],
    ),
    "read of the group that may be pending": (
        "load: reads shared byte 0, whose cp.async thread 0 has not waited for",
        [FIRST_COPY, COMMIT, Step("copy_async_wait<1>"), Step("load", threads=one(0)), WAIT],
        [FIRST_COPY, COMMIT, COMMIT, Step("copy_async_wait<1>"), Step("load", threads=one(0))],
    ),
    "read of what another waited for": (
        "load: race: reads shared byte 0, which thread 0 wrote since the last barrier",
        [FIRST_COPY, COMMIT, WAIT, Step("load", threads=one(1))],
        [FIRST_COPY, COMMIT, WAIT, BARRIER, Step("load", threads=one(1))],
    ),
    "write into a flight": (
        "store: writes shared byte 12, whose cp.async thread 0 has not waited for",
        [FIRST_COPY, COMMIT, Step("store", offset=12, threads=one(0)), WAIT],
        [FIRST_COPY, COMMIT, WAIT, Step("store", offset=12, threads=one(0))],
    ),
    "copy into a flight": (
        "copy_async_16: writes shared byte 0, whose cp.async thread 0 has not waited for",
        [FIRST_COPY, COMMIT, FIRST_COPY, COMMIT, WAIT],
        [FIRST_COPY, COMMIT, WAIT, FIRST_COPY, COMMIT, WAIT],
    ),
    "copy over what was read": (
        "copy_async_16: race: writes shared byte 16, which thread 0 read",
        *(
            [COPY, COMMIT, WAIT, BARRIER, *program, COMMIT, WAIT]
            for program in both(Step("load", offset=16, threads=one(0)), COPY)
        ),
    ),
    "no wait at all": (
        "warp 0, lane 0: exit: has not waited for 2 of its cp.async",
        [FIRST_COPY, COMMIT, Step("copy_async_16_invalid", offset=16, threads=one(0))],
        [FIRST_COPY, COMMIT, WAIT],
    ),
}
DIVERGENCE: dict[str, Case] = {
    "two instructions": (
        "lane 31: multiply_s8_16x8x32: diverged: 31 lanes of the warp wait at load_matrix_x4",
        [
            Step("store_16", stride=16),
            BARRIER,
            Step("load_matrix_x4", stride=16, threads=(0, 30)),
            Step("multiply_s8_16x8x32"),
        ],
        [
            Step("store_16", stride=16),
            BARRIER,
            Step("load_matrix_x4", stride=16, threads=(0, 31)),
            Step("multiply_s8_16x8x32"),
        ],
    ),
    "a lane that left": (
        "lane 1: multiply_s8_16x8x32: diverged: 1 lanes of the warp have exited",
        [Step("exit", threads=one(32)), Step("multiply_s8_16x8x32")],
        [Step("exit", threads=(32, 63)), Step("multiply_s8_16x8x32")],
    ),
    "a lane that leaves": (
        "lane 31: exit: diverged: 31 lanes of the warp wait at multiply_s8_16x8x32",
        [Step("multiply_s8_16x8x32", threads=(0, 30))],
        [Step("multiply_s8_16x8x32", threads=(0, 31))],
    ),
    "a barrier beside a product": (
        "lane 5: multiply_s8_16x8x32: diverged: 5 lanes of the warp wait at block_barrier",
        [Step("block_barrier", threads=(0, 4)), Step("multiply_s8_16x8x32"), BARRIER],
        [BARRIER, Step("multiply_s8_16x8x32"), BARRIER],
    ),
    "a product beside a barrier": (
        "lane 5: block_barrier: diverged: 5 lanes of the warp wait at multiply_s8_16x8x32",
        [Step("multiply_s8_16x8x32", threads=(0, 4)), BARRIER],
        [Step("multiply_s8_16x8x32", threads=(0, 31)), BARRIER],
    ),
    "a barrier after some left": (
        "warp 1, lane 0: block_barrier: diverged: 32 threads of the block have exited",
        [Step("exit", threads=LANES), BARRIER],
        [BARRIER, Step("exit", threads=LANES)],
    ),
    "leaving while others wait at a barrier": (
        "warp 1, lane 0: exit: diverged: 32 threads of the block wait at block_barrier",
        [Step("block_barrier", threads=LANES)],
        [BARRIER],
    ),
}
