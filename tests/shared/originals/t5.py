"""The encoder of a FLAN-T5 in plain torch, from its published config and paper."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

Shapes = dict[str, tuple[int, ...]]
MAX_DISTANCE = 128


@dataclass(frozen=True)
class T5Sizes:
    """The entries of config.json that vary; the default is google/flan-t5-large."""

    vocab: int = 32128
    width: int = 1024
    head: int = 64
    heads: int = 16
    hidden: int = 2816
    layers: int = 24
    buckets: int = 32


def shapes(sizes: T5Sizes) -> Shapes:
    """Name to shape of every tensor below `text_encoder.`; the embedding is there twice."""
    inner = sizes.heads * sizes.head
    found: Shapes = {
        "shared.weight": (sizes.vocab, sizes.width),
        "encoder.embed_tokens.weight": (sizes.vocab, sizes.width),
    }
    for i in range(sizes.layers):
        attention, gated = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
        for part in "qkv":
            found[f"{attention}.SelfAttention.{part}.weight"] = (inner, sizes.width)
        found[f"{attention}.SelfAttention.o.weight"] = (sizes.width, inner)
        if i == 0:
            table = (sizes.buckets, sizes.heads)
            found[f"{attention}.SelfAttention.relative_attention_bias.weight"] = table
        found[f"{attention}.layer_norm.weight"] = (sizes.width,)
        for part in ("wi_0", "wi_1"):
            found[f"{gated}.DenseReluDense.{part}.weight"] = (sizes.hidden, sizes.width)
        found[f"{gated}.DenseReluDense.wo.weight"] = (sizes.width, sizes.hidden)
        found[f"{gated}.layer_norm.weight"] = (sizes.width,)
    return found | {"encoder.final_layer_norm.weight": (sizes.width,)}


def encode(w: dict[str, Tensor], sizes: T5Sizes, ids: Tensor, mask: Tensor) -> Tensor:
    """Hidden states [B, L, width] of token ids; `mask` [B, L] is 1 for tokens."""
    x = w["shared.weight"][ids]
    table = w["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    bias = table[_buckets(ids.shape[1], sizes.buckets)].permute(2, 0, 1)[None]  # [1, heads, L, L]
    bias = bias.masked_fill(mask[:, None, None] == 0, -math.inf)
    for i in range(sizes.layers):
        name = f"encoder.block.{i}.layer.0"
        n = _rms(x, w[f"{name}.layer_norm.weight"])
        q, k, v = (
            functional.linear(n, w[f"{name}.SelfAttention.{part}.weight"])
            .unflatten(2, (sizes.heads, -1))
            .transpose(1, 2)
            for part in "qkv"
        )
        # T5 does not scale its scores
        weights = (q @ k.transpose(2, 3) + bias).softmax(-1)
        attended = (weights @ v).transpose(1, 2).flatten(2)
        x = x + functional.linear(attended, w[f"{name}.SelfAttention.o.weight"])
        name = f"encoder.block.{i}.layer.1"
        n = _rms(x, w[f"{name}.layer_norm.weight"])
        gate = functional.linear(n, w[f"{name}.DenseReluDense.wi_0.weight"])
        value = functional.linear(n, w[f"{name}.DenseReluDense.wi_1.weight"])
        gated = functional.gelu(gate, approximate="tanh") * value
        x = x + functional.linear(gated, w[f"{name}.DenseReluDense.wo.weight"])
    return _rms(x, w["encoder.final_layer_norm.weight"])


def _buckets(length: int, count: int) -> Tensor:
    """Which bucket a key is in, seen from a query: half of them for each direction."""
    half, exact = count // 2, count // 4
    found = torch.zeros(length, length, dtype=torch.long)
    for query in range(length):
        for key in range(length):
            distance = abs(key - query)
            if distance >= exact:
                share = math.log(distance / exact) / math.log(MAX_DISTANCE / exact)
                distance = min(exact + int(share * (half - exact)), half - 1)
            found[query, key] = distance + (half if key > query else 0)
    return found


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight
