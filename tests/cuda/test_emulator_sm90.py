"""What the emulator refuses of sm_90a, each offence beside the nearest program that is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import numpy as np
import pytest
from emulator_programs_barriers import BARRIERS, NAMED
from emulator_programs_boxes import BOXES
from emulator_programs_sm90 import (
    BARRIER,
    Step,
    arrive,
    box,
    expect,
    init,
    one,
    wait,
)
from emulator_programs_wgmma import COMMIT, FILL, PRODUCTS, REGISTERS, START, WAIT, WAIT_1, product
from random_programs_sm90 import has_offence, random_steps, set_up

PROGRAMS = {
    f"{group}: {name}": case
    for group, cases in (
        ("barriers", BARRIERS),
        ("named", NAMED),
        ("boxes", BOXES),
        ("products", PRODUCTS),
        ("registers", REGISTERS),
    )
    for name, case in cases.items()
}
SHARED_BYTES = 8192
Run = Callable[..., np.ndarray]


@pytest.fixture(scope="module")
def run(instructions_sm90: ModuleType) -> Run:
    """Runs a program; returns what every thread loaded last, [blocks, threads], -1 for nothing."""
    module = instructions_sm90

    def run(
        steps: Sequence[Step],
        threads: int = 128,
        blocks: int = 1,
        is_tensor_written: bool = False,
        is_backward: bool = False,
    ) -> np.ndarray:
        program = [
            module.Step(s.instruction, s.offset, s.stride, s.barrier, s.number, s.second, s.threads)
            for s in steps
        ]
        loaded = module.run_program(
            program, blocks, threads, SHARED_BYTES, is_tensor_written, is_backward
        )
        return np.array(loaded).reshape(blocks, threads)

    return run


@pytest.mark.parametrize("name", PROGRAMS)
def test_offences_are_refused(run: Run, name: str) -> None:
    message, wrong, right, threads = PROGRAMS[name]
    with pytest.raises(RuntimeError, match=message):
        run(wrong, threads)
    with pytest.raises(RuntimeError, match="block"):
        run(wrong, threads, is_backward=True)
    run(right, threads)
    run(right, threads, is_backward=True)


@pytest.mark.parametrize("is_backward", [False, True])
def test_a_tensor_of_boxes_is_not_written(run: Run, is_backward: bool) -> None:
    right = [*init(), expect(), box(), wait(0)]
    store = Step("store_tensor", number=0, threads=one(0))
    for wrong in ([*right, store], [store, *right]):
        with pytest.raises(RuntimeError, match="constant"):
            run(wrong, is_tensor_written=True, is_backward=is_backward)
    run(right, is_tensor_written=True, is_backward=is_backward)


# --- what the right programs compute --------------------------------------------------------------


@pytest.mark.parametrize("is_backward", [False, True])
def test_results_come_with_their_group(run: Run, is_backward: bool) -> None:
    """Of two groups the first is there after the wait that leaves one, the second is poison."""
    poison = np.int32(0xA5A5A5A5 - 2**32)
    first = [START, product(0), COMMIT]
    second = [START, product(1), product(1), COMMIT]
    for steps, acc, wanted in (
        (first, 0, poison),
        ([*first, WAIT], 0, 0),
        ([*first, *second, WAIT_1], 0, 0),
        ([*first, *second, WAIT_1], 1, poison),
        ([*first, *second, WAIT], 1, 0),
    ):
        read = Step("read_acc", number=acc)
        loaded = run([*FILL, *steps, read, WAIT], is_backward=is_backward)
        assert (loaded == wanted).all()


@pytest.mark.parametrize("is_backward", [False, True])
def test_products_of_a_batch_add_up(run: Run, is_backward: bool) -> None:
    """A of ones, and B that holds the words 1, 2, 3, 4 over and over: 32 k add up to 20 and 40."""
    fill_a = [Step("write_a", number=0, second=r) for r in range(4)]
    for times in (1, 2, 3):
        steps = [*FILL, *fill_a, START, *[product()] * times, COMMIT, WAIT, Step("read_acc")]
        assert (run(steps, is_backward=is_backward) == 20 * times).all()


@pytest.mark.parametrize("is_backward", [False, True])
def test_a_ring_of_boxes(run: Run, is_backward: bool) -> None:
    """A producer, four warps that consume, two stages: barriers for full and empty ones."""
    full, empty = (4096, 4104), (4112, 4120)
    steps = [Step("barrier_init", barrier=b, number=1, threads=one(128)) for b in full]
    steps += [Step("barrier_init", barrier=b, number=4, threads=one(128)) for b in empty]
    steps += [Step("barrier_init_fence", threads=one(128)), BARRIER]
    consumers = (0, 127)
    for turn in range(7):
        stage, parity = turn % 2, turn // 2 % 2
        steps += [wait(1 - parity, one(128), empty[stage]), expect(2048, 128, full[stage])]
        steps += [
            Step(
                "copy_box_2d", 2048 * stage + 512 * i, 0, full[stage], 64 * (i % 2), turn, one(128)
            )
            for i in range(4)
        ]
        steps += [wait(parity, consumers, full[stage])]
        steps += [
            Step(s.instruction, 2048 * stage, threads=consumers)
            for s in (START, product(), COMMIT, WAIT)
        ]
        steps += [arrive(one(lane), empty[stage]) for lane in (0, 32, 64, 96)]
    assert run(steps, 160, is_backward=is_backward).shape == (1, 160)
    missing = [s for s in steps if s != arrive(one(32), empty[0])]
    with pytest.raises(RuntimeError, match="lacks 1 arrivals"):
        run(missing, 160, is_backward=is_backward)
    early = [s for s in steps if s != wait(0, one(128), empty[0])]
    with pytest.raises(
        RuntimeError, match=r"which a (wgmma reads?|box brings)|an arrival too many"
    ):
        run(early, 160, is_backward=is_backward)


def test_named_barriers_order_what_a_block_leaves_behind(run: Run) -> None:
    """Warps write global memory, meet, and one thread counts: the last block reads all."""
    named = Step("warpgroup_barrier", number=1, second=64, threads=(0, 63))
    count = Step("count_arrival", 128, threads=one(0))
    for is_backward in (False, True):
        right = [Step("store_global", stride=4, threads=(0, 15)), named, count]
        with pytest.raises(RuntimeError, match="race"):  # two blocks write the same words
            run(right, 96, blocks=2, is_backward=is_backward)
        run(right, 96, blocks=1, is_backward=is_backward)
        local = [Step("store_global", threads=one(1)), named]
        run([*local, Step("load_global", threads=one(40))], 96, is_backward=is_backward)
        with pytest.raises(
            RuntimeError, match=r"race: (reads|writes) byte 0 of words, which thread"
        ):
            run([*local, Step("load_global", threads=one(70))], 96, is_backward=is_backward)


# --- races of random programs ---------------------------------------------------------------------


def test_races_are_found_in_any_order(run: Run) -> None:
    rng = np.random.default_rng(0)
    seen = {False: 0, True: 0}
    for _ in range(1500):
        steps = [*set_up(), *random_steps(rng, int(rng.integers(6, 22)))]
        is_wrong = has_offence(steps)
        seen[is_wrong] += 1
        for is_backward in (False, True):
            if is_wrong:
                with pytest.raises(RuntimeError, match=r"race|without an async_proxy_fence"):
                    run(steps, is_backward=is_backward)
            else:
                run(steps, is_backward=is_backward)
    assert min(seen.values()) > 300, seen
