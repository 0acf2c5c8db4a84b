"""Text encoders of the original checkpoints in plain torch: BERT with Make-An-Audio's projection,
and the RoBERTa with a projection that is the text half of AudioLDM's CLAP."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class BertConfig:
    """Sizes; heads are 64 wide."""

    vocab: int = 30522
    width: int = 768
    layers: int = 12
    inner: int = 3072
    positions: int = 512
    types: int = 2
    eps: float = 1e-12
    first_position: int = 0


BERT_BASE = BertConfig()
# positions count from 2, behind the padding token's id
ROBERTA_BASE = BertConfig(50265, positions=514, types=1, eps=1e-5, first_position=2)


def bert_shapes(config: BertConfig) -> Shapes:
    """Name to shape of a `BertModel` or `RobertaModel`, as transformers stores it."""
    width = config.width
    found: Shapes = {
        "embeddings.word_embeddings.weight": (config.vocab, width),
        "embeddings.position_embeddings.weight": (config.positions, width),
        "embeddings.token_type_embeddings.weight": (config.types, width),
    }
    found |= _pair("embeddings.LayerNorm", width)
    for i in range(config.layers):
        name = f"encoder.layer.{i}"
        for part in ("query", "key", "value"):
            found |= _linear(f"{name}.attention.self.{part}", width, width)
        found |= _linear(f"{name}.attention.output.dense", width, width)
        found |= _pair(f"{name}.attention.output.LayerNorm", width)
        found |= _linear(f"{name}.intermediate.dense", width, config.inner)
        found |= _linear(f"{name}.output.dense", config.inner, width)
        found |= _pair(f"{name}.output.LayerNorm", width)
    return found | _linear("pooler.dense", width, width)


def bert(
    w: dict[str, Tensor], name: str, config: BertConfig, ids: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Hidden states [B, L, width]; `mask` [B, L] is 1 where there is a token."""
    position = torch.arange(ids.shape[1]) + config.first_position
    e = f"{name}embeddings"
    x = w[f"{e}.word_embeddings.weight"][ids] + w[f"{e}.position_embeddings.weight"][position]
    x = _norm(w, f"{e}.LayerNorm", x + w[f"{e}.token_type_embeddings.weight"][0], config.eps)
    for i in range(config.layers):
        layer = f"{name}encoder.layer.{i}"
        q, k, v = (
            _lin(w, f"{layer}.attention.self.{part}", x).unflatten(-1, (-1, 64))
            for part in ("query", "key", "value")
        )
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(64)
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None] == 0, -math.inf)
        y = torch.einsum("bhij,bjhd->bihd", scores.softmax(dim=-1), v).flatten(2)
        y = _lin(w, f"{layer}.attention.output.dense", y)
        x = _norm(w, f"{layer}.attention.output.LayerNorm", x + y, config.eps)
        y = functional.gelu(_lin(w, f"{layer}.intermediate.dense", x))
        y = _lin(w, f"{layer}.output.dense", y)
        x = _norm(w, f"{layer}.output.LayerNorm", x + y, config.eps)
    return x


def clap_token_shapes(config: BertConfig, projected: int) -> Shapes:
    """Name to shape below `cond_stage_model.caption_encoder.`"""
    found = {f"base.{name}": shape for name, shape in bert_shapes(config).items()}
    found["projection.linear1.weight"] = (projected, config.width)
    found["projection.linear2.weight"] = (projected, projected)
    return found | _pair("projection.layer_norm", projected)


def clap_tokens(w: dict[str, Tensor], config: BertConfig, ids: Tensor) -> Tensor:
    """Projected vectors of all tokens [B, L, projected]."""
    first = functional.linear(bert(w, "base.", config, ids), w["projection.linear1.weight"])
    second = functional.linear(functional.gelu(first), w["projection.linear2.weight"])
    return _norm(w, "projection.layer_norm", first + second, 1e-5)


def clap_text_shapes(config: BertConfig, projected: int) -> Shapes:
    """Name to shape below `cond_stage_model.model.`, with a few that are not the text's."""
    found = {f"text_branch.{name}": shape for name, shape in bert_shapes(config).items()}
    found |= _linear("text_projection.0", config.width, projected)
    found |= _linear("text_projection.2", projected, projected)
    found |= _linear("text_transform.sequential.0", projected, projected)
    found |= _linear("audio_projection.0", projected, projected)
    found |= _pair("audio_branch.bn0", 64)
    return found | {"logit_scale_a": (), "logit_scale_t": ()}


def clap_text(w: dict[str, Tensor], config: BertConfig, ids: Tensor, mask: Tensor) -> Tensor:
    """Unit vectors [B, projected] of token ids."""
    x = bert(w, "text_branch.", config, ids, mask)[:, 0]
    x = torch.tanh(_lin(w, "text_branch.pooler.dense", x))
    x = _lin(w, "text_projection.2", functional.relu(_lin(w, "text_projection.0", x)))
    return functional.normalize(x, dim=-1)


def _lin(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return functional.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def _norm(w: dict[str, Tensor], name: str, x: Tensor, eps: float) -> Tensor:
    weight = w[f"{name}.weight"]
    return functional.layer_norm(x, weight.shape, weight, w[f"{name}.bias"], eps)


def _linear(name: str, c_in: int, c_out: int) -> Shapes:
    return {f"{name}.weight": (c_out, c_in), f"{name}.bias": (c_out,)}


def _pair(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}
