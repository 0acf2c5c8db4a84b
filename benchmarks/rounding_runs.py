"""What the benchmarks of rounding methods share: recorded inputs, a process a variant, a row."""

from __future__ import annotations

import argparse
import random
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from bench_calibration import heldout_prompts, latents

import ptq4adm
from ptq4adm.evaluation.paired import latent_sqnr_db
from ptq4adm.prompts import AugmentSettings, find_domain
from ptq4adm.prompts.generator import make_pool

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CALIBRATION, INPUTS = "calibration.safetensors", "inputs.safetensors"
_PASSED_ON = ("work", "prompts", "threads", "results")


def add_arguments(parser: argparse.ArgumentParser, work: str, prompts: int) -> None:
    """The options that every such script has; those of a process of its own are hidden."""
    parser.add_argument("--work", type=Path, default=ROOT / "build" / work)
    parser.add_argument("--prompts", type=int, default=prompts, help="held-out prompts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)


def held_out(count: int) -> list[str]:
    """Captions that neither training nor calibration has seen, spread over the classes."""
    held = [text for _, text in heldout_prompts()]
    return held[:: max(1, len(held) // count)][:count]


def record(work: Path, prompts: list[str], *, pool: int, strategy: str, pairs: int) -> None:
    """Inputs, calibration and float latents, into the work folder, unless they are there.

    Args:
        work: the folder.
        prompts: held-out ones.
        pool: prompts of the domain's grammar that pairs are chosen of.
        strategy: how they are chosen.
        pairs: how many.
    """
    if float_latents(work, prompts).is_file():
        return
    work.mkdir(parents=True, exist_ok=True)
    pipe = ptq4adm.load_pipeline(ptq4adm.shipped_pipeline_path())
    candidates = make_pool(find_domain("audioldm-tiny"), AugmentSettings.pool, AugmentSettings.seed)
    calibration = ptq4adm.calibrate(
        pipe,
        random.Random(0).sample(candidates, pool),
        cache=work,
        strategy=strategy,
        size=pairs,
        seed=1000,
        inputs=work / INPUTS,
    )
    calibration.save(work / CALIBRATION)
    torch.save(latents(pipe, prompts), float_latents(work, prompts))


def float_latents(work: Path, prompts: list[str]) -> Path:
    """File of the float model's latents of these prompts; written last."""
    return work / f"float-{len(prompts)}.pt"


def outcome(
    pipe: ptq4adm.TextToAudioPipeline,
    done: ptq4adm.QuantPlan,
    seconds: float,
    work: Path,
    prompts: list[str],
) -> dict[str, Any]:
    """The columns of a quantized pipeline: size, latent SQNR, what it took."""
    # before generation adds to it
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    reference = torch.load(float_latents(work, prompts), weights_only=True)
    sqnr = latent_sqnr_db(reference, latents(pipe, prompts))
    return {
        "size_ratio": round(done.bytes_after / done.bytes_before, 4),
        "clips": len(prompts),
        "sqnr_median_db": round(float(sqnr.median()), 3),
        "sqnr_min_db": round(float(sqnr.min()), 3),
        "sqnr_mean_db": round(float(sqnr.mean()), 3),
        "seconds": round(seconds, 1),
        "peak_mib": round(peak),
        "threads": torch.get_num_threads(),
    }


def run_alone(script: str, arguments: argparse.Namespace, *more: str) -> None:
    """Measure one variant in a process of its own, for its peak memory."""
    command = [sys.executable, script, "--here", *more]
    for option in _PASSED_ON:
        command += [f"--{option}", str(getattr(arguments, option))]
    subprocess.run(command, check=True)
