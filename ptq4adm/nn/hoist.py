"""Constant work leaves the loop: time projections by step, keys and values of text by prompt.

    with prepared(unet, scheduler.timesteps, class_labels=vectors):
        for t in scheduler.timesteps:
            unet(latents, t, encoder_hidden_states=None, class_labels=vectors)

`time_embedding`, `class_embedding` and the `time_emb_proj` of every resnet depend on the timestep
and the class labels alone; keys and values of a cross attention on the text alone. They are
computed once, by the modules themselves, quantized or not. With class embeddings concatenated,

    W silu([e_t, c]) + b = (W [silu(e_t), 0] + b) + (W [0, silu(c)])

so a table over T steps and one over B prompts replace one over both. Each call of the model is
compared with what was prepared; another timestep, text or batch is computed as if nothing were
prepared. Weights must not change inside the block. A module with hooks is called as ever.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ptq4adm.errors import ConfigError, MixedTimestepError, ShapeError, UnsupportedModelError
from ptq4adm.nn.half import HalfLinear
from ptq4adm.nn.weight_only import W8Linear
from ptq4adm.quant.buckets import find_timestep, single_timestep

__all__ = ["HoistedForward", "can_prepare", "prepared", "recall"]

logger = logging.getLogger(__name__)

# layers with f(a + b) = f(a) + f(b) - f(0) for all inputs: no quantization of activations
_AFFINE = (nn.Linear, W8Linear, HalfLinear)
_ARGUMENTS = ("sample", "timestep", "encoder_hidden_states", "class_labels", "timestep_cond")


class HoistedForward:
    """Takes the place of one module's forward: what was kept, else the module's own.

    Args:
        module: whose forward it replaces.
        lookup: the kept result for an input, or None.
    """

    def __init__(self, module: nn.Module, lookup: Callable[[Tensor], Tensor | None]) -> None:
        self.module = module
        self.lookup = lookup

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The module's forward."""
        is_plain = not kwargs and all(value is None for value in args)
        kept = self.lookup(x) if is_plain else None
        if kept is not None:
            return kept
        return type(self.module).forward(self.module, x, *args, **kwargs)


def recall(layer: nn.Module, x: Tensor) -> Tensor | None:
    """What a layer would return for `x`, if that was prepared; None if it has to be computed."""
    forward = layer.__dict__.get("forward")
    return forward.lookup(x) if type(forward) is HoistedForward else None


@contextmanager
def prepared(
    denoiser: nn.Module,
    timesteps: Tensor,
    *,
    class_labels: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Iterator[None]:
    """Keep what is constant over the calls of a UNet inside the `with` block.

    Args:
        denoiser: a `UNet2DConditionModel`, quantized or not.
        timesteps: [T], those of the coming calls, as they will be passed.
        class_labels: as they will be passed, [B, D]; None if the model has none.
        encoder_hidden_states: as they will be passed, [B, L, D]; None if there is no text.
        dtype: of the samples; None for that of the conditions, else of the model.

    Raises:
        UnsupportedModelError: if the denoiser is not a UNet of diffusers.
        ConfigError: if it is prepared already.
        ShapeError: if `timesteps` is not [T].
    """
    _check(denoiser, timesteps)
    samples = _sample_dtype(denoiser, class_labels, encoder_hidden_states)
    run = _Run(timesteps, class_labels, encoder_hidden_states, dtype or samples)
    with torch.no_grad():
        lookups = {**_step_tables(denoiser, run), **_context_tables(denoiser, run)}
    handles = [
        denoiser.register_forward_pre_hook(run.recognize, with_kwargs=True),
        denoiser.register_forward_hook(run.forget, always_call=True),
    ]
    for module, lookup in lookups.items():
        module.__dict__["forward"] = HoistedForward(module, lookup)
    try:
        yield
    finally:
        for module in lookups:
            module.__dict__.pop("forward", None)
        for handle in handles:
            handle.remove()


class _Run:
    """What was prepared, and what of it the call that is running may use.

    Attributes:
        row: index of the timestep in use; None outside a recognized call.
        context: the text tensor that is passed down; None outside a recognized call.
        has_times: whether there are tables by step.
    """

    def __init__(
        self, timesteps: Tensor, labels: Tensor | None, context: Tensor | None, dtype: torch.dtype
    ) -> None:
        self.timesteps, self.dtype = timesteps, dtype
        self.rows = {float(t): i for i, t in enumerate(timesteps.tolist())}
        self.labels = None if labels is None else _Key(labels)
        self.text = None if context is None else _Key(context)
        self.row: int | None = None
        self.context: Tensor | None = None
        self.has_times = False

    def recognize(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: find out which of the kept results a call may use."""
        del module
        self.row = self.context = None
        # a kept result has no gradient
        if torch.is_grad_enabled():
            return
        given = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
        sample, text = given.get("sample"), given.get("encoder_hidden_states")
        if not isinstance(sample, Tensor):
            return
        if self.text is not None and self.text.matches(text):
            self.context = text
        if self.has_times and given.get("timestep_cond") is None and self._matches(sample, given):
            self.row = self._row(find_timestep(args, kwargs))

    def forget(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook: the call is over."""
        del module, args, output
        self.row = self.context = None

    def _matches(self, sample: Tensor, given: dict[str, Any]) -> bool:
        if sample.dtype != self.dtype or sample.device != self.timesteps.device:
            return False
        labels: Any = given.get("class_labels")
        if self.labels is None:
            return labels is None
        return self.labels.matches(labels) and labels.shape[0] == sample.shape[0]

    def _row(self, timestep: Any) -> int | None:
        if not isinstance(timestep, Tensor) or timestep.device.type == "cpu":
            try:
                return self.rows.get(single_timestep(timestep))
            except (MixedTimestepError, ShapeError):
                return None
        # an element of the prepared tensor is known by its place, without waiting for the device
        kept = self.timesteps
        if timestep.numel() != 1 or timestep.dtype != kept.dtype:
            return None
        if timestep.untyped_storage().data_ptr() != kept.untyped_storage().data_ptr():
            return None
        row = int(timestep.storage_offset()) - int(kept.storage_offset())
        return row if 0 <= row < kept.shape[0] else None


class _Key:
    """A tensor by its values on a CPU, elsewhere by identity and version."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.is_host = tensor.device.type == "cpu"
        self.values = tensor.detach().clone() if self.is_host else None
        self.version = None if tensor.is_inference() else tensor._version

    def matches(self, other: Any) -> bool:
        """Whether another tensor is the same, without waiting for a device."""
        if not isinstance(other, Tensor):
            return False
        if self.values is not None:
            return (
                other.device == self.values.device
                and other.dtype == self.values.dtype
                and torch.equal(other, self.values)
            )
        return other is self.tensor and self.version == other._version is not None


# --- tables -------------------------------------------------------------------------------------

_Lookups = dict[nn.Module, Callable[[Tensor], Tensor | None]]


def _step_tables(unet: Any, run: _Run) -> _Lookups:
    """Results of everything that depends on timestep and class labels."""
    if getattr(unet, "add_embedding", None) is not None or not len(run.timesteps):
        # its additional embedding depends on arguments that are not prepared
        return {}
    labels = None if run.labels is None else run.labels.tensor
    if (unet.class_embedding is None) != (labels is None):
        return {}
    if not _is_free(unet.time_embedding, unet.class_embedding, unet.time_embed_act):
        return {}
    steps = run.timesteps.shape[0]
    like = torch.empty(steps, 0, dtype=run.dtype, device=run.timesteps.device)
    times = unet.time_embedding(unet.get_time_embed(sample=like, timestep=run.timesteps), None)
    classes = None if labels is None else unet.get_class_embed(sample=like, class_labels=labels)
    run.has_times = True
    lookups: _Lookups = {unet.time_embedding: _ByStep(run, times[:, None])}
    if classes is not None:
        lookups[unet.class_embedding] = _ByStep(run, classes.expand(steps, *classes.shape))
    for block in _resnets(unet):
        if _is_free(block.time_emb_proj, block.nonlinearity):
            lookups[block.time_emb_proj] = _projection(unet, block, run, times, classes)
    return lookups


def _projection(
    unet: Any, block: Any, run: _Run, times: Tensor, classes: Tensor | None
) -> Callable[[Tensor], Tensor | None]:
    """Table of one resnet's `time_emb_proj` over steps, and over prompts where it can be split."""

    def activate(embedding: Tensor) -> Tensor:
        if unet.time_embed_act is not None:
            embedding = unet.time_embed_act(embedding)
        return embedding if block.skip_time_act else block.nonlinearity(embedding)

    project = block.time_emb_proj
    if classes is None:
        return _ByStep(run, project(activate(times))[:, None])
    is_concatenated = bool(unet.config.class_embeddings_concat)
    is_exact = times.dtype in (torch.float32, torch.float64)
    if is_concatenated and is_exact and type(project) in _AFFINE:
        width_t, width_c = times.shape[1], classes.shape[1]
        of_step = project(nn.functional.pad(activate(times), (0, width_c)))
        of_class = project(nn.functional.pad(activate(classes), (width_t, 0)))
        of_class = of_class - project(times.new_zeros(1, width_t + width_c))
        return _ByStep(run, of_step[:, None], of_class)
    rows = []
    for time in times:
        time = time.expand(classes.shape[0], -1)
        both = torch.cat([time, classes], dim=-1) if is_concatenated else time + classes
        rows.append(project(activate(both)))
    return _ByStep(run, torch.stack(rows))


def _context_tables(unet: nn.Module, run: _Run) -> _Lookups:
    """Keys and values of the prepared text."""
    if run.text is None:
        return {}
    from diffusers.models.attention_processor import Attention

    lookups: _Lookups = {}
    for module in unet.modules():
        if not isinstance(module, Attention) or not module.is_cross_attention:
            continue
        if module.norm_cross is not None:
            continue
        for layer in (module.to_k, module.to_v):
            fits = layer is not None and layer.in_features == run.text.tensor.shape[-1]
            if fits and _is_free(layer) and layer not in lookups:
                lookups[layer] = _ByContext(run, layer(run.text.tensor))
    return lookups


class _ByStep:
    """Kept results [T, B or 1, N], plus a part [B, N] that is the same for all steps."""

    def __init__(self, run: _Run, table: Tensor, constant: Tensor | None = None) -> None:
        self.run, self.constant = run, constant
        self.rows = table.unbind(0)

    def __call__(self, x: Tensor) -> Tensor | None:
        if self.run.row is None:
            return None
        row = self.rows[self.run.row]
        if self.constant is not None:
            return row + self.constant
        return row.expand(x.shape[0], -1)


class _ByContext:
    """Kept result of one tensor."""

    def __init__(self, run: _Run, kept: Tensor) -> None:
        self.run, self.kept = run, kept

    def __call__(self, x: Tensor) -> Tensor | None:
        return self.kept if x is self.run.context else None


def _resnets(unet: nn.Module) -> list[Any]:
    from diffusers.models.resnet import ResnetBlock2D

    return [
        module
        for module in unet.modules()
        if isinstance(module, ResnetBlock2D) and module.time_emb_proj is not None
    ]


def _is_free(*modules: nn.Module | None) -> bool:
    """Whether modules may be left out of a call: nobody watches them or replaced their forward.

    Calibration is one who watches: its hooks must see every call.
    """
    return not any(
        part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__
        for module in modules
        if module is not None
        for part in module.modules()
    )


def _sample_dtype(denoiser: Any, *conditions: Tensor | None) -> torch.dtype:
    """What samples most likely are: as the conditions, else as the model."""
    for condition in conditions:
        if condition is not None and condition.is_floating_point():
            return condition.dtype
    dtype: torch.dtype = denoiser.dtype
    return dtype


def can_prepare(denoiser: nn.Module) -> bool:
    """Whether `prepared` knows what is constant: a `UNet2DConditionModel`, and not a compiled one.

    A compiled one would be compiled again for every row of the tables.
    """
    from diffusers import UNet2DConditionModel

    return type(denoiser).forward is UNet2DConditionModel.forward


def _check(denoiser: nn.Module, timesteps: Tensor) -> None:
    if not can_prepare(denoiser):
        raise UnsupportedModelError(
            f"{type(denoiser).__name__}: constant work can be prepared for a UNet2DConditionModel; "
            "call this model without"
        )
    if any(isinstance(m.__dict__.get("forward"), HoistedForward) for m in denoiser.modules()):
        raise ConfigError(
            f"{type(denoiser).__name__} is prepared already; leave that `with` block first"
        )
    if timesteps.dim() != 1:
        raise ShapeError(f"timesteps {list(timesteps.shape)}: needs [T]")
