"""Functions in processes of their own, side by side, until a deadline."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Mapping
from typing import Any


def run_processes(
    function: Callable[..., Any], tasks: Mapping[str, tuple[Any, ...]], *, seconds: float | None
) -> list[str]:
    """Run a function on several arguments at once; end what is not done in time.

    Args:
        function: of a module, so that a process can find it.
        tasks: its arguments, by a name for people.
        seconds: after which processes are ended; None for no limit.

    Returns:
        The tasks that did not finish, each with the reason.
    """
    # spawned: a forked child would inherit the GPU's state
    context = multiprocessing.get_context("spawn")
    ends = None if seconds is None else time.monotonic() + seconds
    processes = {name: context.Process(target=function, args=task) for name, task in tasks.items()}
    for process in processes.values():
        process.start()
    unfinished = []
    try:
        for name, process in processes.items():
            process.join(None if ends is None else max(0.0, ends - time.monotonic()))
            if process.exitcode is None:
                unfinished.append(f"{name}: ended after {seconds:.0f} s")
            elif process.exitcode != 0:
                unfinished.append(f"{name}: exit code {process.exitcode}")
    finally:
        for process in processes.values():
            if process.exitcode is None:
                process.terminate()
                process.join()
    return unfinished
