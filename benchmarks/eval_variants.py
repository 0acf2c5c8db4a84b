"""The variants that `eval_quality.py` compares: what is recorded, on which prompts, and what it becomes.

A variant is data; everything made on the way to it (a calibration, recorded inputs) is kept in the
work folder and shared by the variants that need the same.
"""  # noqa: E501 - one sentence

from __future__ import annotations

import hashlib
import json
import random
import resource
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import ptq4adm
from ptq4adm.calibration import Calibration
from ptq4adm.calibration.prompts import default_prompts
from ptq4adm.prompts import AugmentSettings, augment_prompts, find_domain
from ptq4adm.prompts.generator import make_pool
from ptq4adm.rounding.gptq import GptqSettings, gptq
from ptq4adm.sensitivity import Sensitivity, assign_schemes, resize

SIZE = 64  # (prompt, step) pairs that a strategy chooses
# pairs that a rounding sees, and how they are chosen
INPUTS = {"gptq": ("activation-aware", 64), "reconstruct": ("uniform-steps", 1024)}
POOL_PROMPTS = 64  # prompts that they are chosen from
PROMPTS = 16  # of a set of prompts: as many as are listed
_CORRECTION_SEED = 1_000_000


@dataclass(frozen=True)
class Variant:
    """One row of the comparison.

    Attributes:
        group: what it is compared within.
        config: of `QuantConfig`; None for the float model.
        prompts: "listed", "pool" (drawn from the domain's grammar), "seeds" or "augmented".
        strategy: which pairs are recorded; None for all.
        budget: share of float16 that an integer program may spend; None for the config's schemes.
        is_corrected: whether a line for every step and channel is fitted.
        gptq: its settings.
        inputs: strategy and number of the pairs that a rounding sees; None for those of `INPUTS`.
    """

    group: str
    config: Mapping[str, Any] | None = field(default_factory=dict)
    prompts: str = "listed"
    strategy: str | None = None
    budget: float | None = None
    is_corrected: bool = False
    gptq: GptqSettings = field(default_factory=GptqSettings)
    inputs: tuple[str, int] | None = None

    def key(self) -> str:
        """Short name of everything that decides its clips."""
        config = None
        if self.config is not None:
            # with the defaults: clips of other defaults are other clips
            config = ptq4adm.QuantConfig(**dict(self.config)).to_dict()
        about = asdict(self) | {"group": "", "config": config, "pairs": SIZE}
        if config is None or config["rounding"] != "gptq":
            del about["gptq"]
        del about["inputs"]
        if config is not None and config["rounding"] in INPUTS:
            about["inputs"] = self.inputs or INPUTS[config["rounding"]]
        content = json.dumps(about, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]


UNIFORM = {"protect_sensitive": False}
ABSMAX = {"activation_observer": "absmax"}
GPTQ = {"rounding": "gptq"}
TRAINED = {"rounding": "reconstruct"}
ASYMMETRIC = GptqSettings(is_asymmetric=True)
NO_SHIFT = GptqSettings(has_bias_shift=False)
_BASELINE, _OPTION, _BUDGET, _SET, _PROMPTS = (
    "baseline",
    "one option",
    "size budget",
    "calibration set",
    "calibration prompts",
)
VARIANTS: dict[str, Variant] = {
    "float": Variant(_BASELINE, None),
    "W8A8": Variant(_BASELINE, {"scheme": "w8a8"}),
    "W4A8": Variant(_BASELINE),
    "W4A8, uniform": Variant(_BASELINE, UNIFORM),
    "uniform, absmax": Variant(_OPTION, UNIFORM | ABSMAX),
    "uniform, groups of 64": Variant(_OPTION, UNIFORM | {"group_size": 64}),
    "uniform, dynamic scales": Variant(_OPTION, UNIFORM | {"activation": "dynamic"}),
    "uniform, step correction": Variant(_OPTION, UNIFORM, is_corrected=True),
    "uniform, GPTQ": Variant(_OPTION, UNIFORM | GPTQ),
    "uniform, GPTQ, no bias shift": Variant(_OPTION, UNIFORM | GPTQ, gptq=NO_SHIFT),
    "uniform, GPTQ, quantized inputs": Variant(_OPTION, UNIFORM | GPTQ, gptq=ASYMMETRIC),
    "uniform, GPTQ, quantized inputs, no bias shift": Variant(
        _OPTION, UNIFORM | GPTQ, gptq=replace(ASYMMETRIC, has_bias_shift=False)
    ),
    "uniform, reconstruction": Variant(_OPTION, UNIFORM | TRAINED),
    "W4A8, groups of 64": Variant(_OPTION, {"group_size": 64}),
    "W4A8, GPTQ": Variant(_OPTION, GPTQ),
    "W4A8, GPTQ, 256 pairs of uniform steps": Variant(_OPTION, GPTQ, inputs=("uniform-steps", 256)),
    "W4A8, GPTQ, quantized inputs": Variant(_OPTION, GPTQ, gptq=ASYMMETRIC),
    "W4A8, reconstruction": Variant(_OPTION, TRAINED),
    "budget 0.29": Variant(_BUDGET, budget=0.29),
    "budget 0.30": Variant(_BUDGET, budget=0.30),
    "budget 0.30, GPTQ": Variant(_BUDGET, GPTQ, budget=0.30),
    "budget 0.30, GPTQ, quantized inputs": Variant(_BUDGET, GPTQ, budget=0.30, gptq=ASYMMETRIC),
    "budget 0.30, reconstruction": Variant(_BUDGET, TRAINED, budget=0.30),
    "budget 0.35": Variant(_BUDGET, budget=0.35),
    "budget 0.40": Variant(_BUDGET, budget=0.40),
    "all pairs": Variant(_SET, prompts="pool"),
    "random": Variant(_SET, prompts="pool", strategy="random"),
    "uniform steps": Variant(_SET, prompts="pool", strategy="uniform-steps"),
    "skewed steps": Variant(_SET, prompts="pool", strategy="skewed-steps"),
    "density and diversity": Variant(_SET, prompts="pool", strategy="density-diversity"),
    "activation-aware": Variant(_SET, prompts="pool", strategy="activation-aware"),
    "seed prompts": Variant(_PROMPTS, prompts="seeds"),
    "augmented prompts": Variant(_PROMPTS, prompts="augmented"),
}


@dataclass(frozen=True)
class Cost:
    """What a variant took to make.

    Attributes:
        seconds: calibration, search and packing; a calibration that another variant left is counted
            with the time that it took then.
        peak_mb: highest resident memory of the process so far.
    """

    seconds: float
    peak_mb: float


class Maker:
    """Makes quantized pipelines.

    Args:
        folder: of the float pipeline.
        work: folder for what variants share.
        sensitivity: file of its layers' errors.
    """

    def __init__(self, folder: Path, work: Path, sensitivity: Path) -> None:
        self.folder, self.work, self.sensitivity = folder, work, sensitivity
        work.mkdir(parents=True, exist_ok=True)

    def make(self, variant: Variant) -> tuple[ptq4adm.TextToAudioPipeline, Cost]:
        """The pipeline of a variant, and what it cost."""
        pipe = ptq4adm.load_pipeline(self.folder)
        if variant.config is None:
            return pipe, Cost(0.0, _peak_mb())
        config = ptq4adm.QuantConfig(**dict(variant.config))
        calibration, seconds = None, 0.0
        if config.activation == "static":
            calibration, seconds = self._calibration(pipe, variant)
        inputs = None
        if config.rounding != "nearest":
            inputs, more = self._inputs(pipe, *(variant.inputs or INPUTS[config.rounding]))
            seconds += more
        start = time.monotonic()
        assignment = None
        if variant.budget is not None:
            errors = Sensitivity.load(self.sensitivity)
            sized = resize(errors, pipe, calibration, config)
            assignment = assign_schemes(sized, variant.budget)
        ptq4adm.quantize(
            pipe,
            config,
            calibration,
            inputs=inputs,
            assignment=assignment,
            rounder=partial(gptq, settings=variant.gptq) if config.rounding == "gptq" else None,
            progress=False,
        )
        if variant.is_corrected:
            pipe.correction = ptq4adm.fit_correction(
                pipe, ptq4adm.load_pipeline(self.folder), seed=_CORRECTION_SEED, progress=False
            )
        return pipe, Cost(seconds + time.monotonic() - start, _peak_mb())

    def _inputs(
        self, pipe: ptq4adm.TextToAudioPipeline, strategy: str, size: int
    ) -> tuple[Path, float]:
        """What a rounding looks at: pairs of the pool, whatever the ranges are recorded of."""
        path = self.work / f"inputs-{strategy}-{size}.safetensors"
        times = path.with_suffix(".json")
        if not times.is_file():
            start = time.monotonic()
            ptq4adm.calibrate(
                pipe,
                self._prompts(pipe, "pool"),
                seed=2000,
                strategy=strategy,
                size=size,
                inputs=path,
                progress=False,
            )
            times.write_text(json.dumps({"seconds": time.monotonic() - start}))
        return path, float(json.loads(times.read_text())["seconds"])

    def _calibration(
        self, pipe: ptq4adm.TextToAudioPipeline, variant: Variant
    ) -> tuple[Calibration, float]:
        name = f"{variant.prompts}-{variant.strategy or 'all'}"
        path, times = self.work / f"{name}.safetensors", self.work / f"{name}.json"
        if path.is_file() and times.is_file():
            return Calibration.load(path), float(json.loads(times.read_text())["seconds"])
        start = time.monotonic()
        options: dict[str, Any] = {"seed": 1000, "progress": False}
        if variant.strategy is not None:
            options |= {"strategy": variant.strategy, "size": SIZE}
        calibration = ptq4adm.calibrate(pipe, self._prompts(pipe, variant.prompts), **options)
        seconds = time.monotonic() - start
        calibration.save(path)
        times.write_text(json.dumps({"seconds": seconds}))
        return calibration, seconds

    def _prompts(self, pipe: ptq4adm.TextToAudioPipeline, choice: str) -> list[str]:
        if choice == "listed":
            return default_prompts()
        if choice == "pool":
            pool = make_pool(find_domain("audioldm-tiny"), AugmentSettings.pool, 0)
            return random.Random(0).sample(pool, POOL_PROMPTS)
        # at equal size: the seeds, repeated with other noise, against seeds and what they lack
        found = augment_prompts(None, PROMPTS, pipe=pipe)
        if choice == "augmented":
            return list(found.prompts)
        seeds = found.prompts[: found.seeds]
        return [seeds[i % len(seeds)] for i in range(PROMPTS)]


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
