"""Prompts, and what a denoiser is told about them, whatever the model family."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq4adm.errors import PromptError, ShapeError


@dataclass(frozen=True)
class Conditioning:
    """Keyword arguments of the denoiser for B prompts; a family's pipeline makes them.

    Attributes:
        arguments: name to a tensor [B, ...], or to None where the denoiser wants to be told that
            it gets nothing. AudioLDM has `class_labels` [B, D]; models with cross-attention have
            `encoder_hidden_states` [B, L, D], and `encoder_attention_mask` bool [B, L] where tokens
            are padded.

    Raises:
        ShapeError: if no argument is a tensor, or their batches differ.
    """

    arguments: Mapping[str, Tensor | None]

    def __post_init__(self) -> None:
        batches = {name: int(tensor.shape[0]) for name, tensor in self.tensors.items()}
        if len(set(batches.values())) != 1:
            raise ShapeError(f"conditioning: got batches {batches}, needs one batch for all")

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The arguments that are tensors."""
        return {name: value for name, value in self.arguments.items() if value is not None}

    @property
    def batch(self) -> int:
        """B."""
        return int(next(iter(self.tensors.values())).shape[0])

    def vectors(self) -> Tensor:
        """One vector a prompt, float [B, D]: of tokens their mean, without the padded ones.

        Two texts give the two vectors one after the other.
        """
        parts = []
        for name, tensor in self.tensors.items():
            if not tensor.is_floating_point():
                continue
            if tensor.dim() == 3:
                mask = self.get(name.replace("hidden_states", "attention_mask"))
                weights = torch.ones_like(tensor[..., :1]) if mask is None else mask[..., None]
                weights = weights.to(tensor.dtype)
                tensor = (tensor * weights).sum(1) / weights.sum(1).clamp_min(1)
            parts.append(tensor.flatten(1))
        return torch.cat(parts, dim=1)

    def get(self, name: str) -> Tensor | None:
        """One argument; None if there is none of the name."""
        return self.arguments.get(name)

    def to(self, device: torch.device, dtype: torch.dtype) -> Conditioning:
        """On a device; float tensors in a dtype, masks as they are."""
        return self._map(
            lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None)
        )

    def expand(self, batch: int) -> Conditioning:
        """One prompt as a batch of copies, without memory for them."""
        return self._map(lambda tensor: tensor.expand(batch, *tensor.shape[1:]))

    def repeat(self, times: int) -> Conditioning:
        """The whole batch, several times over."""
        return Conditioning.cat([self] * times)

    @staticmethod
    def cat(parts: list[Conditioning]) -> Conditioning:
        """Batches one after the other; with guidance, the unconditional one comes first.

        Raises:
            ShapeError: if their arguments have other names, or other shapes than batches.
        """
        joined: dict[str, Tensor | None] = {}
        for name in {name: None for part in parts for name in part.arguments}:
            values = [part.arguments.get(name) for part in parts]
            tensors = [value for value in values if value is not None]
            if len(tensors) not in (0, len(parts)) or len({t.shape[1:] for t in tensors}) > 1:
                shapes = [None if value is None else list(value.shape) for value in values]
                raise ShapeError(
                    f"conditioning: {name} is {shapes}; batches of one model, padded to one "
                    "length, can be joined"
                )
            joined[name] = torch.cat(tensors) if tensors else None
        return Conditioning(joined)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        return Conditioning(
            {n: None if value is None else change(value) for n, value in self.arguments.items()}
        )


def check_prompts(prompts: str | Sequence[str]) -> list[str]:
    """Prompts as a list.

    Raises:
        PromptError: if there is none, or one is empty or not a string.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise PromptError("no prompt given: expected at least one sentence")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise PromptError(f"prompt {i}: expected a string, got {type(text).__name__}")
        if not text.strip():
            raise PromptError(
                f"prompt {i} is empty: describe the sound in words, such as 'a dog barks'"
            )
    return texts
