"""Programs of a few instructions of sm_90a: barriers, boxes and products that may go wrong.

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

BARRIERS: dict[str, Case] = {
    "no init": (
        "barrier_arrive: there is no barrier at shared byte 4096: barrier_init has not run",
        [arrive(one(0))],
        [*init(), arrive(one(0))],
        64,
    ),
    "wait without an init": (
        "barrier_wait: there is no barrier at shared byte 4104",
        [*init(), wait(1, barrier=EMPTY)],
        [*init(), *init(EMPTY), wait(1, barrier=EMPTY)],
        64,
    ),
    "init that others do not know of": (
        "the barrier at shared byte 4096 was initialized by thread 0, and no barrier orders",
        [*init()[:2], arrive(one(1)), BARRIER],
        [*init(), arrive(one(1))],
        64,
    ),
    "init twice": (
        "barrier_init: there is a barrier at shared byte 4096 already",
        [*init(), *init()],
        [*init(), *init(EMPTY)],
        64,
    ),
    "init for nobody": (
        "barrier_init: 0 arrivals; needed: 1 to 1048575",
        init(count=0),
        init(count=1),
        64,
    ),
    "init over what is read": (
        "(barrier_init: race: writes|store: writes) shared byte 4096, which (thread 3|is a part)",
        [Step("store", 4096, threads=one(3)), *init()],
        [Step("store", 4096, threads=one(3)), BARRIER, *init()],
        64,
    ),
    "misaligned": (
        "barrier_init: misaligned",
        init(FULL + 4),
        init(FULL + 8),
        64,
    ),
    "outside": (
        "barrier_init: out of bounds: byte 8192 of shared memory, which has 8192",
        init(8192),
        init(8184),
        64,
    ),
    "a store into a barrier": (
        "store: writes shared byte 4100, which is a part of a barrier",
        [*init(), Step("store", 4100, threads=one(0))],
        [*init(), Step("store", 4104, threads=one(0))],
        64,
    ),
    "a load from a barrier": (
        "load: reads shared byte 4096, which is a part of a barrier",
        [*init(), Step("load", 4096, threads=one(0))],
        [*init(), by(STORE, one(0)), by(LOAD, one(0))],
        64,
    ),
    "a plain store into a barrier": (
        "shared byte 4098 was changed, and by none of the instructions",
        [*init(), Step("plain_store", 4098, threads=one(0)), BARRIER],
        [*init(), BARRIER],
        64,
    ),
    "an arrival too many": (
        "an arrival too many in phase 0 of the barrier at shared byte 4096, which counts 1",
        [*init(), expect(), arrive(one(1)), BARRIER, box(), wait(0)],
        [*init(), expect(), box(), wait(0), BARRIER, arrive(one(1))],
        64,
    ),
    "an arrival too few": (
        r"every thread of the block waits for another; threads 0 to 63 at barrier_wait \(shared "
        r"byte 4096, parity 0: its phase 0 lacks 1 arrivals and 0 bytes\)",
        [*init(count=2), arrive(one(1)), wait(0)],
        [*init(count=2), arrive(one(1)), arrive(one(2)), wait(0)],
        64,
    ),
    "the other parity": (
        r"threads 0 to 63 at barrier_wait \(shared byte 4096, parity 1: its phase 1 lacks 1",
        [*init(), arrive(one(1)), wait(0), wait(1)],
        [*init(), wait(1), BARRIER, arrive(one(1)), wait(0)],
        64,
    ),
    "a parity that is none": (
        "barrier_wait: parity 2; needed: 0 or 1",
        [*init(), arrive(one(0)), wait(2)],
        [*init(), arrive(one(0)), wait(0)],
        64,
    ),
    "two phases at once": (
        "phase 1 of the barrier at shared byte 4096 completes while 1 threads still wait for "
        "phase 0",
        [*init(), wait(0, one(1)), arrive(one(40)), arrive(one(40))],
        [
            *init(),
            *init(EMPTY),
            *(wait(0, one(1)), arrive(one(1), EMPTY)),
            *(arrive(one(40)), wait(0, one(40), EMPTY), arrive(one(40))),
        ],
        64,
    ),
    "waits in a circle": (
        r"threads 0 to 0 at barrier_wait \(shared byte 4096.*; threads 1 to 1 at barrier_wait "
        r"\(shared byte 4104.*; threads 2 to 63 at block_barrier",
        [
            *init(),
            *init(EMPTY),
            wait(0, one(0)),
            wait(0, one(1), EMPTY),
            arrive(one(0), EMPTY),
            arrive(one(1)),
            BARRIER,
        ],
        [
            *init(),
            *init(EMPTY),
            wait(0, one(0)),
            arrive(one(1)),
            wait(0, one(1), EMPTY),
            arrive(one(0), EMPTY),
            BARRIER,
        ],
        64,
    ),
    "read before the wait": (
        "load: race: reads shared byte 0, which thread 1 wrote",
        [*init(), STORE, arrive(one(1)), LOAD, wait(0, one(40)), BARRIER],
        [*init(), STORE, arrive(one(1)), wait(0, one(40)), LOAD, BARRIER],
        64,
    ),
    "write after the arrival": (
        "race: .* shared byte 0, which thread (1 wrote|40 read)",
        [*init(), arrive(one(1)), STORE, wait(0, one(40)), LOAD],
        [*init(), STORE, arrive(one(1)), wait(0, one(40)), LOAD],
        64,
    ),
    "arrival of another": (
        "load: race: reads shared byte 0, which thread 1 wrote",
        [*init(), STORE, arrive(one(2)), wait(0, one(40)), LOAD],
        [*init(count=2), STORE, arrive((1, 2)), wait(0, one(40)), LOAD],
        64,
    ),
    "wait of another": (
        "load: race: reads shared byte 0, which thread 1 wrote",
        [*init(), STORE, arrive(one(1)), wait(0, one(41)), LOAD],
        [*init(), STORE, arrive(one(1)), wait(0, (40, 41)), LOAD],
        64,
    ),
    "a lane's wait for a matrix": (
        "load_matrix_x4: race: reads shared byte 0, which thread 40 wrote",
        [
            *init(),
            Step("store_16", threads=one(40)),
            arrive(one(40)),
            wait(0, one(31)),
            Step("load_matrix_x4", threads=(0, 31)),
        ],
        [
            *init(),
            Step("store_16", threads=one(40)),
            arrive(one(40)),
            wait(0, (0, 31)),
            Step("load_matrix_x4", threads=(0, 31)),
        ],
        64,
    ),
    "a lane's arrival after a matrix": (
        "store: race: writes shared byte 0, which several threads read",
        [
            *init(),
            Step("store_16", threads=one(0)),
            BARRIER,
            Step("load_matrix_x4", threads=(0, 31)),
            arrive(one(0)),
            wait(0, one(40)),
            by(STORE, one(40)),
        ],
        [
            *init(count=32),
            Step("store_16", threads=one(0)),
            BARRIER,
            Step("load_matrix_x4", threads=(0, 31)),
            arrive((0, 31)),
            wait(0, one(40)),
            by(STORE, one(40)),
        ],
        64,
    ),
    "write over what one of two still reads": (
        "store: race: writes shared byte 0, which several threads read",
        [
            *init(),
            STORE,
            BARRIER,
            by(LOAD, (2, 3)),
            arrive(one(2)),
            wait(0, one(40)),
            by(STORE, one(40)),
        ],
        [
            *init(count=2),
            STORE,
            BARRIER,
            by(LOAD, (2, 3)),
            arrive((2, 3)),
            wait(0, one(40)),
            by(STORE, one(40)),
        ],
        64,
    ),
}

NAMED: dict[str, Case] = {
    "read without it": (
        "load: race: reads shared byte 0, which thread 1 wrote",
        [STORE, LOAD],
        [STORE, named(1, 64, EVERY), LOAD],
        64,
    ),
    "read past it": (
        "load: race: reads shared byte 0, which thread 1 wrote",
        [STORE, named(1, 64, (0, 63)), by(LOAD, one(70))],
        [STORE, named(1, 96, (0, 95)), by(LOAD, one(70))],
        96,
    ),
    "two of them": (
        "race: .* shared byte 0, which thread (1 wrote|40 read)",
        [STORE, named(1, 32, (0, 31)), named(2, 32, (32, 63)), LOAD],
        [STORE, named(1, 64, EVERY), LOAD],
        64,
    ),
    "number of the block's": (
        "warpgroup_barrier: barrier 0; needed: 1 to 15",
        [named(0, 64, EVERY)],
        [named(15, 64, EVERY)],
        64,
    ),
    "half a warp": (
        "warpgroup_barrier: 48 threads; needed: a multiple of 32",
        [named(1, 48, EVERY)],
        [named(1, 64, EVERY)],
        64,
    ),
    "more than there are": (
        "warpgroup_barrier: 96 threads; needed: a multiple of 32, up to the block's 64",
        [named(1, 96, EVERY)],
        [named(1, 64, EVERY)],
        64,
    ),
    "two numbers of threads": (
        "warpgroup_barrier: barrier 1: (64|96) threads, but others wait there for",
        [named(1, 64, (0, 31)), named(1, 96, (32, 95))],
        [named(1, 96, (0, 31)), named(1, 96, (32, 95))],
        96,
    ),
    "a lane elsewhere": (
        "diverged: 31 lanes of the warp wait at warpgroup_barrier",
        [named(1, 64, (0, 30)), BARRIER],
        [named(1, 32, (0, 31)), BARRIER],
        64,
    ),
    "too few come": (
        "every thread of the block waits for another; threads 0 to 31 at warpgroup_barrier 1",
        [named(1, 64, (0, 31))],
        [named(1, 32, (0, 31))],
        64,
    ),
}

SET_UP = [*init(), expect()]
READ = [wait(0), Step("load")]
TILE = [Step("store", stride=4, threads=GROUP)]  # the bytes that a box will take
READ_BY_3 = [*SET_UP, *init(EMPTY), box(), wait(0), Step("load", threads=one(3))]
BOX_BY_5 = [
    expect(thread=5, barrier=EMPTY),
    box(thread=5, barrier=EMPTY),
    wait(0, one(5), EMPTY),
]

BOXES: dict[str, Case] = {
    "no tensor map": (
        "prefetch_tensor_map: 0x.* is no tensor map",
        [Step("prefetch_nothing", threads=one(0))],
        [Step("prefetch_tensor_map", threads=one(0))],
        32,
    ),
    "another rank": (
        "copy_box_4d: the tensor map has 2 dimensions",
        [*SET_UP, Step("copy_box_4d", threads=one(0)), *READ],
        [*SET_UP, box(), *READ],
        32,
    ),
    "a target that is off the pattern": (
        "copy_box_2d: misaligned: shared byte 256 is no multiple of 512",
        [*SET_UP, box(256), *READ],
        [*SET_UP, box(0), *READ],
        32,
    ),
    "a target past the end": (
        "copy_box_2d: out of bounds: ",
        [*SET_UP, box(8192), wait(0)],
        [*SET_UP, box(8192 - 512), wait(0)],
        32,
    ),
    "an init without its fence": (
        "the barrier at shared byte 4096 was initialized by thread 0 without a barrier_init_fence",
        [init()[0], FENCE, BARRIER, expect(), box(), *READ],
        [*SET_UP, box(), *READ],
        32,
    ),
    "read before the wait": (
        "load: race: reads shared byte 0, which a box brings in phase 0 of its barrier",
        [*SET_UP, box(), Step("load", threads=one(0)), wait(0)],
        [*SET_UP, box(), wait(0), Step("load", threads=one(0))],
        32,
    ),
    "read by who has not waited": (
        "load: race: reads shared byte 0, which a box brings in phase 0 of its barrier",
        [*SET_UP, box(), wait(0, one(0)), Step("load", threads=one(1))],
        [*SET_UP, box(), wait(0, one(0)), BARRIER, Step("load", threads=one(1))],
        32,
    ),
    "write before the wait": (
        "store: race: writes shared byte 0, which a box brings in phase 0 of its barrier",
        [*SET_UP, box(), Step("store", threads=one(0)), wait(0)],
        [*SET_UP, box(), wait(0), Step("store", threads=one(0))],
        32,
    ),
    "a box into a box": (
        "copy_box_2d: race: writes shared byte 0, which a box brings in phase 0",
        [*init(), expect(1024), box(), box(), wait(0)],
        [*init(), expect(1024), box(), box(512), wait(0)],
        32,
    ),
    "a box into what is read": (
        "copy_box_2d: race: writes shared byte 0, which thread 3 read",
        [*READ_BY_3, FENCE, *BOX_BY_5],
        [*READ_BY_3, FENCE, BARRIER, *BOX_BY_5],
        32,
    ),
    "a box over what was written, without a fence": (
        "copy_box_2d: writes shared byte 0, which thread 0 wrote without an async_proxy_fence",
        [*init(), *TILE, BARRIER, expect(), box(), wait(0)],
        [*init(), *TILE, FENCE, BARRIER, expect(), box(), wait(0)],
        128,
    ),
    "a fence of another thread": (
        "copy_box_2d: writes shared byte 4, which thread 1 wrote without an async_proxy_fence",
        [*init(), *TILE, by(FENCE, one(0)), BARRIER, by(FENCE, one(0)), expect(), box(), wait(0)],
        [*init(), *TILE, FENCE, BARRIER, expect(), box(), wait(0)],
        128,
    ),
    "a fence before the write": (
        "copy_box_2d: writes shared byte 0, which thread 0 wrote without an async_proxy_fence",
        [*init(), FENCE, *TILE, BARRIER, expect(), box(), wait(0)],
        [*init(), *TILE, FENCE, BARRIER, expect(), box(), wait(0)],
        128,
    ),
    "a box over what was read, without a fence": (
        "copy_box_2d: writes shared byte 0, which thread 3 read without an async_proxy_fence",
        [*READ_BY_3, BARRIER, *BOX_BY_5],
        [*READ_BY_3, FENCE, BARRIER, *BOX_BY_5],
        32,
    ),
    "more bytes than expected": (
        "boxes bring 1024 bytes in phase 0 of the barrier at shared byte 4096, where 512",
        [*init(count=2), expect(), box(), box(512), arrive(one(1)), wait(0)],
        [*init(count=2), expect(1024), box(), box(512), arrive(one(1)), wait(0)],
        32,
    ),
    "fewer bytes than expected": (
        r"threads 0 to 31 at barrier_wait \(shared byte 4096, parity 0: its phase 0 lacks 0 "
        r"arrivals and 512 bytes\)",
        [*init(), expect(1024), box(), wait(0)],
        [*init(), expect(1024), box(), box(512), wait(0)],
        32,
    ),
    "bytes without end": (
        "barrier_arrive_expect: 1048576 bytes; needed: 0 to 1048575 in a phase",
        [*init(), expect(1 << 20), wait(0)],
        [*init(), expect(0), wait(0)],
        32,
    ),
    "nobody waits": (
        "nobody has waited for the boxes of phase 0 of the barrier at shared byte 4096",
        [*SET_UP, box()],
        [*SET_UP, box(), wait(0)],
        32,
    ),
    "a matrix of a box": (
        "load_matrix_x4: race: reads shared byte 0, which a box brings",
        [*SET_UP, box(), wait(0, (0, 30)), Step("load_matrix_x4", stride=16)],
        [*SET_UP, box(), wait(0), Step("load_matrix_x4", stride=16)],
        32,
    ),
}
