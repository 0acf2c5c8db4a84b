"""Conditionings: one batch, joined and moved as one thing."""

from __future__ import annotations

import pytest
import torch

from ptq4adm.errors import ShapeError
from ptq4adm.models import Conditioning


def _text(batch: int, tokens: int) -> Conditioning:
    mask = torch.ones(batch, tokens, dtype=torch.bool)
    return Conditioning(
        {"encoder_hidden_states": torch.randn(batch, tokens, 3), "encoder_attention_mask": mask}
    )


def test_batches_are_joined_in_order() -> None:
    first, second = _text(1, 4), _text(2, 4)
    both = Conditioning.cat([first.expand(2), second])
    assert both.batch == 4
    states = both.tensors["encoder_hidden_states"]
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[2:], second.tensors["encoder_hidden_states"])
    assert second.repeat(2).batch == 4
    nothing = Conditioning({"encoder_hidden_states": None, "class_labels": torch.ones(2, 3)})
    assert Conditioning.cat([nothing, nothing]).arguments["encoder_hidden_states"] is None


def test_a_mask_keeps_its_dtype() -> None:
    moved = _text(2, 4).to(torch.device("cpu"), torch.float16)
    assert moved.tensors["encoder_hidden_states"].dtype == torch.float16
    assert moved.tensors["encoder_attention_mask"].dtype == torch.bool


def test_what_does_not_belong_together_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"encoder_hidden_states is \[\[1, 4, 3\], \[1, 5, 3\]\]"):
        Conditioning.cat([_text(1, 4), _text(1, 5)])
    with pytest.raises(ShapeError, match="encoder_attention_mask is"):
        Conditioning.cat(
            [_text(1, 4), Conditioning({"encoder_hidden_states": torch.ones(1, 4, 3)})]
        )
    with pytest.raises(ShapeError, match="one batch"):
        Conditioning({"a": torch.ones(1), "b": torch.ones(2)})
    with pytest.raises(ShapeError, match="one batch"):
        Conditioning({"a": None})
