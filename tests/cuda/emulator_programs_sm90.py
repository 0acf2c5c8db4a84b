"""What programs of a few instructions of sm_90a are made of.

A tile of B for a product of 32 columns lies at 0 (2048 bytes), boxes of 512 bytes where a program
puts them, barriers from 4096 on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

EVERY = (0, 1023)
GROUP = (0, 127)
FULL, EMPTY = 4096, 4104  # two barriers
BOX_BYTES = 512


@dataclass(frozen=True)
class Step:
    """One instruction of the threads named (first and last); the others pass it by.

    The address is ``offset + stride * thread`` in shared memory; a store writes the
    thread's number.
    """

    instruction: str
    offset: int = 0
    stride: int = 0
    barrier: int = FULL
    number: int = 0
    second: int = 0
    threads: tuple[int, int] = EVERY


# what the error says, the wrong program, the nearest right one, and threads of the block
Case = tuple[str, list[Step], list[Step], int]


def one(thread: int) -> tuple[int, int]:
    return (thread, thread)


def init(barrier: int = FULL, count: int = 1) -> list[Step]:
    """A barrier that all may use, copies too."""
    return [
        Step("barrier_init", barrier=barrier, number=count, threads=one(0)),
        Step("barrier_init_fence", threads=one(0)),
        BARRIER,
    ]


def arrive(threads: tuple[int, int], barrier: int = FULL) -> Step:
    return Step("barrier_arrive", barrier=barrier, threads=threads)


def wait(parity: int, threads: tuple[int, int] = EVERY, barrier: int = FULL) -> Step:
    return Step("barrier_wait", barrier=barrier, number=parity, threads=threads)


def expect(size: int = BOX_BYTES, thread: int = 0, barrier: int = FULL) -> Step:
    return Step("barrier_arrive_expect", number=size, threads=one(thread), barrier=barrier)


def box(offset: int = 0, thread: int = 0, barrier: int = FULL) -> Step:
    return Step("copy_box_2d", offset, threads=one(thread), barrier=barrier)


def named(number: int, threads: int, who: tuple[int, int]) -> Step:
    return Step("warpgroup_barrier", number=number, second=threads, threads=who)


def by(step: Step, threads: tuple[int, int]) -> Step:
    return replace(step, threads=threads)


BARRIER = Step("block_barrier")
FENCE = Step("async_proxy_fence")
STORE, LOAD = Step("store", threads=one(1)), Step("load", threads=one(40))
