"""Channel balancing: ranges moved from activations into weights where no output changes.

A linear map that reads channel j of something that can be divided by s[j] beforehand takes the
factor back by its weight's column j:

    (x[j] / s[j]) (W[:, j] s[j]) = x[j] W[:, j],    s[j] = X[j]^a / W[j]^(1 - a)              (1)

X[j] and W[j] are the largest magnitudes of the input channel and the column; the geometric mean of
s is made 1. Exact places, and the only ones taken: a layer norm or a group norm without an
activation (divided in its weight and bias) and the layers that read its result alone; an
attention's values (divided in `to_v`) and `to_out`; the value half of a gated feed-forward and its
second layer.

Source: (1) is SmoothQuant's migration.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ptq4adm.calibrating import check_float
from ptq4adm.calibration import ChosenInputs
from ptq4adm.errors import ConfigError
from ptq4adm.nn.replace import check_finite
from ptq4adm.rounding import Replay

KINDS = ("layer norm", "group norm", "values", "gate")
_SMALLEST = 1e-5
_LARGEST_FACTOR = 100.0


@dataclass(frozen=True)
class Link:
    """One place where a factor can move.

    Attributes:
        name: of the module that is divided.
        kind: one of `KINDS`.
        source: the module that is divided: its first rows, as many as there are channels.
        readers: the layers that read its result, and nothing else does.
    """

    name: str
    kind: str
    source: nn.Module
    readers: tuple[nn.Module, ...]


def balance(
    denoiser: nn.Module,
    inputs: ChosenInputs,
    *,
    alpha: float = 0.5,
    kinds: Sequence[str] = KINDS,
    progress: bool = True,
) -> list[str]:
    """Balance a float denoiser in place; calibrate and quantize it afterwards.

    It becomes another model by its fingerprint: what was recorded of it before is refused.

    Args:
        denoiser: float, of diffusers' transformer blocks.
        inputs: recorded on this very model.
        alpha: a of (1), 0 to 1: how much of an input's range goes into the weight.
        kinds: places to take, of `KINDS`.
        progress: show a bar on a terminal.

    Returns:
        Names of the modules that were divided, in module order.

    Raises:
        ConfigError: if alpha or a kind is unknown, or the model is quantized.
        CalibrationMismatchError: if the inputs are another model's.
        NonFiniteError: if a weight is NaN or infinite.
    """
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
        raise ConfigError(f"alpha: got {alpha!r}, needs 0 to 1")
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ConfigError(f"kinds: got {unknown[0]!r}, needs some of {', '.join(KINDS)}")
    check_float(denoiser)
    check_finite(denoiser)
    inputs.check(denoiser)
    links = [link for link in find_links(denoiser) if link.kind in kinds]
    ranges = _input_ranges(denoiser, links, inputs, progress)
    # all factors first: a call that fails has changed nothing
    moves = [
        (link, readers, _factors(largest, readers, alpha)) for link, largest, readers in ranges
    ]
    for link, readers, factors in moves:
        _move(link, readers, factors)
    return [link.name for link, _, _ in moves]


def find_links(denoiser: nn.Module) -> list[Link]:
    """The exact places of a model of diffusers' blocks, in module order."""
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    found: list[Link] = []
    for name, module in denoiser.named_modules():
        if isinstance(module, BasicTransformerBlock):
            found += _block_links(name, module)
        elif isinstance(module, Transformer2DModel):
            norm, reader = getattr(module, "norm", None), getattr(module, "proj_in", None)
            if isinstance(norm, nn.GroupNorm) and isinstance(reader, nn.Conv2d):
                found.append(Link(f"{name}.norm", "group norm", norm, (reader,)))
    return found


def _block_links(name: str, block: Any) -> Iterator[Link]:
    from diffusers.models.activations import GEGLU

    attentions = [("norm1", block.attn1), ("norm2", block.attn2)]
    for norm, attention in attentions:
        source = getattr(block, norm, None)
        if attention is None or not isinstance(source, nn.LayerNorm):
            continue
        readers = [attention.to_q]
        # keys and values of a text read the text: whether they do is seen when the model runs
        readers += [x for x in (attention.to_k, attention.to_v) if x is not None]
        yield Link(f"{name}.{norm}", "layer norm", source, tuple(readers))
    feed_forward = block.ff.net
    if isinstance(feed_forward[0], GEGLU):
        if isinstance(block.norm3, nn.LayerNorm):
            yield Link(f"{name}.norm3", "layer norm", block.norm3, (feed_forward[0].proj,))
        yield Link(f"{name}.ff.net.0.proj", "gate", feed_forward[0].proj, (feed_forward[2],))
    for attribute, attention in (("attn1", block.attn1), ("attn2", block.attn2)):
        if attention is not None and attention.to_v is not None:
            yield Link(f"{name}.{attribute}.to_v", "values", attention.to_v, (attention.to_out[0],))


class _Watch:
    """Hooks of one link: ranges of its readers' input, and which readers read its source."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.ranges: Tensor | None = None
        self.strangers: set[int] = set()
        self._result: Tensor | None = None
        self.handles = [reader.register_forward_pre_hook(self._reads) for reader in link.readers]
        if link.kind.endswith("norm"):
            self.handles.append(link.source.register_forward_hook(self._makes))

    def _makes(self, _: nn.Module, __: Any, result: Tensor) -> None:
        self._result = result

    def _reads(self, reader: nn.Module, args: tuple[Any, ...]) -> None:
        x: Tensor = args[0]
        if self._result is not None and x.data_ptr() != self._result.data_ptr():
            self.strangers.add(id(reader))
            return
        channel = 1 if isinstance(reader, nn.Conv2d) else x.dim() - 1
        largest = x.detach().abs().amax([d for d in range(x.dim()) if d != channel])
        self.ranges = largest if self.ranges is None else torch.maximum(self.ranges, largest)


_Ranges = list[tuple[Link, Tensor, tuple[nn.Module, ...]]]


@torch.no_grad()
def _input_ranges(
    denoiser: nn.Module, links: list[Link], inputs: ChosenInputs, progress: bool
) -> _Ranges:
    """Links that ran, the largest magnitude of every input channel, and their true readers."""
    watches = [_Watch(link) for link in links]
    replay = Replay(inputs)
    try:
        for batch in tqdm(
            replay.batches(next(denoiser.parameters()).device),
            total=len(replay),
            desc="balance",
            unit="call",
            disable=None if progress else True,
        ):
            replay.call(denoiser, batch)
    finally:
        for watch in watches:
            for handle in watch.handles:
                handle.remove()
    found: _Ranges = []
    for watch in watches:
        readers = tuple(r for r in watch.link.readers if id(r) not in watch.strangers)
        if watch.ranges is not None and getattr(watch.link.source, "weight", None) is not None:
            found.append((watch.link, watch.ranges, readers))
    return found


def _factors(largest: Tensor, readers: Sequence[Any], alpha: float) -> Tensor:
    """Factors of (1), float32 [C]."""
    columns = torch.stack(
        [r.weight.detach().transpose(0, 1).flatten(1).abs().amax(1) for r in readers]
    )
    weights = columns.float().amax(0).clamp_min(_SMALLEST)
    factors = largest.float().clamp_min(_SMALLEST) ** alpha / weights ** (1 - alpha)
    factors = factors / factors.log().mean().exp()
    return factors.clamp(1 / _LARGEST_FACTOR, _LARGEST_FACTOR)


@torch.no_grad()
def _move(link: Link, readers: Sequence[Any], factors: Tensor) -> None:
    """Divide the source's first rows, multiply the readers' columns."""
    source: Any = link.source
    channels = len(factors)
    for tensor in (source.weight, source.bias):
        if tensor is not None:
            tensor[:channels] /= factors.view(-1, *[1] * (tensor.dim() - 1)).to(tensor.dtype)
    for reader in readers:
        columns = factors.view(1, -1, *[1] * (reader.weight.dim() - 2))
        reader.weight.mul_(columns.to(reader.weight.dtype))
