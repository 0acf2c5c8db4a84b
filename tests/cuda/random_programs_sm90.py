"""Random programs of barriers, boxes and accesses, and whether one has a race.

That is told from a list of all pairs of accesses.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from emulator_programs_sm90 import BARRIER, Step, arrive, box, by, expect, named, one, wait

FENCE = Step("async_proxy_fence")
THREADS = (1, 17, 40, 70, 100)  # two of a warp, and one of each other
WARPS = ((0, 63), (32, 127), (64, 127))  # that meet at a named barrier
TILE_WORDS, OTHER_WORDS = (0, 4, 508), (2048, 2052)  # a box brings the first
WORDS = TILE_WORDS + OTHER_WORDS
BARRIERS = tuple(4096 + 8 * i for i in range(6))


def set_up() -> list[Step]:
    """Every word written and every barrier made, by one thread."""
    writes = [Step("store", word, threads=one(0)) for word in WORDS]
    inits = [Step("barrier_init", barrier=b, number=1, threads=one(0)) for b in BARRIERS]
    return [*writes, by(FENCE, one(0)), *inits, Step("barrier_init_fence", threads=one(0)), BARRIER]


def random_steps(rng: np.random.Generator, length: int) -> list[Step]:
    """Steps that end in any order: who waits for a barrier does so after its arrival was listed."""
    steps: list[Step] = []
    unused, complete = list(BARRIERS), []
    for _ in range(length):
        thread = int(rng.choice(THREADS))
        kind = rng.choice(["load", "store", "wait", "arrive", "box", "fence", "named", "block"],
                          p=[0.22, 0.16, 0.2, 0.14, 0.07, 0.13, 0.06, 0.02])  # fmt: skip
        if kind in ("load", "store"):
            steps.append(Step(str(kind), int(rng.choice(WORDS)), threads=one(thread)))
        elif kind == "wait" and complete:
            steps.append(wait(0, one(thread), int(rng.choice(complete))))
        elif kind in ("arrive", "box") and unused:
            complete.append(unused.pop())
            if kind == "arrive":
                steps.append(arrive(one(thread), complete[-1]))
            else:
                steps += [expect(512, thread, complete[-1]), box(0, thread, complete[-1])]
        elif kind == "fence":
            steps.append(by(FENCE, one(thread)))
        elif kind == "named":
            number = int(rng.integers(len(WARPS)))
            first, last = WARPS[number]
            steps.append(named(1 + number, last + 1 - first, (first, last)))
        elif kind == "block":
            steps.append(BARRIER)
    waits = [wait(0, one(0), s.barrier) for s in steps if s.instruction == "copy_box_2d"]
    return [*steps, *waits]


@dataclass
class _Access:
    first: int  # node from which on it may happen
    last: int  # node by which it has
    thread: int
    is_write: bool
    is_box: bool
    words: tuple[int, ...]


@dataclass
class _Graph:
    """Nodes in an order that the program may run in; an edge leads to what must come later."""

    edges: list[tuple[int, int]] = field(default_factory=list)
    size: int = 0
    newest: dict[int, int] = field(default_factory=dict)  # node of every thread
    arrivals: dict[int, list[int]] = field(default_factory=dict)  # by barrier
    accesses: list[_Access] = field(default_factory=list)
    fences: list[tuple[int, int]] = field(default_factory=list)  # node and thread

    def node(self, *before: int) -> int:
        self.edges += [(earlier, self.size) for earlier in before]
        self.size += 1
        return self.size - 1

    def step(self, thread: int, *before: int) -> int:
        own = [self.newest[thread]] if thread in self.newest else []
        self.newest[thread] = self.node(*own, *before)
        return self.newest[thread]

    def reach(self) -> np.ndarray:
        """[earlier, later]: whether a path leads from the one to the other, or they are one."""
        known = np.eye(self.size, dtype=bool)
        for earlier, later in sorted(self.edges, key=lambda edge: edge[1]):
            known[:, later] |= known[:, earlier]
        return known


def _add(graph: _Graph, step: Step) -> None:
    first, last = step.threads
    threads = [t for t in (0, *THREADS) if first <= t <= last]
    if step.instruction in ("block_barrier", "warpgroup_barrier"):
        meeting = graph.node(*(graph.step(t) for t in threads))
        for thread in threads:
            graph.step(thread, meeting)
        return
    (thread,) = threads
    if step.instruction == "barrier_wait":
        graph.step(thread, *graph.arrivals[step.barrier])
        return
    node = graph.step(thread)
    if step.instruction in ("barrier_arrive", "barrier_arrive_expect"):
        graph.arrivals.setdefault(step.barrier, []).append(node)
    elif step.instruction == "async_proxy_fence":
        graph.fences.append((node, thread))
    elif step.instruction == "copy_box_2d":
        landed = graph.node(node)
        graph.arrivals[step.barrier].append(landed)
        graph.accesses.append(_Access(node, landed, thread, True, True, TILE_WORDS))
    elif step.instruction in ("load", "store"):
        is_write = step.instruction == "store"
        graph.accesses.append(_Access(node, node, thread, is_write, False, (step.offset,)))


def has_offence(steps: list[Step]) -> bool:
    """Two accesses of a word that nothing orders, or a box after one without a fence between.

    The fence is asked of who last wrote a word, and of those who have read it since.
    """
    graph = _Graph()
    for step in steps:
        _add(graph, step)
    known = graph.reach()

    def is_before(a: _Access, b: _Access) -> bool:
        return a is not b and bool(known[a.last, b.first])

    def is_fenced(a: _Access, b: _Access) -> bool:
        return any(
            t == a.thread and known[a.last, f] and known[f, b.first] for f, t in graph.fences
        )

    for word in WORDS:
        touching = [access for access in graph.accesses if word in access.words]
        for i, a in enumerate(touching):
            for b in touching[i + 1 :]:
                if not (a.is_write or b.is_write):
                    continue
                if not is_before(a, b) and not is_before(b, a):
                    return True
                early, late = (a, b) if is_before(a, b) else (b, a)
                is_last = not any(
                    c.is_write and is_before(early, c) and is_before(c, late) for c in touching
                )
                if late.is_box and not early.is_box and is_last and not is_fenced(early, late):
                    return True
    return False
