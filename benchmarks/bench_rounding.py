"""What the rounding method does to the W4A8 shipped pipeline: quality, minutes, memory.

    python benchmarks/bench_rounding.py --work build/rounding [--only NAME ...] [--prompts 20]

Inputs are recorded once, at 256 pairs of 12 prompts of the domain's grammar, and kept in the work
folder with the float latents; 64 pairs are the first 64 chosen. Every variant is measured in a
process of its own, for its peak memory. Rows of latent SQNR over held-out prompts of
training/captions.py go to benchmarks/results/rounding.csv.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import rounding_runs as runs
import torch
from bench_options import FIRST_AND_LAST
from rounding_runs import ROOT

import ptq4adm
from ptq4adm.bench import append_rows, environment
from ptq4adm.calibration import Calibration, ChosenInputs
from ptq4adm.rounding.gptq import GptqSettings, gptq

POOL, PAIRS = 12, 256


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
    "gptq, no bias shift": Variant(GptqSettings(has_bias_shift=False)),
    "gptq, inputs of the quantized model": Variant(GptqSettings(is_asymmetric=True)),
    "gptq, inputs of the quantized model, no bias shift": Variant(
        GptqSettings(is_asymmetric=True, has_bias_shift=False)
    ),
    "gptq, order of K": Variant(GptqSettings(act_order=False)),
    "gptq, damp 0.1": Variant(GptqSettings(damp=0.1)),
    "gptq, damp 0.001": Variant(GptqSettings(damp=0.001)),
    "gptq, 256 positions": Variant(GptqSettings(positions=256)),
    "nearest, groups of 64": Variant(None, config={"group_size": 64}),
    "gptq, groups of 64": Variant(GptqSettings(), config={"group_size": 64}),
    "nearest, some layers W8A8": Variant(None, config={"overrides": FIRST_AND_LAST}),
    "gptq, some layers W8A8": Variant(GptqSettings(), config={"overrides": FIRST_AND_LAST}),
    "gptq, 64 pairs, some layers W8A8": Variant(
        GptqSettings(), pairs=64, config={"overrides": FIRST_AND_LAST}
    ),
    "nearest, W8A8": Variant(None, config={"scheme": "w8a8"}),
    "gptq, W8A8": Variant(GptqSettings(), config={"scheme": "w8a8"}),
}


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
    calibration = Calibration.load(work / runs.CALIBRATION)
    pipe = ptq4adm.load_pipeline(ptq4adm.shipped_pipeline_path())
    inputs = rounder = None
    if variant.settings is not None:
        rounder = partial(gptq, settings=variant.settings)
        inputs = ChosenInputs.load(work / runs.INPUTS)
        inputs = first_pairs(inputs, calibration, variant.pairs)
    rounding = "nearest" if inputs is None else "gptq"
    base = {"activation_observer": "absmax", "protect_sensitive": False}
    config = ptq4adm.QuantConfig(rounding=rounding, **{**base, **variant.config})
    start = time.monotonic()
    done = ptq4adm.quantize(
        pipe, config, calibration, inputs=inputs, rounder=rounder, progress=False
    )
    seconds = time.monotonic() - start
    pairs = 0 if inputs is None else len(inputs.pairs)
    return {"variant": name, "pairs": pairs, **runs.outcome(pipe, done, seconds, work, prompts)}


def main() -> None:
    """Record, then measure every variant in its own process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    runs.add_arguments(parser, "rounding", prompts=20)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    held = runs.held_out(arguments.prompts)
    if arguments.here:
        (name,) = arguments.only
        # before the minutes that it takes: the commit is that of the code that was imported
        machine = environment(ROOT)
        row = measure(name, arguments.work, held)
        print(row, flush=True)
        append_rows(arguments.results / "rounding.csv", [{**machine, **row}])
        return
    runs.record(arguments.work, held, pool=POOL, strategy="activation-aware", pairs=PAIRS)
    for name in arguments.only:
        runs.run_alone(__file__, arguments, "--only", name)


if __name__ == "__main__":
    main()
