"""What reconstruction does to the 4-bit shipped pipeline: quality, minutes, memory.

    python benchmarks/bench_reconstruction.py --work build/reconstruction [--only NAME ...]

Inputs are recorded once, 1024 pairs spread over the steps of 64 prompts of the domain's grammar,
and kept in the work folder with the float latents. Every variant is measured in a process of its
own, for its peak memory. Rows of latent SQNR over held-out prompts of training/captions.py, from
noise that no input was recorded with, go to benchmarks/results/reconstruction.csv.
"""

from __future__ import annotations

import argparse
import random
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_calibration import heldout_prompts, latents

import ptq4adm
from ptq4adm.bench import append_rows, environment
from ptq4adm.calibration import Calibration, ChosenInputs
from ptq4adm.evaluation.paired import latent_sqnr_db
from ptq4adm.prompts import AugmentSettings, find_domain
from ptq4adm.prompts.generator import make_pool
from ptq4adm.rounding.methods import ROUNDERS
from ptq4adm.rounding.reconstruct import ReconstructSettings, reconstruct
from ptq4adm.sensitivity.measure import spread

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
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


def record(work: Path, prompts: list[str]) -> None:
    """Inputs, calibration and float latents, into the work folder."""
    work.mkdir(parents=True, exist_ok=True)
    pipe = ptq4adm.load_pipeline(ptq4adm.shipped_pipeline_path())
    candidates = make_pool(find_domain("audioldm-tiny"), AugmentSettings.pool, AugmentSettings.seed)
    calibration = ptq4adm.calibrate(
        pipe,
        random.Random(0).sample(candidates, POOL),
        cache=work,
        strategy="uniform-steps",
        size=PAIRS,
        seed=1000,
        inputs=work / "inputs.safetensors",
    )
    calibration.save(work / "calibration.safetensors")
    torch.save(latents(pipe, prompts), work / f"float-{len(prompts)}.pt")


def measure(name: str, seed: int, work: Path, prompts: list[str]) -> dict[str, Any]:
    """One variant's row."""
    variant = VARIANTS[name]
    calibration = Calibration.load(work / "calibration.safetensors")
    pipe = ptq4adm.load_pipeline(ptq4adm.shipped_pipeline_path())
    inputs, assignment, used = None, None, {}
    if variant.settings is not None:
        settings = replace(variant.settings, seed=seed)
        ROUNDERS["reconstruct"] = partial(reconstruct, settings=settings)
        inputs = spread(ChosenInputs.load(work / "inputs.safetensors"), variant.pairs)
        used = asdict(settings)
    if variant.budget is not None:
        sensitivity = ptq4adm.Sensitivity.load(SENSITIVITY)
        assignment = ptq4adm.assign_schemes(sensitivity, variant.budget)
    rounding = "nearest" if inputs is None else "reconstruct"
    base = {"rounding": rounding, "activation_observer": "p2.4", "protect_sensitive": False}
    fields: dict[str, Any] = {**base, **variant.config}
    config, start = ptq4adm.QuantConfig(**fields), time.monotonic()
    done = ptq4adm.quantize(
        pipe, config, calibration, inputs=inputs, assignment=assignment, progress=False
    )
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    reference = torch.load(work / f"float-{len(prompts)}.pt", weights_only=True)
    sqnr = latent_sqnr_db(reference, latents(pipe, prompts))
    return {
        "variant": name,
        "pairs": 0 if inputs is None else len(inputs.pairs),
        **used,
        "seed": seed,
        "size_ratio": round(done.bytes_after / done.bytes_before, 4),
        "clips": len(prompts),
        "sqnr_median_db": round(float(sqnr.median()), 3),
        "sqnr_min_db": round(float(sqnr.min()), 3),
        "sqnr_mean_db": round(float(sqnr.mean()), 3),
        "seconds": round(seconds, 1),
        "peak_mib": round(peak),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Record, then measure every variant in its own process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "reconstruction")
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0], help="of the training")
    parser.add_argument("--prompts", type=int, default=40, help="held-out prompts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    held = [text for _, text in heldout_prompts()]
    held = held[:: max(1, len(held) // arguments.prompts)][: arguments.prompts]
    if arguments.here:
        # before the minutes that it takes: the commit is that of the code that was imported
        machine = environment(ROOT)
        row = measure(arguments.only[0], arguments.seeds[0], arguments.work, held)
        print(row, flush=True)
        append_rows(arguments.results / "reconstruction.csv", [{**machine, **row}])
        return
    if not (arguments.work / f"float-{len(held)}.pt").is_file():
        record(arguments.work, held)
    for name in arguments.only:
        for seed in arguments.seeds if VARIANTS[name].settings else [0]:
            command = [sys.executable, __file__, "--here", "--only", name, "--seeds", str(seed)]
            for option in ("work", "prompts", "threads", "results"):
                command += [f"--{option}", str(getattr(arguments, option))]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
