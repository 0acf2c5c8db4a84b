"""Many prompts over several processes, machines or GPUs, through accelerate.

Whole batches are dealt out, in turn: a batch is computed as one process alone would compute it, so
results do not depend on how many there are. Every process gets all of them.

    state = accelerate.PartialState()
    pipe = ptq4adm.load_pipeline(MODEL, device=state.device)
    calibration = ptq4adm.calibrate_in_processes(pipe, prompts)      # accelerate launch script.py
"""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.nn import functional

from ptq4adm.calibrating import calibrate
from ptq4adm.calibration import Calibration
from ptq4adm.calibration.merge import merge_calibrations
from ptq4adm.calibration.prompts import check_prompts, default_prompts, prompts_hash
from ptq4adm.errors import ConfigError, DependencyError, ProcessError, Ptq4admError

__all__ = ["calibrate_in_processes", "generate_in_processes"]

Result = TypeVar("Result")
_OF_A_CHOICE = ("strategy", "size", "inputs")
# of the last gathering: see `_gather`
_kept: list[Any] = []


@dataclass(frozen=True)
class _Answer:
    """What one process has to say: results, or why it has none."""

    results: list[Any]
    error: str | None


def calibrate_in_processes(
    pipe: Any,
    prompts: Sequence[str] | None = None,
    *,
    seed: int = 0,
    batch: int = 4,
    **options: Any,
) -> Calibration:
    """`ptq4adm.calibrate`, with its prompts dealt out; to be called by every process alike.

    Args:
        pipe: as there.
        prompts: as there.
        seed: as there: prompt i has seed + i, whichever process runs it.
        batch: prompts run at once; they stay together.
        options: the other arguments of `calibrate`, but `strategy`, `size` and `inputs`: a choice
            is made among the steps of all prompts, which no process has.

    Returns:
        The same calibration on every process, and as one process alone would make it.

    Raises:
        ConfigError: if a strategy is named.
        DependencyError: if accelerate is missing.
        ProcessError: on every process whose own part went well, if another's did not.
        Ptq4admError: as `calibrate`, on the process that failed.
    """
    given = [name for name in _OF_A_CHOICE if options.get(name) is not None]
    if given:
        raise ConfigError(
            f"{', '.join(given)}: a choice is made among the steps of all prompts, and here every "
            "process has some; leave it out, or call ptq4adm.calibrate in one process"
        )
    texts = check_prompts(default_prompts() if prompts is None else prompts)
    # an unknown name is refused by all processes, not by those that have prompts
    inspect.signature(calibrate).bind(pipe, texts, **options)

    def run(start: int, part: list[str]) -> Calibration:
        return calibrate(pipe, part, seed=seed + start, batch=batch, **options)

    parts = _in_processes(texts, batch, run, is_joined=True)
    return merge_calibrations(parts, prompts_hash=prompts_hash(texts), seed=seed)


def generate_in_processes(
    pipe: Any,
    prompts: Sequence[str],
    *,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    seconds: float | None = None,
    batch: int = 4,
) -> Tensor:
    """One clip a prompt, with the prompts dealt out; to be called by every process alike.

    Args:
        pipe: a pipeline of this package.
        prompts: B prompts.
        steps: as in its call.
        guidance: as in its call.
        seed: sample i has seed + i, whichever process makes it.
        seconds: as in its call.
        batch: prompts run at once; they stay together.

    Returns:
        Waveforms float32 [B, S] on the CPU, in the order of the prompts, on every process.

    Raises:
        DependencyError: if accelerate is missing.
        ProcessError: on every process whose own part went well, if another's did not.
        Ptq4admError: as the pipeline, on the process that failed.
    """
    texts = check_prompts(prompts)

    def run(start: int, part: list[str]) -> Tensor:
        clips: Tensor = pipe(
            part, steps=steps, guidance=guidance, seed=seed + start, seconds=seconds
        )
        return clips

    return torch.cat(_in_processes(texts, batch, run, is_joined=False))


def _in_processes(
    texts: list[str],
    batch: int,
    run: Callable[[int, list[str]], Result],
    *,
    is_joined: bool,
) -> list[Result]:
    """Results of all processes, in the order of the prompts.

    Args:
        texts: all prompts.
        batch: prompts that stay together.
        run: called with the index of the first prompt, and the prompts.
        is_joined: whether one call does all batches of a process, or one a batch.
    """
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ConfigError(f"batch: got {batch!r}, needs a whole number of at least 1")
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise DependencyError(
            f"several processes are run through accelerate ({error}); pip install accelerate"
        ) from error
    state = PartialState()
    starts = list(range(0, len(texts), batch))
    failure: Ptq4admError | None = None
    results: list[Result] = []
    with state.split_between_processes(starts) as own:
        groups = [own] if is_joined and own else [[start] for start in own]
        try:
            for group in groups:
                results.append(run(group[0], texts[group[0] : group[-1] + batch]))
        except Ptq4admError as error:
            # told to the others first: they wait for this process's answer
            failure = error
    text = None if failure is None else f"{type(failure).__name__}: {failure}"
    answers = _gather(_Answer(results, text), state)
    if failure is not None:
        raise failure
    for rank, answer in enumerate(answers):
        if answer.error is not None:
            raise ProcessError(f"process {rank} of {len(answers)} failed: {answer.error}")
    return [result for answer in answers for result in answer.results]


def _gather(answer: _Answer, state: Any) -> list[_Answer]:
    """The answers of all processes, in their order.

    accelerate's `gather_object` leaves its tensors to a thread of gloo, which lets go of them after
    it has answered and needs the interpreter for it: a script that ended at that moment ended in
    std::terminate, now and then. Here the works that own them are kept until the next call, so the
    thread is never the last to let go.
    """
    if state.num_processes == 1:
        return [answer]
    content = torch.frombuffer(bytearray(pickle.dumps(answer)), dtype=torch.uint8)
    content = content.to(state.device)
    works: list[Any] = []

    def gather(own: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(own) for _ in range(state.num_processes)]
        works.append(distributed.all_gather(parts, own, async_op=True))
        works[-1].wait()
        return parts

    sizes = [int(size) for size in gather(torch.tensor([len(content)], device=state.device))]
    padded = functional.pad(content, (0, max(sizes) - len(content)))
    found = gather(padded)
    _kept[:] = works
    return [
        pickle.loads(part[:size].cpu().numpy().tobytes())
        for part, size in zip(found, sizes, strict=True)
    ]
