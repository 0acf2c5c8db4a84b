"""What the rounding method does to the W4A8 shipped pipeline: quality, minutes, memory.

    python benchmarks/bench_rounding.py --work build/rounding [--only NAME ...] [--prompts 20]

Inputs are recorded once, at 256 pairs of 12 prompts of the domain's grammar, and kept in the work
folder with the float latents; 64 pairs are the first 64 chosen. Every variant is measured in a
process of its own, for its peak memory. Rows of latent SQNR over held-out prompts of
training/captions.py go to benchmarks/results/rounding.csv.
"""

from __future__ import annotations

import argparse
import random
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, field
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
from ptq4adm.rounding.gptq import GptqSettings, gptq
from ptq4adm.rounding.methods import ROUNDERS

ROOT = Path(__file__).resolve().parents[1]
POOL, PAIRS = 12, 256
# the layers whose 8 bits gain most for their bytes
EIGHT_BITS = {
    "*.conv_shortcut": "w8a8",
    "up_blocks.2.resnets.*": "w8a8",
    "down_blocks.0.*": "w8a8",
}


@dataclass(frozen=True)
class Variant:
    """One thing to measure.

    Attributes:
        settings: of GPTQ; None for plain rounding.
        pairs: of the inputs.
        config: fields of `QuantConfig`.
    """

    settings: GptqSettings | None
    pairs: int = PAIRS
    config: dict[str, Any] = field(default_factory=dict)


VARIANTS = {
    "nearest": Variant(None),
    "gptq": Variant(GptqSettings()),
    "gptq, 64 pairs": Variant(GptqSettings(), pairs=64),
    "gptq, inputs of the float model": Variant(GptqSettings(is_asymmetric=False)),
    "gptq, order of K": Variant(GptqSettings(act_order=False)),
    "gptq, damp 0.1": Variant(GptqSettings(damp=0.1)),
    "gptq, damp 0.001": Variant(GptqSettings(damp=0.001)),
    "gptq, weighted scales": Variant(GptqSettings(scales="weighted")),
    "gptq, bias shift": Variant(GptqSettings(has_bias_shift=True)),
    "gptq, bias shift, 64 pairs": Variant(GptqSettings(has_bias_shift=True), pairs=64),
    "gptq, 64 MiB of moments": Variant(GptqSettings(budget=1 << 26)),
    "gptq, 256 positions": Variant(GptqSettings(positions=256)),
    "nearest, groups of 64": Variant(None, config={"group_size": 64}),
    "gptq, groups of 64": Variant(GptqSettings(), config={"group_size": 64}),
    "nearest, some layers W8A8": Variant(None, config={"overrides": EIGHT_BITS}),
    "gptq, some layers W8A8": Variant(GptqSettings(), config={"overrides": EIGHT_BITS}),
    "gptq, 64 pairs, some layers W8A8": Variant(
        GptqSettings(), pairs=64, config={"overrides": EIGHT_BITS}
    ),
    "nearest, W8A8": Variant(None, config={"scheme": "w8a8"}),
    "gptq, W8A8": Variant(GptqSettings(), config={"scheme": "w8a8"}),
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
        strategy="activation-aware",
        size=PAIRS,
        seed=1000,
        inputs=work / "inputs.safetensors",
    )
    calibration.save(work / "calibration.safetensors")
    torch.save(latents(pipe, prompts), work / f"float-{len(prompts)}.pt")


def first_pairs(inputs: ChosenInputs, calibration: Calibration, count: int) -> ChosenInputs:
    """The inputs of the pairs that were chosen first."""
    assert calibration.selection is not None
    wanted = set(calibration.selection.pairs[:count])
    kept = torch.tensor([tuple(pair) in wanted for pair in inputs.pairs.tolist()])
    arguments = {name: tensor[kept] for name, tensor in inputs.arguments.items()}
    return ChosenInputs(
        inputs.fingerprint,
        inputs.pairs[kept],
        inputs.timesteps[kept],
        inputs.sample[kept],
        arguments,
        inputs.constants,
    )


def measure(name: str, work: Path, prompts: list[str]) -> dict[str, Any]:
    """One variant's row."""
    variant = VARIANTS[name]
    calibration = Calibration.load(work / "calibration.safetensors")
    pipe = ptq4adm.load_pipeline(ptq4adm.shipped_pipeline_path())
    inputs = None
    if variant.settings is not None:
        ROUNDERS["gptq"] = partial(gptq, settings=variant.settings)
        inputs = ChosenInputs.load(work / "inputs.safetensors")
        inputs = first_pairs(inputs, calibration, variant.pairs)
    rounding = "nearest" if inputs is None else "gptq"
    base = {"activation_observer": "absmax", "protect_sensitive": False}
    config = ptq4adm.QuantConfig(rounding=rounding, **{**base, **variant.config})
    start = time.monotonic()
    done = ptq4adm.quantize(pipe, config, calibration, inputs=inputs, progress=False)
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    reference = torch.load(work / f"float-{len(prompts)}.pt", weights_only=True)
    sqnr = latent_sqnr_db(reference, latents(pipe, prompts))
    return {
        "variant": name,
        "pairs": 0 if inputs is None else len(inputs.pairs),
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
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "rounding")
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--prompts", type=int, default=20, help="held-out prompts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    held = [text for _, text in heldout_prompts()]
    held = held[:: max(1, len(held) // arguments.prompts)][: arguments.prompts]
    if arguments.here:
        (name,) = arguments.only
        # before the minutes that it takes: the commit is that of the code that was imported
        machine = environment(ROOT)
        row = measure(name, arguments.work, held)
        print(row, flush=True)
        append_rows(arguments.results / "rounding.csv", [{**machine, **row}])
        return
    if not (arguments.work / f"float-{len(held)}.pt").is_file():
        record(arguments.work, held)
    for name in arguments.only:
        command = [sys.executable, __file__, "--here", "--only", name]
        for option in ("work", "prompts", "threads", "results"):
            command += [f"--{option}", str(getattr(arguments, option))]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
