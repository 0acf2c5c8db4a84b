"""Programs of a few instructions of sm_90a: products of a warpgroup that may go wrong."""

from __future__ import annotations

from emulator_programs_sm90 import (
    BARRIER,
    BOX_BYTES,
    EVERY,
    FENCE,
    GROUP,
    Case,
    Step,
    arrive,
    box,
    by,
    expect,
    init,
    named,
    one,
    wait,
)

WRITE = Step("store_16", stride=16, threads=GROUP)  # the 2048 bytes of a tile
FILL = [WRITE, FENCE, BARRIER]
START, COMMIT = Step("wgmma_fence"), Step("wgmma_commit")
WAIT, WAIT_1 = Step("wgmma_wait<0>"), Step("wgmma_wait<1>")


def product(acc: int = 0, a: int = 0, offset: int = 0) -> Step:
    return Step("wgmma", offset, number=acc, second=a)


def write_a(a: int = 0) -> Step:
    return Step("write_a", number=a)


def write_acc(acc: int = 0) -> Step:
    return Step("write_acc", number=acc)


BATCH = [START, product(), COMMIT, WAIT]
WIDE = Step("store_16", 2048, stride=16, threads=GROUP)  # what 64 columns need besides
RELEASE = [arrive(one(lane)) for lane in (0, 32, 64, 96)]  # one lane of each warp
BY_GROUP = [by(step, GROUP) for step in BATCH]
DELAY = [named(1, 128, (128, 255))] * 12  # so long that the other warpgroup goes ahead
FOUR_BOXES = [expect(4 * BOX_BYTES), *(box(BOX_BYTES * i) for i in range(4))]

PRODUCTS: dict[str, Case] = {
    "a warp elsewhere": (
        "warp 3, lane 0: block_barrier: .*|every thread of the block waits for another; threads 0 "
        "to 95 at wgmma_s8_64xNx32; threads 96 to 127 at block_barrier",
        [*FILL, START, by(product(), (0, 95)), BARRIER, COMMIT, WAIT],
        [*FILL, *BATCH, BARRIER],
        128,
    ),
    "a lane elsewhere": (
        "diverged: 5 lanes of the warp wait at wgmma_fence",
        [*FILL, by(START, (0, 4)), by(BARRIER, one(5)), *BATCH],
        [*FILL, *BATCH],
        128,
    ),
    "two instructions": (
        "wgmma_commit: diverged: warp 0 waits at wgmma_fence",
        [by(START, (0, 31)), by(COMMIT, (32, 127))],
        [START, COMMIT],
        128,
    ),
    "a warp that left": (
        "wgmma_fence: diverged: lanes of warp 3 have exited|threads 0 to 95 at wgmma_fence",
        [Step("exit", threads=(96, 127)), START],
        [START, Step("exit", threads=(96, 127))],
        128,
    ),
    "no whole warpgroup": (
        "wgmma_fence: threads 128 to 159 are no whole warpgroup",
        [START],
        [by(START, GROUP)],
        160,
    ),
    "no fence": (
        "wgmma_s8_64xNx32: no wgmma_fence since the last wgmma_commit, or at all",
        [*FILL, product(), COMMIT, WAIT],
        [*FILL, *BATCH],
        128,
    ),
    "a fence for another batch": (
        "wgmma_s8_64xNx32: no wgmma_fence since the last wgmma_commit, or at all",
        [*FILL, *BATCH, product(), COMMIT, WAIT],
        [*FILL, *BATCH, *BATCH],
        128,
    ),
    "a written after the fence": (
        "a of thread 0 of the warpgroup was written since wgmma_fence",
        [*FILL, *BATCH, START, write_a(), product(), COMMIT, WAIT],
        [*FILL, *BATCH, write_a(), START, product(), COMMIT, WAIT],
        128,
    ),
    "acc written after the fence": (
        "acc of thread 0 of the warpgroup was written since wgmma_fence",
        [*FILL, *BATCH, START, write_acc(), product(), COMMIT, WAIT],
        [*FILL, *BATCH, write_acc(), START, product(), COMMIT, WAIT],
        128,
    ),
    "a written on its way": (
        "wgmma_wait: a of thread 7 of the warpgroup has changed while its wgmma was on its way",
        [*FILL, START, product(), COMMIT, by(write_a(), one(7)), WAIT],
        [*FILL, START, product(), COMMIT, by(write_a(1), one(7)), WAIT],
        128,
    ),
    "a written while its group may be pending": (
        "wgmma_wait: a of thread 0 of the warpgroup has changed",
        [
            *FILL,
            *(START, product(0, 0), COMMIT, START, product(0, 1), COMMIT, WAIT_1),
            *(write_a(1), WAIT),
        ],
        [
            *FILL,
            *(START, product(0, 0), COMMIT, START, product(0, 1), COMMIT, WAIT_1),
            *(write_a(0), WAIT),
        ],
        128,
    ),
    "acc written on its way": (
        "wgmma_wait: acc of thread 0 of the warpgroup was written while its wgmma was on its way",
        [*FILL, START, product(0), COMMIT, write_acc(0), WAIT],
        [*FILL, START, product(0), COMMIT, write_acc(1), WAIT],
        128,
    ),
    "acc written between two products": (
        "wgmma_s8_64xNx32: acc of thread 0 of the warpgroup was written while its wgmma was on",
        [*FILL, START, product(0), write_acc(0), product(0), COMMIT, WAIT],
        [*FILL, START, product(0), write_acc(1), product(0), COMMIT, WAIT],
        128,
    ),
    "acc of another size": (
        "acc overlaps accumulators of another size, whose products are on their way",
        [*FILL, WIDE, FENCE, BARRIER, START, Step("wgmma_wide"), Step("wgmma_part"), COMMIT, WAIT],
        [
            *(*FILL, WIDE, FENCE, BARRIER, START, Step("wgmma_wide"), COMMIT, WAIT),
            *(START, Step("wgmma_part"), COMMIT, WAIT),
        ],
        128,
    ),
    "no wait": (
        "exit: has not waited for 1 of its wgmma",
        [*FILL, START, product(), COMMIT],
        [*FILL, START, product(), COMMIT, WAIT],
        128,
    ),
    "no commit": (
        "exit: has not waited for 1 of its wgmma",
        [*FILL, START, product(), WAIT],
        [*FILL, START, product(), COMMIT, WAIT],
        128,
    ),
    "unwritten bytes": (
        "wgmma_s8_64xNx32: reads shared byte 2048, which nothing has written",
        [*FILL, START, product(offset=512), COMMIT, WAIT],
        [*FILL, START, product(offset=0), COMMIT, WAIT],
        128,
    ),
    "bytes past the end": (
        "wgmma_s8_64xNx32: .*shared byte",
        [*FILL, START, product(offset=8192 - 512), COMMIT, WAIT],
        [*FILL, START, product(), COMMIT, WAIT],
        128,
    ),
    "B without a fence of the proxy": (
        "wgmma_s8_64xNx32: reads shared byte 0, which thread 0 wrote without an async_proxy_fence",
        [WRITE, BARRIER, *BATCH],
        [WRITE, FENCE, BARRIER, *BATCH],
        128,
    ),
    "B with a reader's fence": (
        "wgmma_s8_64xNx32: reads shared byte 0, which thread 0 wrote without an async_proxy_fence",
        [WRITE, BARRIER, FENCE, *BATCH],
        [WRITE, FENCE, BARRIER, *BATCH],
        128,
    ),
    "B without a barrier": (
        "wgmma_s8_64xNx32: race: reads shared byte 0, which thread 0 wrote",
        [WRITE, FENCE, *BATCH],
        [WRITE, FENCE, BARRIER, *BATCH],
        128,
    ),
    "B written on its way": (
        "store: race: writes shared byte 0, which a wgmma reads that its warpgroup has not waited",
        [*FILL, START, product(), COMMIT, Step("store", threads=one(0)), WAIT],
        [*FILL, START, product(), COMMIT, WAIT, BARRIER, Step("store", threads=one(0))],
        128,
    ),
    "B released before the wait": (
        "store: race: writes shared byte 0, which a wgmma reads?",
        [
            *(*init(count=4), *FILL, by(START, GROUP), by(product(), GROUP), by(COMMIT, GROUP)),
            *(*RELEASE, by(WAIT, GROUP), wait(0, one(140)), Step("store", threads=one(140))),
        ],
        [
            *(*init(count=4), *FILL, by(START, GROUP), by(product(), GROUP), by(COMMIT, GROUP)),
            *(by(WAIT, GROUP), *RELEASE, wait(0, one(140)), Step("store", threads=one(140))),
        ],
        256,
    ),
    "B released by one warp of four": (
        "store: race: writes shared byte 0, which a wgmma read, and nothing orders the two",
        [*init(), *FILL, *BATCH, arrive(one(0)), wait(0, one(64)), Step("store", threads=one(64))],
        [
            *(*init(count=4), *FILL, *BATCH, *RELEASE),
            *(wait(0, one(64)), Step("store", threads=one(64))),
        ],
        128,
    ),
    "B released by the wait for an earlier product": (
        "store: race: writes shared byte 0, which a wgmma read, and nothing orders the two",
        [
            *(*init(count=4), *FILL, *BY_GROUP, *RELEASE, *BY_GROUP),
            *(wait(0, one(140)), *DELAY, Step("store", threads=one(140))),
        ],
        [
            *(*init(count=4), *FILL, *BY_GROUP, *BY_GROUP, *RELEASE),
            *(wait(0, one(140)), *DELAY, Step("store", threads=one(140))),
        ],
        256,
    ),
    "a box that a warp did not wait for": (
        "wgmma_s8_64xNx32: race: reads shared byte 0, which a box brings in phase 0",
        [*init(), *FOUR_BOXES, wait(0, (0, 95)), *BATCH, wait(0, (96, 127))],
        [*init(), *FOUR_BOXES, wait(0), *BATCH],
        128,
    ),
    "a box into B on its way": (
        "copy_box_2d: race: writes shared byte 512, which a wgmma reads that its warpgroup",
        [*init(), *FILL, START, product(), COMMIT, expect(), box(512), WAIT, wait(0)],
        [*init(), *FILL, START, product(), COMMIT, WAIT, BARRIER, expect(), box(512), wait(0)],
        128,
    ),
    "the swizzle of a descriptor": (
        "descriptor: swizzle mode 3; emulated: 2, 64 bytes",
        [*FILL, START, Step("wgmma_bits", number=62), COMMIT, WAIT],
        [*FILL, *BATCH],
        128,
    ),
    "the base offset of a descriptor": (
        "descriptor: a base offset; emulated: 0",
        [*FILL, START, Step("wgmma_bits", number=49), COMMIT, WAIT],
        [*FILL, START, Step("wgmma_bits", number=16), COMMIT, WAIT],
        128,
    ),
    "the gaps of a descriptor": (
        "descriptor: bits that belong to no field are set",
        [*FILL, START, Step("wgmma_bits", number=52), COMMIT, WAIT],
        [*FILL, START, Step("wgmma_bits", number=29), COMMIT, WAIT],
        128,
    ),
    "the start of a descriptor": (
        "descriptor: start at shared byte 64; needed: a multiple of 512",
        [*FILL, START, Step("wgmma", 64), COMMIT, WAIT],
        [*FILL, START, Step("wgmma", 32), COMMIT, WAIT],
        128,
    ),
    "the stride of a descriptor": (
        "descriptor: a stride of 528 bytes; needed: a multiple of 512",
        [*FILL, START, Step("wgmma_bits", number=32), COMMIT, WAIT],
        [*FILL, *BATCH],
        128,
    ),
    "two descriptors": (
        "lanes of the warpgroup give different descriptors",
        [*FILL, START, Step("wgmma", 0, 32, threads=(0, 1)), by(product(), (2, 127)), COMMIT, WAIT],
        [*FILL, *BATCH],
        128,
    ),
}


def decrease(count: int, threads: tuple[int, int] = EVERY) -> Step:
    return Step(f"registers_decrease<{count}>", threads=threads)


def increase(count: int, threads: tuple[int, int] = EVERY) -> Step:
    return Step(f"registers_increase<{count}>", threads=threads)


REGISTERS: dict[str, Case] = {
    "by a part of a warpgroup": (
        "diverged|every thread of the block waits for another; threads 0 to 31 at registers_d",
        [decrease(40, (0, 31)), BARRIER],
        [decrease(40, GROUP), BARRIER],
        128,
    ),
    "more by a decrease": (
        "registers_decrease: 96 registers, of 40",
        [decrease(40), named(1, 128, GROUP), decrease(96)],
        [decrease(96), named(1, 128, GROUP), decrease(40)],
        128,
    ),
    "fewer by an increase": (
        "registers_increase: 80 registers, of 96",
        [decrease(96), named(1, 128, GROUP), increase(80)],
        [decrease(40), named(1, 128, GROUP), increase(80)],
        128,
    ),
    "more than there are": (
        "the block's warpgroups have 67584 registers; a multiprocessor has 65536",
        [decrease(40, GROUP), increase(232, (128, 383)), BARRIER, increase(256, (128, 383))],
        [decrease(40, GROUP), increase(232, (128, 383)), BARRIER],
        384,
    ),
}
