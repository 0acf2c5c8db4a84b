"""What each quality option does alone to the quantized shipped pipeline.

    python benchmarks/bench_options.py [GROUP ...] [--prompts 20] [--sensitivity FILE]

Groups: ranges (how scales are searched), buckets (timestep buckets), mixed (bits under a size
budget), correction (a line a step and channel after guidance), balance (channels scaled between
layers). Every variant makes held-out prompts of training/captions.py from the noise of the float
model; rows of latent SQNR go to benchmarks/results/options.csv. Calibration is the default one, of
the listed prompts with all their steps. Sensitivities are measured once into --sensitivity, and
read from there if it exists.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ptq4adm
from ptq4adm.balancing import KINDS
from ptq4adm.bench import append_rows, environment
from ptq4adm.calibration import Calibration, ChosenInputs
from ptq4adm.evaluation.paired import latent_sqnr_db
from ptq4adm.sensitivity import choose, output_error, predicted_error

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "training"))
from captions import heldout_prompts  # noqa: E402 - a script folder, not a package

BATCH = 10
PAIRS = 32
# of the mixed models: 8-bit layers gain by it, 4-bit ones do not lose
OBSERVER = {"activation_observer": "p2.4"}
# what every option starts from: one scheme for all layers, nothing clipped
ALONE = {"protect_sensitive": False, "activation_observer": "absmax"}
BUDGETS = (0.29, 0.30, 0.35, 0.40, 0.50)
# what the sensitivities say in words: tiny layers next to the latents at full resolution
FIRST_AND_LAST = {
    "*.conv_shortcut": "w8a8",
    "up_blocks.2.resnets.*": "w8a8",
    "down_blocks.0.*": "w8a8",
}
OTHER_RUNS: tuple[dict[str, Any], ...] = (
    {"steps": 50},
    {"steps": 10},
    {"guidance": 1.0},
    {"guidance": 4.0},
)


@dataclass
class Bench:
    """The float pipeline, its latents, and what is made of it."""

    held: list[str]
    sensitivity_file: Path
    calibrations: dict[int, Calibration] = field(default_factory=dict)
    references: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pipe = self.load()

    def load(self) -> ptq4adm.TextToAudioPipeline:
        """The float pipeline, anew."""
        return ptq4adm.load_pipeline(ptq4adm.shipped_pipeline_path())

    def calibration(self, buckets: int = 10) -> Calibration:
        """Of the listed prompts."""
        if buckets not in self.calibrations:
            found = ptq4adm.calibrate(self.pipe, seed=1000, buckets=buckets, progress=False)
            self.calibrations[buckets] = found
        return self.calibrations[buckets]

    def latents(self, pipe: ptq4adm.TextToAudioPipeline, **run: Any) -> Tensor:
        """[B, C, H, W]; prompt i starts from the noise of seed i."""
        parts = [
            pipe.denoise(pipe.encode_prompts(self.held[i : i + BATCH]), seed=i, **run)
            for i in range(0, len(self.held), BATCH)
        ]
        return torch.cat(parts)

    def quality(self, pipe: ptq4adm.TextToAudioPipeline, **run: Any) -> dict[str, Any]:
        """Latent SQNR against the float pipeline."""
        key = repr(run)
        if key not in self.references:
            self.references[key] = self.latents(self.pipe, **run)
        sqnr = latent_sqnr_db(self.references[key], self.latents(pipe, **run))
        return {
            "clips": len(self.held),
            "sqnr_mean_db": round(float(sqnr.mean()), 3),
            "sqnr_median_db": round(float(sqnr.median()), 3),
            "sqnr_min_db": round(float(sqnr.min()), 3),
        }

    def quantized(
        self,
        pipe: ptq4adm.TextToAudioPipeline | None = None,
        calibration: Calibration | None = None,
        assignment: Mapping[str, str] | None = None,
        **config: Any,
    ) -> tuple[ptq4adm.TextToAudioPipeline, dict[str, Any]]:
        """A quantized pipeline, and its scheme and size."""
        pipe = pipe or self.load()
        plan = ptq4adm.quantize(
            pipe,
            ptq4adm.QuantConfig(**{**ALONE, **config}),
            calibration or self.calibration(),
            progress=False,
            assignment=assignment,
        )
        size = plan.bytes_after / plan.bytes_before
        return pipe, {"scheme": plan.config.scheme, "size_ratio": round(size, 4)}


Rows = Iterator[dict[str, Any]]


def ranges(bench: Bench) -> Rows:
    """How the scales of activations and of weights are searched."""
    for scheme in ("w4a8", "w8a8"):
        for observer in ("absmax", "squared_error", "p2.4"):
            pipe, about = bench.quantized(scheme=scheme, activation_observer=observer)
            yield {"variant": f"activations {observer}"} | about | bench.quality(pipe)
    for observer in ("absmax", "squared_error", "p2.4"):
        pipe, about = bench.quantized(weight_observer=observer)
        yield {"variant": f"weights {observer}"} | about | bench.quality(pipe)


def buckets(bench: Bench) -> Rows:
    """Timestep buckets: one a step is the most that moving their boundaries could gain."""
    for scheme, observer in (("w4a8", "absmax"), ("w8a8", "absmax"), ("w8a8", "p2.4")):
        for count in (25, 10, 4, 1):
            pipe, about = bench.quantized(
                calibration=bench.calibration(count), scheme=scheme, activation_observer=observer
            )
            name = {"variant": f"{count} buckets", "observer": observer}
            yield name | about | bench.quality(pipe)


def mixed(bench: Bench) -> Rows:
    """Bits under a size budget: predicted and measured output error, and latents."""
    calibration, start = bench.calibration(), time.monotonic()
    inputs, config = _inputs(bench), ptq4adm.QuantConfig(**OBSERVER)
    if bench.sensitivity_file.is_file():
        sensitivity = ptq4adm.Sensitivity.load(bench.sensitivity_file)
        sensitivity.check(bench.pipe.unet)
    else:
        sensitivity = ptq4adm.measure_sensitivity(
            bench.pipe, calibration, inputs, config, pairs=PAIRS
        )
        sensitivity = choose(sensitivity, 0.30)
        sensitivity.save(bench.sensitivity_file)
    seconds = round(time.monotonic() - start, 1)
    named: dict[str, dict[str, str]] = {}
    for scheme in ("w4a8", "w8a8"):
        named[f"all {scheme}"] = {layer.name: scheme for layer in sensitivity.layers}
    for budget in BUDGETS:
        named[f"budget {budget:.2f}"] = ptq4adm.assign_schemes(sensitivity, budget)
    for name, schemes in named.items():
        predicted = predicted_error(sensitivity, schemes)
        measured = output_error(bench.pipe, calibration, inputs, schemes, config, pairs=PAIRS)
        errors = {"predicted_error": f"{predicted:.4e}", "measured_error": f"{measured:.4e}"}
        pipe, about = bench.quantized(assignment=schemes, **OBSERVER)
        yield {"variant": name} | about | bench.quality(pipe) | errors | {"seconds": seconds}
    pipe, about = bench.quantized(overrides=FIRST_AND_LAST, **OBSERVER)
    yield {"variant": "first and last resolution w8a8"} | about | bench.quality(pipe)


def correction(bench: Bench) -> Rows:
    """A line a step and channel after guidance, on held-out prompts."""
    for scheme, overrides in (("w4a8", {}), ("w4a8", FIRST_AND_LAST), ("w8a8", {})):
        pipe, about = bench.quantized(scheme=scheme, overrides=overrides)
        about["layers"] = "first and last resolution w8a8" if overrides else "all"
        start = time.monotonic()
        fitted = ptq4adm.fit_correction(pipe, bench.pipe, seed=5000, progress=False)
        about["seconds"] = round(time.monotonic() - start, 1)
        runs: list[dict[str, Any]] = [{}]
        if scheme == "w4a8" and not overrides:
            runs += OTHER_RUNS
        for run in runs:
            for used in (None, fitted):
                pipe.correction = used
                named = ", ".join(f"{k} {v}" for k, v in run.items()) or "as fitted"
                name = {"variant": "corrected" if used else "plain", "run": named}
                yield name | about | bench.quality(pipe, **run)


def balanced(bench: Bench) -> Rows:
    """Channels balanced between layers, calibrated anew."""
    for name, kinds in (("nothing", ()), ("every exact place", KINDS)):
        pipe = bench.load()
        if kinds:
            ptq4adm.balance(pipe.unet, _inputs(bench), kinds=kinds, progress=False)
        calibration = ptq4adm.calibrate(pipe, seed=1000, progress=False)
        for scheme in ("w4a8", "w8a8"):
            twin = copy.copy(pipe)
            twin.unet = copy.deepcopy(pipe.unet)
            twin, about = bench.quantized(twin, calibration, scheme=scheme, **OBSERVER)
            yield {"variant": name, **OBSERVER} | about | bench.quality(twin)


GROUPS: dict[str, Callable[[Bench], Rows]] = {
    "ranges": ranges,
    "buckets": buckets,
    "correction": correction,
    "mixed": mixed,
    "balance": balanced,
}


def _inputs(bench: Bench) -> ChosenInputs:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "inputs.safetensors"
        ptq4adm.calibrate(
            copy.copy(bench.pipe),
            seed=3000,
            strategy="uniform-steps",
            size=PAIRS,
            inputs=path,
            progress=False,
        )
        return ChosenInputs.load(path)


def main() -> None:
    """Measure, print, append the rows of each group when it is done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=", ".join(GROUPS))
    parser.add_argument("--prompts", type=int, default=20, help="held-out prompts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    results = ROOT / "benchmarks" / "results"
    parser.add_argument("--results", type=Path, default=results)
    parser.add_argument(
        "--sensitivity", type=Path, default=results / "sensitivity-audioldm-tiny.json"
    )
    arguments = parser.parse_args()
    unknown = set(arguments.groups) - set(GROUPS)
    if unknown:
        parser.error(f"unknown groups {', '.join(sorted(unknown))}: there are {', '.join(GROUPS)}")
    torch.set_num_threads(arguments.threads)
    held = [text for _, text in heldout_prompts()]
    held = held[:: max(1, len(held) // arguments.prompts)][: arguments.prompts]
    bench = Bench(held, arguments.sensitivity)
    about = environment(ROOT)
    for name in arguments.groups or GROUPS:
        rows = []
        for row in GROUPS[name](bench):
            print({"group": name} | row, flush=True)
            rows.append(about | {"group": name} | row)
        append_rows(arguments.results / "options.csv", rows)


if __name__ == "__main__":
    main()
