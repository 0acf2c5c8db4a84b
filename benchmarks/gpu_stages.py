"""Stages of `run_gpu.py`: commands under a time limit whose failures do not stop the others.

Standard library only: the package may not be installed yet.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

OK, NOTED, FAILED, TIMEOUT, SKIPPED = "ok", "NOTED", "FAILED", "TIMEOUT", "skipped"
DEADLINE = "{deadline}"  # in a command: the seconds after which it should end by itself
# a command that looks at its clock now and then needs time to finish what it is at
_MARGIN = 0.9
_LEAST_SECONDS = 5.0
_FAILURE_LINES = 15


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: for the table and the log's name.
        command: with `DEADLINE` where seconds are to stand.
        skip: why it is not run; empty to run it.
        share: of its stage's time.
        environment: added to the process's.
        excerpt: takes what of its output the summary shows.
        noted: exit codes that are reported and do not fail the run, with what they mean.
        ready: waits at most the given seconds for what the command needs; returns why it is not
            there, and the command is skipped, or nothing. None: nothing is waited for.
    """

    name: str
    command: Sequence[str] = ()
    skip: str = ""
    share: float = 1.0
    environment: Mapping[str, str] = field(default_factory=dict)
    excerpt: Callable[[list[str]], list[str]] = lambda lines: lines[-1:]
    noted: Mapping[int, str] = field(default_factory=dict)
    ready: Callable[[float], str] | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a step.

    Attributes:
        stage: its stage.
        name: its name.
        status: one of `OK`, `NOTED`, `FAILED`, `TIMEOUT`, `SKIPPED`.
        seconds: that it took.
        note: reason, or nothing.
        lines: of its output, for the summary.
    """

    stage: str
    name: str
    status: str
    seconds: float
    note: str = ""
    lines: tuple[str, ...] = ()

    @property
    def is_failure(self) -> bool:
        """Whether the run as a whole failed because of it."""
        return self.status in (FAILED, TIMEOUT)


@dataclass(frozen=True)
class Stage:
    """Steps that belong together.

    Attributes:
        name: as on the command line.
        steps: in order.
        weight: its part of the whole time.
    """

    name: str
    steps: Sequence[Step]
    weight: float


def run_stages(
    stages: Sequence[Stage],
    *,
    budget: float,
    folder: Path,
    root: Path,
    told: Callable[[list[Outcome]], None] = lambda _: None,
) -> list[Outcome]:
    """Run every step of every stage, each within its limit.

    A stage's limit is its weight among the stages still to run, of the time still left: what one
    leaves over, the next ones have.

    Args:
        stages: in order.
        budget: seconds of all together.
        folder: where logs go.
        root: working folder of the commands.
        told: called with all outcomes so far after each step: the run itself may be cut.
    """
    outcomes: list[Outcome] = []
    started = time.monotonic()
    for i, stage in enumerate(stages):
        left = budget - (time.monotonic() - started)
        weight = stage.weight / sum(other.weight for other in stages[i:])
        ends = time.monotonic() + max(left * weight, _LEAST_SECONDS)
        for j, planned in enumerate(stage.steps):
            share = planned.share / sum(other.share for other in stage.steps[j:])
            limit = max((ends - time.monotonic()) * share, _LEAST_SECONDS)
            step, limit = _when_ready(planned, limit)
            log = folder / f"{stage.name}-{step.name}.log"
            outcome = run_step(stage.name, step, limit=limit, log=log, root=root)
            outcomes.append(outcome)
            print(format_outcome(outcome), flush=True)
            told(outcomes)
    return outcomes


def _when_ready(step: Step, limit: float) -> tuple[Step, float]:
    """Wait for what a step needs; returns the step, skipped if that is missing, and the rest."""
    if step.ready is None or step.skip:
        return step, limit
    began = time.monotonic()
    reason = step.ready(limit)
    left = max(limit - (time.monotonic() - began), _LEAST_SECONDS)
    return (replace(step, skip=reason) if reason else step), left


def run_step(stage: str, step: Step, *, limit: float, log: Path, root: Path) -> Outcome:
    """Run one command; its output goes to a log.

    Args:
        stage: its stage's name.
        step: the command.
        limit: seconds after which it is killed, with its children.
        log: the file.
        root: working folder.
    """
    if step.skip:
        return Outcome(stage, step.name, SKIPPED, 0.0, step.skip)
    command = [part.replace(DEADLINE, f"{limit * _MARGIN:.0f}") for part in step.command]
    # a checkout's folder kernels/ must not be found as the top-level package of that name
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    started = time.monotonic()
    with log.open("w") as output:
        try:
            process = subprocess.Popen(
                command,
                cwd=root,
                env=environment | dict(step.environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that its children end with it
            )
        except OSError as error:
            return Outcome(stage, step.name, FAILED, 0.0, f"cannot be started: {error}")
        code = _wait(process, limit)
    seconds = time.monotonic() - started
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if code is None:
        note = f"killed after {limit:.0f} s"
        return Outcome(stage, step.name, TIMEOUT, seconds, note, tuple(lines[-_FAILURE_LINES:]))
    if code != 0:
        tail = tuple(lines[-_FAILURE_LINES:])
        status, note = (NOTED, step.noted[code]) if code in step.noted else (FAILED, "")
        return Outcome(stage, step.name, status, seconds, note or f"exit code {code}", tail)
    return Outcome(stage, step.name, OK, seconds, "", tuple(step.excerpt(lines)))


def _wait(process: subprocess.Popen[bytes], limit: float) -> int | None:
    """Exit code, or None if the process had to be killed."""
    try:
        return process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:  # interrupted, or too slow
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def format_outcome(outcome: Outcome) -> str:
    """One line."""
    name = f"{outcome.stage} {outcome.name}"
    return f"{name:<28}{outcome.status:<9}{outcome.seconds:>6.0f} s  {outcome.note}".rstrip()


def format_summary(outcomes: Sequence[Outcome], about: Sequence[str]) -> str:
    """The text of summary.txt: a table, then what each step said."""
    lines = [*about, "", *(format_outcome(outcome) for outcome in outcomes)]
    for outcome in outcomes:
        if outcome.lines:
            lines += ["", f"--- {outcome.stage} {outcome.name}: {outcome.status}", *outcome.lines]
    failed = sum(outcome.is_failure for outcome in outcomes)
    skipped = sum(outcome.status == SKIPPED for outcome in outcomes)
    noted = sum(outcome.status == NOTED for outcome in outcomes)
    also = f", {noted} with something to read" if noted else ""
    lines += ["", f"{len(outcomes)} steps, {failed} failed, {skipped} skipped{also}"]
    return "\n".join(lines)
