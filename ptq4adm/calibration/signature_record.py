"""One float pass that records signatures: streaming, resumable, one batch in memory."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ptq4adm.calibration.fingerprint import fingerprint
from ptq4adm.calibration.hooks import LayerHooks
from ptq4adm.calibration.prompts import check_prompts, prompts_hash
from ptq4adm.calibration.record import RunSettings
from ptq4adm.calibration.signatures import (
    INDEX,
    SignatureMeta,
    Signatures,
    empty_values,
    open_signatures,
    prompt_keys,
    remove_shards,
    scheduler_settings,
    write_index,
    write_shard,
)
from ptq4adm.errors import CalibrationError, CalibrationMismatchError, NonFiniteError
from ptq4adm.protocols import DenoiserAdapter

logger = logging.getLogger(__name__)

# values of a sample that its percentile is read from: 8 of 8192 lie above the 99.9th
SAMPLE = 8192
_SHARE = 0.999
# elements of the middle layer's batch that steps are compared by
FEATURES = 4096


class SignatureRecorder(LayerHooks):
    """Hooks that fill the values of one batch.

    Args:
        denoiser: the float model.
        segments: module name to the channels of the two parts of its input.
    """

    def __init__(self, denoiser: nn.Module, segments: dict[str, tuple[int, int]]) -> None:
        super().__init__(denoiser, segments)
        self.first_site: dict[str, int] = {}
        sites: list[str] = []
        for name in self.layers:
            self.first_site[name] = len(sites)
            count = len(segments.get(name, (0,)))
            sites += [name] if count == 1 else [f"{name}[{i}]" for i in range(count)]
        self.sites = tuple(sites)
        self.middle = middle_layer(list(self.layers))
        self._columns: dict[tuple[int, int, torch.device], Tensor] = {}

    def start(self, prompts: Sequence[str], meta: SignatureMeta) -> None:
        """Forget the last batch, and expect these prompts."""
        self.start_batch(prompts)
        self.values = empty_values(len(prompts), meta)
        self.timesteps = torch.full((meta.steps,), torch.nan, dtype=torch.float64)
        self.features: dict[int, Tensor] = {}

    def tensors(self) -> dict[str, Tensor]:
        """The batch's shard.

        Raises:
            CalibrationError: if the denoiser was not called once a step.
        """
        steps = len(self.timesteps)
        if self.calls != steps:
            raise CalibrationError(
                f"the denoiser ran {self.calls} times in {steps} steps; signatures need a sampler "
                "that calls it once a step"
            )
        rows = [self.features.get(step, torch.zeros(0)) for step in range(steps)]
        is_whole = len({len(row) for row in rows}) == 1
        features = torch.stack(rows) if is_whole else torch.zeros(steps, 0)
        return {"values": self.values, "timesteps": self.timesteps, "features": features}

    def begin_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember the step's timestep."""
        del args, kwargs
        if self.step < len(self.timesteps):
            self.timesteps[self.step] = self.timestep

    def see(self, name: str, x: Tensor, parts: Sequence[Tensor]) -> None:
        """Write the statistics of one input where they belong."""
        if self.step >= len(self.timesteps) or x.numel() == 0:
            return
        halves = self.halves(name, x)
        if halves > self.values.shape[3]:
            raise CalibrationError(
                f"layer {name!r} read every prompt {halves} times in a step, needs at most "
                f"{self.values.shape[3]}"
            )
        for i, part in enumerate(parts):
            found = self._statistics(part.detach().reshape(part.shape[0], -1)).cpu()
            if not bool(torch.isfinite(found).all()):
                raise NonFiniteError(self.describe_failure(name, x))
            place = self.values[:, self.step, self.first_site[name] + i, :halves]
            by_prompt = found.view(halves, len(self.prompts), -1).transpose(0, 1)
            # of a layer that runs twice in a step, the larger of both; fmax passes over NaN
            place.copy_(torch.fmax(place, by_prompt))
        if name == self.middle:
            flat = x.detach().reshape(1, -1)
            self.features[self.step] = self._pick(flat, FEATURES)[0].float().cpu()

    def _statistics(self, x: Tensor) -> Tensor:
        """Statistics of every row, float32 [rows, 4]."""
        x = x.to(torch.float32)
        absmax = x.abs().amax(dim=1)
        picked = self._pick(x, SAMPLE).abs()
        count = picked.shape[1]
        above = count - math.ceil(_SHARE * count) + 1
        p999 = picked.topk(above, dim=1).values[:, -1]
        # divided first: the square of a large finite value may not be finite
        unit = absmax.clamp_min(torch.finfo(torch.float32).tiny)
        scaled = x / unit[:, None]
        rms = scaled.square().mean(dim=1).sqrt() * unit
        return torch.stack([absmax, p999, scaled.mean(dim=1) * unit, rms], dim=1)

    def _pick(self, x: Tensor, count: int) -> Tensor:
        """`count` columns of x [rows, n], the same ones whenever n is the same; all if n <= count.

        Drawn, not evenly spaced: a stride would meet the same few channels again and again.
        """
        size = int(x.shape[1])
        if size <= count:
            return x
        key = (size, count, x.device)
        if key not in self._columns:
            generator = torch.Generator().manual_seed(size)
            drawn = torch.randint(size, (count,), generator=generator)
            self._columns[key] = drawn.to(x.device)
        return x[:, self._columns[key]]


def middle_layer(names: Sequence[str]) -> str:
    """The layer whose input stands for the middle of the model.

    It is the first linear layer of an attention in a `mid_block`, or the middle one of all layers
    where there is none.
    """
    middle = [name for name in names if name.split(".")[0] == "mid_block"]
    attention = [name for name in middle if "attn" in name or "attention" in name]
    return (attention or middle or [names[len(names) // 2]])[0]


def record_signatures(
    adapter: DenoiserAdapter,
    pipe: Any,
    prompts: Sequence[str],
    settings: RunSettings,
    folder: str | Path,
    *,
    progress: bool = True,
) -> Signatures:
    """Run every prompt and record the signatures of what the denoiser's layers saw.

    Args:
        adapter: how the model is run.
        pipe: the float pipeline; it is not changed.
        prompts: none empty.
        settings: how they are run; `buckets` is not used.
        folder: where they are kept, batch by batch. A call with the same model, scheduler, prompts
            and settings goes on where an interrupted one stopped.
        progress: show a bar on a terminal.

    Raises:
        PromptError: if a prompt is empty.
        NonFiniteError: if an activation is NaN or infinite; names layer, step and prompt.
        CalibrationMismatchError: if the folder holds another model's, scheduler's or run's.
        CalibrationError: if a shard cannot be read, or samples cannot be told apart.
        OutputError: if the folder cannot be written.
    """
    texts, folder = check_prompts(prompts), Path(folder)
    denoiser = adapter.denoiser(pipe)
    recorder = SignatureRecorder(denoiser, adapter.segments(denoiser))
    meta = SignatureMeta(
        fingerprint=fingerprint(denoiser),
        scheduler=scheduler_settings(pipe),
        prompts_hash=prompts_hash(texts),
        prompt_keys=prompt_keys(texts, settings.seed),
        steps=settings.steps,
        guidance=float(settings.guidance),
        seed=settings.seed,
        num_train_timesteps=adapter.num_train_timesteps(pipe),
        sites=recorder.sites,
    )
    done = _done(folder, meta, denoiser, pipe)
    bar = tqdm(
        total=len(texts) * settings.steps,
        initial=done * settings.steps,
        desc="signatures",
        unit="step",
        disable=None if progress else True,
    )
    with bar, recorder:
        for start in range(done, len(texts), settings.batch):
            part = texts[start : start + settings.batch]
            recorder.start(part, meta)
            adapter.run(
                pipe,
                part,
                steps=settings.steps,
                guidance=settings.guidance,
                seed=settings.seed + start,
                on_step=lambda *_: bar.update(len(recorder.prompts)),
            )
            write_shard(folder, start, recorder.tensors())
    return open_signatures(folder)


def _done(folder: Path, meta: SignatureMeta, denoiser: nn.Module, pipe: Any) -> int:
    """Prompts that an earlier call recorded; a new folder is begun."""
    if not (folder / INDEX).is_file():
        # shards without an index are of nobody knows what
        if any(folder.glob("signatures-*.safetensors")):
            logger.warning("signatures in %s have no index and are recorded again", folder)
        remove_shards(folder, 0)
        write_index(folder, meta)
        return 0
    earlier = open_signatures(folder)
    earlier.meta.check(denoiser, pipe)
    if earlier.meta != meta:
        raise CalibrationMismatchError(
            f"{folder}: signatures of other prompts or settings (steps {earlier.meta.steps}, "
            f"guidance {earlier.meta.guidance:g}, seed {earlier.meta.seed}, prompts "
            f"{earlier.meta.prompts_hash}); choose another folder"
        )
    done = earlier.done
    # behind a gap: recorded again, and perhaps in other batches, which would leave two of a prompt
    remove_shards(folder, done)
    logger.info("signatures in %s: %d of %d prompts done", folder, done, len(meta.prompt_keys))
    return done
