"""What reconstruction does to the 4-bit shipped pipeline: quality, minutes, memory.

    python benchmarks/bench_reconstruction.py --work build/reconstruction [--only NAME ...]

Inputs are recorded once, 1024 pairs spread over the steps of 64 prompts of the domain's grammar,
and kept in the work folder with the float latents. Every variant is measured in a process of its
own, for its peak memory. Rows of latent SQNR over held-out prompts of training/captions.py, from
noise that no input was recorded with, go to benchmarks/results/reconstruction.csv.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import rounding_runs as runs
import torch
from rounding_runs import RESULTS, ROOT

import ptq4adm
from ptq4adm.bench import append_rows, environment
from ptq4adm.calibration import Calibration, ChosenInputs
from ptq4adm.rounding.reconstruct import ReconstructSettings, reconstruct
from ptq4adm.sensitivity.measure import spread

POOL, PAIRS = 64, 1024
SENSITIVITY = RESULTS / "sensitivity-audioldm-tiny.json"
_ONLY_SCALES = 1e-9  # a rate at which no weight reaches another integer


@dataclass(frozen=True)
class Variant:
    """One thing to measure.

    Attributes:
        settings: None for plain rounding.
        budget: of the integer program; None for 4 bits everywhere.
        pairs: of the inputs.
        config: fields of `QuantConfig`.
    """

    settings: ReconstructSettings | None = field(default_factory=ReconstructSettings)
    budget: float | None = None
    pairs: int = PAIRS
    config: dict[str, Any] = field(default_factory=dict)


DEFAULT = ReconstructSettings()
PROTECTED = {"protect_sensitive": True}  # the default of `quantize`
VARIANTS = {
    "nearest, sensitive layers W8A8": Variant(None, config=PROTECTED),
    "reconstruct, sensitive layers W8A8": Variant(config=PROTECTED),
    "nearest": Variant(None),
    "nearest, budget 0.30": Variant(None, budget=0.30),
    "reconstruct": Variant(),
    "reconstruct, budget 0.30": Variant(budget=0.30),
    "reconstruct, scales alone": Variant(replace(DEFAULT, rate=_ONLY_SCALES)),
    "reconstruct, rate 0.003": Variant(replace(DEFAULT, rate=3e-3)),
    "reconstruct, 60 steps": Variant(replace(DEFAULT, steps=60)),
    "reconstruct, 256 pairs": Variant(pairs=256),
    "nearest, groups of 64": Variant(None, config={"group_size": 64}),
    "reconstruct, groups of 64": Variant(config={"group_size": 64}),
}


def measure(name: str, seed: int, work: Path, prompts: list[str]) -> dict[str, Any]:
    """One variant's row."""
    variant = VARIANTS[name]
    calibration = Calibration.load(work / runs.CALIBRATION)
    pipe = ptq4adm.load_pipeline(ptq4adm.shipped_pipeline_path())
    inputs, rounder, assignment, used = None, None, None, {}
    if variant.settings is not None:
        settings = replace(variant.settings, seed=seed)
        rounder = partial(reconstruct, settings=settings)
        inputs = spread(ChosenInputs.load(work / runs.INPUTS), variant.pairs)
        used = asdict(settings)
    if variant.budget is not None:
        sensitivity = ptq4adm.Sensitivity.load(SENSITIVITY)
        assignment = ptq4adm.assign_schemes(sensitivity, variant.budget)
    rounding = "nearest" if inputs is None else "reconstruct"
    base = {"rounding": rounding, "activation_observer": "p2.4", "protect_sensitive": False}
    fields: dict[str, Any] = {**base, **variant.config}
    config, start = ptq4adm.QuantConfig(**fields), time.monotonic()
    done = ptq4adm.quantize(
        pipe,
        config,
        calibration,
        inputs=inputs,
        assignment=assignment,
        rounder=rounder,
        progress=False,
    )
    seconds = time.monotonic() - start
    pairs = 0 if inputs is None else len(inputs.pairs)
    about = {"variant": name, "pairs": pairs, **used, "seed": seed}
    return about | runs.outcome(pipe, done, seconds, work, prompts)


def main() -> None:
    """Record, then measure every variant in its own process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0], help="of the training")
    runs.add_arguments(parser, "reconstruction", prompts=40)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    held = runs.held_out(arguments.prompts)
    if arguments.here:
        # before the minutes that it takes: the commit is that of the code that was imported
        machine = environment(ROOT)
        row = measure(arguments.only[0], arguments.seeds[0], arguments.work, held)
        print(row, flush=True)
        append_rows(arguments.results / "reconstruction.csv", [{**machine, **row}])
        return
    runs.record(arguments.work, held, pool=POOL, strategy="uniform-steps", pairs=PAIRS)
    for name in arguments.only:
        for seed in arguments.seeds if VARIANTS[name].settings else [0]:
            runs.run_alone(__file__, arguments, "--only", name, "--seeds", str(seed))


if __name__ == "__main__":
    main()
