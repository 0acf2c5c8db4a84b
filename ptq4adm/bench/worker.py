"""The child process of `ptq4adm.bench.process`: ``python -m ptq4adm.bench.worker``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from ptq4adm.errors import Ptq4admError


def kernels(job: dict[str, Any], progress: bool) -> dict[str, Any]:
    """`ptq4adm.bench.kernels.measure`."""
    from ptq4adm.bench.kernels import KernelJob, measure

    parsed = KernelJob(**job)
    return measure(parsed, parsed.layers(), progress=progress)


def _of_unet_process(name: str) -> Callable[..., Any]:
    def call(**arguments: Any) -> Any:
        from ptq4adm.bench import unet_process

        return getattr(unet_process, name)(**arguments)

    return call


_UNET_REQUESTS = ("convert_unet", "open_unet", "save_step", "time_step", "memory")
REQUESTS: dict[str, Callable[..., Any]] = {
    "kernels": kernels,
    **{name: _of_unet_process(name) for name in _UNET_REQUESTS},
}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Run one request; an error of the package becomes an answer."""
    do = request.pop("do")
    try:
        return {"result": REQUESTS[do](**request)}
    except Ptq4admError as error:
        return {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Answer requests until standard input ends."""
    # whatever a library prints must not mix with the answers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        answers.write(json.dumps(answer(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
