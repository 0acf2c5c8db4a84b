"""Which blocks of a model run fused: `fuse_blocks` changes their classes, `unfuse_blocks` back.

Knows the diffusers blocks by class. Without diffusers imported there is nothing to fuse, and this
module does not import it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from ptq4adm.nn.base import QuantizedLayer
from ptq4adm.nn.fusing import FusedBlock, Fusion
from ptq4adm.ops import resolve_backend

__all__ = [
    "BlockFusion",
    "FusionReport",
    "fuse_blocks",
    "fusion_report",
    "set_backend",
    "unfuse_blocks",
]


@dataclass(frozen=True)
class BlockFusion:
    """One block of a model.

    Attributes:
        name: module name.
        kind: diffusers class.
        fused: names of the parts that run fused.
        reasons: name of each other part to why it does not.
    """

    name: str
    kind: str
    fused: tuple[str, ...]
    reasons: dict[str, str]

    def __str__(self) -> str:
        fused = f"fused {', '.join(self.fused)}" if self.fused else "unfused"
        reasons = "".join(f"; {part}: {why}" for part, why in self.reasons.items())
        return f"{self.name} ({self.kind}): {fused}{reasons}"


@dataclass(frozen=True)
class FusionReport:
    """Every block that could be fused; `str()` has a line each.

    Attributes:
        blocks: in module order.
    """

    blocks: tuple[BlockFusion, ...]

    def count(self) -> dict[str, int]:
        """Blocks with all parts fused, with some, and with none."""
        counted = Counter(
            "none" if not b.fused else "some" if b.reasons else "all" for b in self.blocks
        )
        return {key: counted[key] for key in ("all", "some", "none")}

    def summary(self) -> str:
        """One line."""
        count = self.count()
        return (
            f"{len(self.blocks)} blocks: {count['all']} fused, {count['some']} in part, "
            f"{count['none']} not"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe content."""
        return {"count": self.count(), "blocks": [asdict(block) for block in self.blocks]}

    def __str__(self) -> str:
        return "\n".join([*map(str, self.blocks), self.summary()])


def fuse_blocks(denoiser: nn.Module) -> FusionReport:
    """Let the blocks of a quantized model run fused, where they can.

    Called by `ptq4adm.quantize` and when a checkpoint is loaded. Names, parameters, hooks and state
    dict stay as they are; the result differs from the unfused model's by at most one int8 step in
    rare activations. A second call looks at every block anew.

    Returns:
        What is fused, and why not the rest.
    """
    table = _kinds()
    for name, module in denoiser.named_modules():
        kind = _kind(module, table)
        if kind is None:
            continue
        fused_class, plan = table[kind]
        fusion = plan(module, name)
        if fusion.fused:
            module.__class__ = fused_class
            module.__dict__["fusion"] = fusion
        else:
            _unfuse(module, kind)
    return fusion_report(denoiser)


def unfuse_blocks(denoiser: nn.Module) -> None:
    """Give every fused block its diffusers class back."""
    table = _kinds()
    for module in denoiser.modules():
        kind = _kind(module, table)
        if kind is not None:
            _unfuse(module, kind)


def set_backend(denoiser: nn.Module, name: str) -> FusionReport:
    """Run a quantized model on another backend, and fuse its blocks for it.

    Args:
        denoiser: with quantized layers, all on one device.
        name: "auto" or a backend's name.

    Returns:
        What is fused.

    Raises:
        BackendUnavailableError: if it cannot run where the model is; nothing is changed.
        UnknownBackendError: if there is none of that name; nothing is changed.
    """
    layers = [m for m in denoiser.modules() if isinstance(m, QuantizedLayer)]
    for device in {layer.w_scale.device for layer in layers}:
        resolve_backend(name, device)
    for layer in layers:
        layer.set_backend(name)
    return fuse_blocks(denoiser)


def fusion_report(denoiser: nn.Module) -> FusionReport:
    """What of a model is fused now, and why not the rest; changes nothing."""
    table = _kinds()
    rows = []
    for name, module in denoiser.named_modules():
        kind = _kind(module, table)
        if kind is None:
            continue
        fused, reasons = _state(module, table[kind][1](module, name))
        rows.append(BlockFusion(name, kind.__name__, fused, reasons))
    return FusionReport(tuple(rows))


def _state(module: nn.Module, planned: Fusion) -> tuple[tuple[str, ...], dict[str, str]]:
    """Parts of a block that run fused at present, and why the others do not."""
    if not isinstance(module, FusedBlock):
        reasons = planned.reasons.items()
        return (), {part: why or "fuse_blocks was not called" for part, why in reasons}
    fusion = module.fusion
    change = fusion.find_change()
    if change is not None:
        return (), {part: why or change for part, why in fusion.reasons.items()}
    return fusion.fused, {part: why for part, why in fusion.reasons.items() if why}


_Plan = Callable[[Any, str], Fusion]


def _kinds() -> dict[type[nn.Module], tuple[type[nn.Module], _Plan]]:
    """Class of diffusers to fused class and planner; empty if no such model can be there."""
    if "diffusers" not in sys.modules:
        return {}
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel
    from diffusers.models.upsampling import Upsample2D

    from ptq4adm.nn.fused_resnet import FusedResnetBlock2D, plan_resnet
    from ptq4adm.nn.fused_sampling import FusedUpsample2D, plan_upsample
    from ptq4adm.nn.fused_transformer import (
        FusedBasicTransformerBlock,
        FusedTransformer2DModel,
        plan_transformer,
        plan_transformer_block,
    )

    return {
        ResnetBlock2D: (FusedResnetBlock2D, plan_resnet),
        Transformer2DModel: (FusedTransformer2DModel, plan_transformer),
        BasicTransformerBlock: (FusedBasicTransformerBlock, plan_transformer_block),
        Upsample2D: (FusedUpsample2D, plan_upsample),
    }


def _kind(
    module: nn.Module, table: dict[type[nn.Module], tuple[type[nn.Module], _Plan]]
) -> type[nn.Module] | None:
    """The diffusers class of a block; subclasses of others have a forward of their own."""
    for kind, (fused_class, _) in table.items():
        if type(module) in (kind, fused_class):
            return kind
    return None


def _unfuse(module: nn.Module, kind: type[nn.Module]) -> None:
    module.__class__ = kind
    module.__dict__.pop("fusion", None)
