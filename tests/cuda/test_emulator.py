"""What the emulator refuses, each offence beside the nearest program that is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import numpy as np
import pytest
from emulator_global_programs import ADDRESSES, ARRIVE, GLOBAL
from emulator_programs import (
    BARRIER,
    COMMIT,
    COPIES,
    DIVERGENCE,
    SHARED,
    WAIT,
    Step,
    one,
)

PROGRAMS = {
    f"{group}: {name}": case
    for group, cases in (
        ("shared", SHARED),
        ("copies", COPIES),
        ("divergence", DIVERGENCE),
        ("addresses", ADDRESSES),
        ("global", GLOBAL),
    )
    for name, case in cases.items()
}
Run = Callable[..., np.ndarray]


@pytest.fixture(scope="module")
def run(instructions: ModuleType) -> Run:
    """Runs a program; returns what every thread loaded last, [blocks, threads], -1 for nothing."""

    def run(
        steps: Sequence[Step],
        blocks: int = 1,
        shared: int = 1024,
        threads: int = 64,
        is_backward: bool = False,
    ) -> np.ndarray:
        program = [
            instructions.Step(
                *(s.instruction, s.space, s.offset, s.stride),
                *(*s.source, s.threads, s.blocks, s.when),
            )
            for s in steps
        ]
        loaded = instructions.run_program(program, blocks, threads, shared, is_backward)
        return np.array(loaded).reshape(blocks, threads)

    return run


@pytest.mark.parametrize("name", PROGRAMS)
def test_offences_are_refused(run: Run, name: str) -> None:
    message, wrong, right = PROGRAMS[name]
    blocks = 2 if name.startswith("global") else 1
    with pytest.raises(RuntimeError, match=message):
        run(wrong, blocks=blocks)
    with pytest.raises(RuntimeError, match="block"):
        run(wrong, blocks=blocks, is_backward=True)
    run(right, blocks=blocks)
    run(right, blocks=blocks, is_backward=True)


def test_it_runs_on_after_an_offence(run: Run) -> None:
    for _ in range(3):
        with pytest.raises(RuntimeError, match="diverged"):
            run([Step("multiply_s8_16x8x32", threads=(0, 30))], threads=1024)
        loaded = run([Step("load", "weights", stride=4, threads=(0, 63))], threads=1024)
        assert np.array_equal(loaded[0, :2], [0x03020100, 0x07060504])


# --- what the right programs compute --------------------------------------------------------------


def _words(offset: int, count: int) -> np.ndarray:
    """The 32-bit words of the weights, which are the bytes 0, 1, 2, ..."""
    return np.arange(offset, offset + 4 * count, dtype=np.uint8).view(np.int32)


def _copy(target: int, source: int, suffix: str = "") -> Step:
    return Step(f"copy_async_16{suffix}", offset=target, threads=one(0), source=("weights", source))


def test_copies_land_and_fill_with_zeros(run: Run) -> None:
    copies = [_copy(0, 32), _copy(16, 4096, "_invalid")]
    loaded = run([*copies, COMMIT, WAIT, BARRIER, Step("load", stride=4, threads=(0, 7))])
    assert np.array_equal(loaded[0, :8], [*_words(32, 4), 0, 0, 0, 0])


def test_waiting_lands_the_oldest_groups(run: Run) -> None:
    """Of three groups, the last of them without copies, one may be pending after the wait."""
    steps = [_copy(0, 0), COMMIT, _copy(16, 16), _copy(32, 48), COMMIT, COMMIT]
    wait = Step("copy_async_wait<1>")
    for offset, source in ((0, 0), (16, 16), (32, 48)):
        loaded = run([*steps, wait, Step("load", offset=offset, threads=one(0))])
        assert loaded[0, 0] == _words(source, 1)[0]


def test_shared_memory_is_poisoned_again_for_every_block(run: Run) -> None:
    steps = [Step("store", threads=one(0), blocks=(0, 0)), Step("load", threads=one(0))]
    with pytest.raises(RuntimeError, match=r"block \(1, 0, 0\).*which nothing has written"):
        run(steps, blocks=2)


@pytest.mark.parametrize("is_backward", [False, True])
def test_arrivals_are_counted(run: Run, is_backward: bool) -> None:
    loaded = run(ARRIVE, blocks=5, is_backward=is_backward)
    order = np.arange(5)[:: -1 if is_backward else 1]
    assert np.array_equal(loaded, np.tile(order[:, None], 64))


def test_what_one_block_learns_of_another_it_passes_on(run: Run) -> None:
    """Block 0 to 1 by one counter, 1 to 2 by another; without the first, 2 knows nothing of 0."""

    def count(offset: int, block: int) -> list[Step]:
        blocks = (block, block)
        return [
            Step("block_barrier", blocks=blocks),
            Step("count_arrival", "buffer", offset, threads=one(0), blocks=blocks),
            Step("block_barrier", blocks=blocks),
        ]

    store = Step("store", "workspace", threads=one(5), blocks=(0, 0))
    read = Step("load", "workspace", threads=one(9), blocks=(2, 2))
    chain = [store, *count(128, 0), *count(128, 1), *count(132, 1), *count(132, 2), read]
    assert run(chain, blocks=3)[2, 9] == 5
    broken = [store, *count(128, 0), *count(132, 1), *count(128, 1), *count(132, 2), read]
    with pytest.raises(RuntimeError, match="which block number 0 wrote, and no counter"):
        run(broken, blocks=3)


# --- races of random programs ---------------------------------------------------------------------


def _has_race(steps: Sequence[Step]) -> bool:
    """Two threads, one word, one of them writing, no barrier between: each pair looked at."""
    accesses = []
    epoch = 0
    for step in steps:
        epoch += step.instruction == "block_barrier"
        if step.instruction != "block_barrier":
            accesses.append((epoch, step.offset, step.threads, step.instruction == "store"))
    return any(
        a[:2] == b[:2] and a[2] != b[2] and (a[3] or b[3]) for a in accesses for b in accesses
    )


@pytest.mark.parametrize("space", ["shared", "buffer"])
def test_races_are_found_in_any_order(run: Run, space: str) -> None:
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(300):
        # every word is written, then 6 random accesses of 6 words by 3 threads, 2 barriers among
        kinds = rng.permutation(["load"] * 4 + ["store"] * 2 + ["block_barrier"] * 2)
        steps = [Step("store", space, stride=4, threads=(0, 5)), BARRIER]
        for kind in kinds:
            thread, word = (int(rng.choice(n)) for n in ([1, 17, 40], 6))
            access = Step(str(kind), space, offset=4 * word, threads=one(thread))
            steps.append(BARRIER if kind == "block_barrier" else access)
        has_race = _has_race(steps[2:])
        seen.add(has_race)
        for is_backward in (False, True):
            if has_race:
                with pytest.raises(RuntimeError, match="race"):
                    run(steps, is_backward=is_backward)
            else:
                run(steps, is_backward=is_backward)
    assert seen == {False, True}


# --- other processors -----------------------------------------------------------------------------


def test_fibers_that_every_processor_has(build_emulated: Callable[..., ModuleType]) -> None:
    """The switch by hand is for x86-64; the other one runs here too, errors thrown inside of it."""
    module = build_emulated("instruction_tests", flags=["-DPTQ4ADM_PORTABLE_FIBERS"])
    ones = np.full((32, 4), 0x01010101, dtype=np.uint32)
    acc = np.arange(128, dtype=np.int32).reshape(32, 4)
    for _ in range(3):
        assert np.array_equal(module.multiply_s8_16x8x32(acc, ones, ones[:, :2]), acc + 32)
        with pytest.raises(RuntimeError, match="lane 31: load_matrix_x4: out of bounds"):
            module.load_matrix_x4(np.zeros(512, np.uint8), np.full(32, 512, np.int32))


# --- launches that cannot be ----------------------------------------------------------------------


@pytest.mark.parametrize("threads", [0, 31, 33, 1056])
def test_blocks_are_whole_warps(run: Run, threads: int) -> None:
    with pytest.raises(RuntimeError, match=f"{threads} threads; needed: a multiple of 32, up to"):
        run([], threads=threads)


def test_a_grid_has_blocks(instructions: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="a grid of 1 x 0 x 1 blocks"):
        instructions.identity(1, 0, 1, 32, False)


def test_instructions_need_a_launch(instructions: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="outside run_grid"):
        instructions.thread_index()
