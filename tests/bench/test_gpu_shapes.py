"""The stored table of what a step runs is what the models run."""

from __future__ import annotations

import pytest

from ptq4adm.bench.gpu_shapes import (
    GPU_KINDS,
    TOY_LAYERS,
    TOY_MODEL,
    _stored,
    gpu_layers,
    read_models,
)
from ptq4adm.bench.shapes import MODELS
from ptq4adm.errors import ConfigError


def test_the_table_is_the_models() -> None:
    # `python -m ptq4adm.bench.gpu_shapes` writes it anew
    assert list(_stored()) == read_models()


def test_every_kind_is_there_for_tango_and_has_a_toy() -> None:
    assert {layer.shape.kind for layer in gpu_layers(["tango"])} == set(GPU_KINDS)
    assert {layer.shape.kind for layer in TOY_LAYERS} == set(GPU_KINDS)
    assert gpu_layers([TOY_MODEL]) == list(TOY_LAYERS)


def test_gated_layers_are_eight_times_as_wide_as_their_input() -> None:
    gated = [layer.shape for layer in gpu_layers(list(MODELS)) if layer.is_gated]
    assert gated
    assert all(shape.N == 8 * shape.K for shape in gated)


def test_counts_of_norms_are_those_of_the_model() -> None:
    counts: dict[str, int] = {}
    for layer in gpu_layers(["tango"]):
        counts[layer.shape.kind] = counts.get(layer.shape.kind, 0) + layer.count
    # 22 resnets of two norms; 16 transformers, and conv_norm_out; three norms a block
    assert counts["groupnorm-silu"] == 44
    assert counts["groupnorm"] == 17
    assert counts["layernorm"] == 48
    assert counts["geglu"] == 16


@pytest.mark.parametrize(
    ("models", "kinds", "message"), [(["x"], GPU_KINDS, "model 'x'"), ([], ["y"], "kind 'y'")]
)
def test_unknown_names_are_refused(models: list, kinds: list, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        gpu_layers(models, kinds)
