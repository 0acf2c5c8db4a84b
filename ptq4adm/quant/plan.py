"""Which layer takes which scheme, why, and what that weighs: the table a person reads first.

Owns the precedence (config, then the family's rules, then what is possible, then what a size budget
assigned, then the user's overrides) and the byte counts. It makes no module.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ptq4adm.config import QuantConfig, Scheme
from ptq4adm.errors import PatternError, UnsupportedLayerError
from ptq4adm.packing.layout import BLOCK_K, KLayout

_MB = 1e6
_INTEGER_ACTIVATIONS = (Scheme.W4A8.value, Scheme.W8A8.value)


@dataclass(frozen=True)
class Choice:
    """Scheme of one layer, with its reason ("" for the config's own scheme)."""

    scheme: str
    reason: str


@dataclass(frozen=True)
class PlanRow:
    """One layer of a plan.

    Attributes:
        name: module name.
        kind: "Linear" or "Conv2d".
        shape: of the float weight.
        scheme: name of a `Scheme`.
        activation: "static", "dynamic", or "float" where activations stay float.
        reason: why it is not the config's own choice; "" if it is.
        segments: parts of the input with their own activation scales; None for one.
        bytes_before: weight and bias in float16.
        bytes_after: everything stored for the layer.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    scheme: str
    activation: str
    reason: str
    segments: tuple[int, ...] | None
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class QuantPlan:
    """What `quantize` does, or did; `str()` is a table.

    Attributes:
        rows: every linear and convolution, in module order.
        other_before: bytes of all other tensors (norms, embeddings) in float16.
        other_after: the same as they stay.
        config: what was asked for.
    """

    rows: tuple[PlanRow, ...]
    other_before: int
    other_after: int
    config: QuantConfig

    @property
    def bytes_before(self) -> int:
        """All tensors in float16."""
        return self.other_before + sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        """All tensors as planned."""
        return self.other_after + sum(row.bytes_after for row in self.rows)

    @property
    def saving(self) -> float:
        """Share of the float16 bytes that the plan saves."""
        return 1.0 - self.bytes_after / self.bytes_before if self.bytes_before else 0.0

    def count(self) -> dict[str, int]:
        """Layers of each scheme."""
        return dict(Counter(row.scheme for row in self.rows))

    def summary(self) -> str:
        """One line: layers of each scheme and the size."""
        schemes = ", ".join(f"{number} {scheme}" for scheme, number in sorted(self.count().items()))
        return (
            f"{len(self.rows)} layers ({schemes}): {self.bytes_before / _MB:.2f} MB in float16, "
            f"{self.bytes_after / _MB:.2f} MB quantized, {100 * self.saving:.1f} % less"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe content."""
        return {
            "config": self.config.to_dict(),
            "rows": [asdict(row) for row in self.rows],
            "other_bytes_before": self.other_before,
            "other_bytes_after": self.other_after,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }

    def __str__(self) -> str:
        header = ("layer", "kind", "weight", "scheme", "activation", "MB fp16", "MB now", "why")
        table = [header, *(_cells(row) for row in self.rows)]
        other = (
            "(norms and other tensors)",
            "",
            "",
            "",
            "",
            _mb(self.other_before),
            _mb(self.other_after),
            "kept",
        )
        table.append(other)
        widths = [max(len(line[i]) for line in table) for i in range(len(header))]
        lines = [
            "  ".join(
                cell.rjust(width) if i in (5, 6) else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in table
        ]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], self.summary()])


def choose_schemes(
    layers: Mapping[str, nn.Module],
    config: QuantConfig,
    rules: Sequence[tuple[str, str, str]],
    unsupported: Mapping[str, str],
    assignment: Mapping[str, str] | None = None,
) -> dict[str, Choice]:
    """Decide the scheme of every layer.

    Args:
        layers: name to float layer.
        config: the default scheme and the overrides.
        rules: (pattern, scheme, reason) of the model family; later ones win.
        unsupported: name to the reason why that layer cannot be quantized.
        assignment: name to the scheme that a size budget gave that layer; None for no budget.

    Raises:
        PatternError: if an override matches no layer; names the closest ones.
        UnsupportedLayerError: if an override or the assignment asks for what a layer cannot be.
    """
    choices = {name: _default(layer, config.scheme) for name, layer in layers.items()}
    for pattern, scheme, reason in rules:
        for name in layers:
            if fnmatchcase(name, pattern):
                choices[name] = Choice(scheme, reason)
    for name, reason in unsupported.items():
        choices[name] = Choice(Scheme.FLOAT.value, reason)
    for name, scheme in (assignment or {}).items():
        if name not in layers:
            raise _unknown_pattern(name, list(layers))
        _check_possible(name, layers[name], scheme, unsupported.get(name))
        choices[name] = Choice(scheme, "integer program")
    for pattern, scheme in config.overrides.items():
        matched = [name for name in layers if fnmatchcase(name, pattern)]
        if not matched:
            raise _unknown_pattern(pattern, list(layers))
        for name in matched:
            _check_possible(name, layers[name], scheme, unsupported.get(name))
            choices[name] = Choice(scheme, f"override {pattern!r}")
    return choices


def plan_row(
    name: str,
    layer: nn.Linear | nn.Conv2d,
    choice: Choice,
    *,
    segments: tuple[int, ...] | None,
    buckets: int,
    group_size: int | None,
) -> PlanRow:
    """One row, with its byte counts.

    Args:
        name: module name.
        layer: the float layer.
        choice: its scheme.
        segments: parts of the input with their own scales; None for one.
        buckets: rows of its activation scale table; 0 if dynamic.
        group_size: None or 64.
    """
    is_integer = choice.scheme in _INTEGER_ACTIVATIONS
    bias = 0 if layer.bias is None else layer.bias.numel()
    activation = "float" if not is_integer else "static" if buckets else "dynamic"
    reason = choice.reason
    if is_integer and segments is not None:
        reason = "; ".join(
            filter(None, (reason, f"input in segments {segments[0]} + {segments[1]}"))
        )
    return PlanRow(
        name=name,
        kind=type(layer).__name__,
        shape=tuple(layer.weight.shape),
        scheme=choice.scheme,
        activation=activation,
        reason=reason,
        segments=segments if is_integer else None,
        bytes_before=2 * (layer.weight.numel() + bias),
        bytes_after=_stored_bytes(layer, choice.scheme, segments, buckets, group_size),
    )


def _stored_bytes(
    layer: nn.Linear | nn.Conv2d,
    scheme: str,
    segments: tuple[int, ...] | None,
    buckets: int,
    group_size: int | None,
) -> int:
    N, bias = layer.weight.shape[0], 0 if layer.bias is None else layer.bias.numel()
    if scheme == Scheme.FLOAT.value:
        return 2 * (layer.weight.numel() + bias)
    scales_and_bias = 4 * (N + bias)
    if scheme == Scheme.W8.value:
        return layer.weight.numel() + scales_and_bias
    kernel = (
        (1, 1) if isinstance(layer, nn.Linear) else (layer.kernel_size[0], layer.kernel_size[1])
    )
    layout = KLayout(segments or (layer.weight.shape[1],), kernel)
    total = scales_and_bias + 4 * len(layout.segments) * buckets
    if scheme == Scheme.W8A8.value:
        return total + N * layout.k_padded
    total += N * layout.k_padded // 2
    return total + (N * layout.k_padded // BLOCK_K if group_size else 0)


def _default(layer: nn.Module, scheme: str) -> Choice:
    if scheme == Scheme.W8.value and isinstance(layer, nn.Conv2d):
        return Choice(Scheme.FLOAT.value, "weight-only int8 is for linear layers")
    return Choice(scheme, "")


def _check_possible(name: str, layer: nn.Module, scheme: str, unsupported: str | None) -> None:
    if unsupported is not None and scheme != Scheme.FLOAT.value:
        raise UnsupportedLayerError(
            f"layer {name!r} cannot be {scheme}: {unsupported}; override it with 'float'"
        )
    if scheme == Scheme.W8.value and isinstance(layer, nn.Conv2d):
        raise UnsupportedLayerError(
            f"layer {name!r} cannot be w8: weight-only int8 is for linear layers; use 'w8a8' or "
            "'float'"
        )


def _unknown_pattern(pattern: str, names: list[str]) -> PatternError:
    word = pattern.strip("*")
    inside = [name for name in names if word and word.lower() in name.lower()]
    # a pattern without its wildcards most often is a wrong level of the hierarchy: compare parts as
    # well
    scored = sorted(names, key=lambda name: -difflib.SequenceMatcher(None, word, name).ratio())
    closest = (inside + [name for name in scored if name not in inside])[:3]
    return PatternError(
        f"override {pattern!r} matches none of the {len(names)} layers; closest are "
        f"{', '.join(repr(name) for name in closest) or 'none'} ('*' matches any part of a name, "
        "dots included)"
    )


def _cells(row: PlanRow) -> tuple[str, ...]:
    shape = "x".join(str(size) for size in row.shape)
    return (
        row.name,
        row.kind,
        shape,
        row.scheme,
        row.activation,
        _mb(row.bytes_before),
        _mb(row.bytes_after),
        row.reason,
    )


def _mb(count: int) -> str:
    return f"{count / _MB:.3f}"
