"""Programs of a few instructions of sm_90a: boxes that TMA copies."""

from __future__ import annotations

from emulator_programs_sm90 import (
    BARRIER,
    EMPTY,
    FENCE,
    GROUP,
    Case,
    Step,
    arrive,
    box,
    by,
    expect,
    init,
    one,
    wait,
)

SET_UP = [*init(), expect()]
READ = [wait(0), Step("load")]
TILE = [Step("store", stride=4, threads=GROUP)]  # the bytes that a box will take
READ_BY_3 = [*SET_UP, *init(EMPTY), box(), wait(0), Step("load", threads=one(3))]
READ_BY_4 = [Step("load", threads=one(4))]
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
    "a fence of the later of two readers": (
        "copy_box_2d: writes shared byte 0, which thread 3 read without an async_proxy_fence",
        [*READ_BY_3, BARRIER, *READ_BY_4, by(FENCE, one(4)), BARRIER, *BOX_BY_5],
        [*READ_BY_3, BARRIER, *READ_BY_4, by(FENCE, (3, 4)), BARRIER, *BOX_BY_5],
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
