"""Constant work leaves the loop: time projections by step, keys and values of text by prompt.

    with prepared(unet, scheduler.timesteps, class_labels=vectors):
        for t in scheduler.timesteps:
            unet(latents, t, encoder_hidden_states=None, class_labels=vectors)

`time_embedding`, `class_embedding` and the `time_emb_proj` of every resnet depend on the timestep
and the class labels alone; keys and values of a cross attention on the text alone. They are
computed once, by the modules themselves, quantized or not. With class embeddings concatenated,

    W silu([e_t, c]) + b = (W [silu(e_t), 0] + b) + (W [0, silu(c)])

so a table over T steps and one over B prompts replace one over both. Each call of the model is
compared with what was prepared; another timestep, text, batch or autocast is computed as if nothing
were prepared. Weights must not change inside the block. A module with hooks is called as ever, and
so is one whose activation scales differ between steps: one input gives several results.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ptq4adm.errors import ConfigError, MixedTimestepError, ShapeError, UnsupportedModelError
from ptq4adm.nn.base import QuantizedLayer
from ptq4adm.nn.forwards import HoistedForward, are_all_watched, find_watcher, is_hoisted
from ptq4adm.nn.half import HalfLinear
from ptq4adm.nn.storage import tensor_version
from ptq4adm.nn.weight_only import W8Linear
from ptq4adm.quant.buckets import find_timestep, single_timestep

__all__ = ["HoistedForward", "can_prepare", "prepared"]

logger = logging.getLogger(__name__)

# layers with f(a + b) = f(a) + f(b) - f(0) for all inputs: no quantization of activations
_AFFINE = (nn.Linear, W8Linear, HalfLinear)
_ARGUMENTS = ("sample", "timestep", "encoder_hidden_states", "class_labels", "timestep_cond")
_Texts = dict[str, Tensor]


@contextmanager
def prepared(
    denoiser: nn.Module,
    timesteps: Tensor,
    *,
    class_labels: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_hidden_states_1: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Iterator[None]:
    """Keep what is constant over the calls of a UNet inside the `with` block.

    Args:
        denoiser: a `UNet2DConditionModel`, or AudioLDM2's, quantized or not.
        timesteps: [T], those of the coming calls, as they will be passed.
        class_labels: as they will be passed, [B, D]; None if the model has none.
        encoder_hidden_states: as they will be passed, [B, L, D]; None if there is no text.
        encoder_hidden_states_1: the second text of AudioLDM2, [B, L', D']; None for other models.
        dtype: of the samples; None for that of the conditions, else of the model.

    Raises:
        UnsupportedModelError: if the denoiser is not a UNet of diffusers.
        ConfigError: if it is prepared already.
        ShapeError: if `timesteps` is not [T].
    """
    _check(denoiser, timesteps)
    given = {
        "encoder_hidden_states": encoder_hidden_states,
        "encoder_hidden_states_1": encoder_hidden_states_1,
    }
    texts = {name: text for name, text in given.items() if text is not None}
    samples = _sample_dtype(denoiser, class_labels, *texts.values())
    run = _Run(timesteps, class_labels, texts, dtype or samples)
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
        contexts: the text tensors that are passed down; none outside a recognized call.
        has_times: whether there are tables by step.
    """

    def __init__(
        self, timesteps: Tensor, labels: Tensor | None, texts: _Texts, dtype: torch.dtype
    ) -> None:
        self.timesteps, self.dtype = timesteps, dtype
        self.version = tensor_version(timesteps)
        self.rows = {float(t): i for i, t in enumerate(timesteps.tolist())}
        self.labels = None if labels is None else _Key(labels)
        self.texts = {name: _Key(text) for name, text in texts.items()}
        given = (t for t in (timesteps, labels, *texts.values()) if t is not None)
        self.devices = sorted({tensor.device.type for tensor in given})
        self.autocast = _autocast(self.devices)
        self.row: int | None = None
        self.contexts: _Texts = {}
        self.has_times = False

    def __reduce__(self) -> tuple[Any, ...]:
        """The hooks of a copied or pickled model recognize nothing: it has no tables."""
        return _Run, (torch.empty(0), None, {}, self.dtype)

    def recognize(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: find out which of the kept results a call may use."""
        del module
        self.row, self.contexts = None, {}
        # a kept result has no gradient, and hooks on all modules do not see inside of it
        if torch.is_grad_enabled() or are_all_watched() or _autocast(self.devices) != self.autocast:
            return
        given = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
        sample = given.get("sample")
        if not isinstance(sample, Tensor):
            return
        self.contexts = {n: given[n] for n, key in self.texts.items() if key.matches(given.get(n))}
        if self.has_times and given.get("timestep_cond") is None and self._matches(sample, given):
            self.row = self._row(find_timestep(args, kwargs))

    def forget(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook: the call is over."""
        del module, args, output
        self.row, self.contexts = None, {}

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
        # two views of one tensor share its version: changed in place, it says nothing of the rows
        if self.version is None or tensor_version(timestep) != self.version:
            return None
        if timestep.untyped_storage().data_ptr() != kept.untyped_storage().data_ptr():
            return None
        distance = int(timestep.storage_offset()) - int(kept.storage_offset())
        row, rest = divmod(distance, max(1, kept.stride(0)))
        return row if rest == 0 and 0 <= row < kept.shape[0] else None


class _Key:
    """A tensor by its values on a CPU, elsewhere by identity and version.

    An inference tensor has no version that would show a change: elsewhere it matches nothing.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.is_host = tensor.device.type == "cpu"
        self.values = tensor.detach().clone() if self.is_host else None
        self.version = tensor_version(tensor)

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
        if other is not self.tensor or self.version is None:
            return False
        return other._version == self.version


def _autocast(device_types: Iterable[str]) -> list[tuple[str, torch.dtype]]:
    """Device types that compute in another dtype now, and in which."""
    return [
        (kind, torch.get_autocast_dtype(kind))
        for kind in device_types
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    ]


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
    embeddings = (unet.time_embedding, unet.class_embedding)
    if not _is_free(*embeddings, unet.time_embed_act) or not _is_constant(*embeddings):
        return {}
    steps = run.timesteps.shape[0]
    like = torch.empty(steps, 0, dtype=run.dtype, device=run.timesteps.device)
    # AudioLDM2's UNet has no function of its own for it
    embed = getattr(unet, "get_time_embed", None)
    waves = embed(like, run.timesteps) if embed else unet.time_proj(run.timesteps).to(run.dtype)
    times = unet.time_embedding(waves, None)
    if labels is not None and not hasattr(unet, "get_class_embed"):
        return {}
    classes = None if labels is None else unet.get_class_embed(sample=like, class_labels=labels)
    run.has_times = True
    lookups: _Lookups = {unet.time_embedding: _ByStep(run, times[:, None])}
    if classes is not None:
        lookups[unet.class_embedding] = _ByStep(run, classes.expand(steps, *classes.shape))
    for block in _resnets(unet):
        project = block.time_emb_proj
        if _is_free(project, block.nonlinearity) and _is_constant(project):
            lookups[project] = _projection(unet, block, run, times, classes)
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
    """Keys and values of the prepared texts."""
    if not run.texts:
        return {}
    from diffusers.models.attention_processor import Attention

    lookups: _Lookups = {}
    for module in unet.modules():
        if not isinstance(module, Attention) or not module.is_cross_attention:
            continue
        if module.norm_cross is not None:
            continue
        for layer in (module.to_k, module.to_v):
            if layer is None or layer in lookups or not _is_free(layer) or not _is_constant(layer):
                continue
            # which of two texts a layer sees is known by its width, or at the call
            texts = {name: key.tensor for name, key in run.texts.items()}
            kept = {n: layer(t) for n, t in texts.items() if t.shape[-1] == layer.in_features}
            if kept:
                lookups[layer] = _ByContext(run, kept)
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
    """Kept result of each text that a layer may see."""

    def __init__(self, run: _Run, kept: _Texts) -> None:
        self.run, self.kept = run, kept

    def __call__(self, x: Tensor) -> Tensor | None:
        for name, result in self.kept.items():
            if x is self.run.contexts.get(name):
                return result
        return None


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
    return not are_all_watched() and all(find_watcher(part) is None for part in _parts(modules))


def _is_constant(*modules: nn.Module | None) -> bool:
    """Whether one input gives one result, whatever the bucket of the step."""
    tables = (p.x_scale for p in _parts(modules) if isinstance(p, QuantizedLayer))
    return all(
        table is None
        or table.shape[1] == 1
        or (not table.is_meta and torch.equal(table, table[:, :1].expand_as(table)))
        for table in tables
    )


def _parts(modules: Iterable[nn.Module | None]) -> Iterator[nn.Module]:
    for module in modules:
        if module is not None:
            yield from module.modules()


def _sample_dtype(denoiser: Any, *conditions: Tensor | None) -> torch.dtype:
    """What samples most likely are: as the conditions, else as the model."""
    for condition in conditions:
        if condition is not None and condition.is_floating_point():
            return condition.dtype
    dtype: torch.dtype = denoiser.dtype
    return dtype


def can_prepare(denoiser: nn.Module) -> bool:
    """Whether `prepared` knows what is constant: a UNet of diffusers, and not a compiled one.

    A compiled one would be compiled again for every row of the tables.
    """
    from diffusers import UNet2DConditionModel

    known = [UNet2DConditionModel.forward]
    # a model of a module that was never imported cannot be here
    audioldm2 = sys.modules.get("diffusers.pipelines.audioldm2.modeling_audioldm2")
    if audioldm2 is not None:
        known.append(audioldm2.AudioLDM2UNet2DConditionModel.forward)
    return type(denoiser).forward in known


def _check(denoiser: nn.Module, timesteps: Tensor) -> None:
    if not can_prepare(denoiser):
        raise UnsupportedModelError(
            f"{type(denoiser).__name__}: constant work can be prepared for a UNet2DConditionModel; "
            "call this model without"
        )
    if any(map(is_hoisted, denoiser.modules())):
        raise ConfigError(
            f"{type(denoiser).__name__} is prepared already; leave that `with` block first"
        )
    if timesteps.dim() != 1:
        raise ShapeError(f"timesteps {list(timesteps.shape)}: needs [T]")
