"""Runs a model in every form that the page shows: float, W8A8, W4A8, and an assignment."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ptq4adm.calibrating import calibrate
from ptq4adm.calibration import Calibration, default_prompts, prompts_hash
from ptq4adm.calibration.prompts import check_prompts
from ptq4adm.config import QuantConfig
from ptq4adm.evaluation.paired import latent_sqnr_db
from ptq4adm.evaluation.result import Evaluation
from ptq4adm.models import TextToAudioPipeline
from ptq4adm.nn.replace import scheme_of
from ptq4adm.prompts import Coverage, find_domain, measure
from ptq4adm.quantization import QuantPlan, load_pipeline, quantize
from ptq4adm.report.data import Report, Sample, SizeRow, Take
from ptq4adm.sensitivity import Sensitivity

_BATCH = 4


@dataclass(frozen=True)
class ReportSettings:
    """What is made for the page.

    Attributes:
        steps: denoising steps of the clips; None for the pipeline's own number.
        seed: clip i starts from the noise of seed + i.
        config: of the quantized forms, but for their scheme; None for the default.
        calibration_prompts: None for the listed ones.
        progress: show bars on a terminal.
    """

    steps: int | None = None
    seed: int = 0
    config: QuantConfig | None = None
    calibration_prompts: Sequence[str] | None = None
    progress: bool = True


def gather(
    source: str | Path,
    prompts: Sequence[str],
    *,
    calibration: Calibration | None = None,
    sensitivity: Sensitivity | None = None,
    evaluations: Sequence[Evaluation] = (),
    settings: ReportSettings | None = None,
    original: Mapping[str, Any] | None = None,
) -> Report:
    """Quantize a model, make its clips, and collect what is known of it.

    Args:
        source: a float pipeline, as `load_pipeline` takes it.
        prompts: one clip each, in every form.
        calibration: of this model; None calibrates it.
        sensitivity: of this model; its assignment, if it has one, is a form of its own.
        evaluations: shown as they are.
        settings: None for the defaults.
        original: options of published files, for `load_pipeline`.

    Raises:
        PromptError: if there is no prompt, or one is empty.
        ConfigError: if the model is quantized already.
        CalibrationMismatchError: if the calibration or the sensitivity is another model's.
        Ptq4admError: as loading, calibrating and quantizing.
    """
    settings = settings or ReportSettings()
    texts = check_prompts(prompts)
    listed = list(settings.calibration_prompts or default_prompts())
    pipe = load_pipeline(source, **dict(original or {}))
    if sensitivity is not None:
        sensitivity.check(pipe.unet)
    if calibration is None:
        calibration = calibrate(pipe, listed, progress=settings.progress)
    calibration.check(pipe.unet)
    made = list(_forms(pipe, calibration, sensitivity, texts, settings))
    floats = made[0].latents
    samples = []
    for i, text in enumerate(texts):
        takes = [Take(made[0].name, made[0].waves[i], None)]
        for form in made[1:]:
            sqnr = float(latent_sqnr_db(floats[i : i + 1], form.latents[i : i + 1]))
            takes.append(Take(form.name, form.waves[i], sqnr))
        samples.append(Sample(text, settings.seed + i, tuple(takes)))
    domain = getattr(pipe, "prompt_domain", None) or "general"
    return Report(
        title=f"{Path(source).name}, quantized",
        settings=_settings(pipe, calibration, settings, made[-1].plan),
        sizes=tuple(form.size for form in made),
        samples=tuple(samples),
        sampling_rate=pipe.sampling_rate,
        calibration=calibration,
        coverage=_coverage(domain, listed, calibration),
        domain=domain,
        sensitivity=sensitivity,
        evaluations=tuple(evaluations),
    )


@dataclass(frozen=True)
class _Form:
    """One form of the model, run."""

    name: str
    size: SizeRow
    latents: Tensor
    waves: Tensor
    plan: QuantPlan | None


def _forms(
    pipe: TextToAudioPipeline,
    calibration: Calibration,
    sensitivity: Sensitivity | None,
    prompts: list[str],
    settings: ReportSettings,
) -> Iterator[_Form]:
    latents, waves = _run(pipe, prompts, settings, "float")
    float_bytes = sum(2 * p.numel() for p in pipe.unet.parameters())
    yield _Form("float", SizeRow("float16", float_bytes, {}), latents, waves, None)
    base = settings.config or QuantConfig()
    wanted: list[tuple[str, str, Mapping[str, str] | None]] = [
        ("W8A8", "w8a8", None),
        ("W4A8", "w4a8", None),
    ]
    if sensitivity is not None and sensitivity.chosen is not None:
        wanted.append(("W4A8, assigned", "w4a8", sensitivity.chosen))
    for name, scheme, assignment in wanted:
        form = copy.copy(pipe)
        form.unet = copy.deepcopy(pipe.unet)
        config = QuantConfig.from_dict({**base.to_dict(), "scheme": scheme})
        plan = quantize(form, config, calibration, assignment=assignment, progress=False)
        layers: dict[str, int] = {}
        for module in form.unet.modules():
            found = scheme_of(module)
            if found is not None:
                layers[found.value] = layers.get(found.value, 0) + 1
        size = SizeRow(name, plan.bytes_after, layers)
        yield _Form(name, size, *_run(form, prompts, settings, name), plan)


def _run(
    pipe: TextToAudioPipeline, prompts: list[str], settings: ReportSettings, name: str
) -> tuple[Tensor, Tensor]:
    latents, waves = [], []
    starts = tqdm(
        range(0, len(prompts), _BATCH),
        desc=f"clips, {name}",
        unit="batch",
        disable=None if settings.progress else True,
    )
    for start in starts:
        conditioning = pipe.encode_prompts(prompts[start : start + _BATCH])
        found = pipe.denoise(conditioning, steps=settings.steps, seed=settings.seed + start)
        latents.append(found.cpu())
        waves.append(pipe.decode(found).cpu())
    return torch.cat(latents), torch.cat(waves)


def _coverage(domain: str, prompts: list[str], calibration: Calibration) -> Coverage | None:
    """Of the prompts that made the calibration; None if it was made of others."""
    if prompts_hash(prompts) != calibration.meta.prompts_hash:
        return None
    return measure(find_domain(domain).tagger, prompts)


def _settings(
    pipe: TextToAudioPipeline,
    calibration: Calibration,
    settings: ReportSettings,
    plan: QuantPlan | None,
) -> tuple[tuple[str, str], ...]:
    import ptq4adm

    meta = calibration.meta
    defaults = pipe.defaults
    rows = [
        ("UNet", f"{type(pipe.unet).__name__}, sha256 {meta.fingerprint[:16]}"),
        ("Calibration", f"sha256 {calibration.digest()[:16]}"),
        (
            "Calibration run",
            f"{meta.prompt_count} prompts (sha256 {meta.prompts_hash}), {meta.steps} steps, "
            f"guidance {meta.guidance:g}, seed {meta.seed}, {meta.buckets} timestep buckets",
        ),
        (
            "Clips",
            f"{settings.steps or defaults.steps} steps, guidance {defaults.guidance:g}, noise of "
            f"seeds from {settings.seed}",
        ),
        ("Versions", f"ptq4adm {ptq4adm.__version__}, torch {torch.__version__}"),
    ]
    if plan is not None:
        shown = {k: v for k, v in plan.config.to_dict().items() if v not in (None, {})}
        rows.insert(3, ("Config", ", ".join(f"{k} {v}" for k, v in shown.items())))
    return tuple(rows)
