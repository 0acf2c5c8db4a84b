"""The prompts that calibration runs when the caller names none."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
from collections.abc import Sequence

from ptq4adm.errors import PromptError


def default_prompts() -> list[str]:
    """The prompts of `prompts.txt`: speech, instruments, percussion, effects and mixtures."""
    text = (
        importlib.resources.files("ptq4adm.calibration")
        .joinpath("prompts.txt")
        .read_text(encoding="utf-8")
    )
    return [line for line in text.splitlines() if line.strip()]


def check_prompts(prompts: Sequence[str]) -> list[str]:
    """Prompts as a list.

    Raises:
        PromptError: if there is none, or one is empty or not a string.
    """
    if isinstance(prompts, str):
        raise PromptError("prompts: got one string, needs a list of prompts")
    texts = list(prompts)
    if not texts:
        raise PromptError("prompts: got an empty list, needs at least one prompt to calibrate with")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise PromptError(f"prompt {i}: got {type(text).__name__}, needs a string")
        if not text.strip():
            raise PromptError(f"prompt {i} is empty; describe a sound, or leave the line out")
    return texts


def prompts_hash(prompts: Sequence[str]) -> str:
    """SHA-256 of the list, 16 hex digits: what a checkpoint keeps of its prompts."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()[:16]
