"""What the choice of calibration prompts does to the shipped pipeline in W4A8, at equal size.

    python benchmarks/bench_prompt_quality.py [--prompts 40] [--threads 2]

Sets of 16: the listed ones, three random draws from the pool, three greedy choices (8 seeds, and 8
of a pool of their own). Each calibrates the same model, which then makes the same held-out prompts
of training/captions.py from the same noise as the float model. Rows of latent SQNR go to
benchmarks/results/prompts-quality.csv.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

import torch
from torch import Tensor

import ptq4adm
from ptq4adm.bench import append_rows, environment
from ptq4adm.calibration import default_prompts
from ptq4adm.evaluation.paired import latent_sqnr_db
from ptq4adm.prompts import AugmentSettings, augment_prompts, find_domain
from ptq4adm.prompts.generator import make_pool

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "training"))
from captions import heldout_prompts  # noqa: E402 - a script folder, not a package

SIZE, REPEATS, BATCH = 16, 3, 10
# ranges decide most where nothing is clipped
CONFIG = ptq4adm.QuantConfig(activation_observer="absmax", protect_sensitive=False)


def prompt_sets(pipe: ptq4adm.TextToAudioPipeline) -> list[tuple[str, int, list[str]]]:
    """Choice, its repeat, and the prompts."""
    pool = make_pool(find_domain("audioldm-tiny"), AugmentSettings.pool, AugmentSettings.seed)
    sets = [("listed", 0, default_prompts())]
    for i in range(REPEATS):
        sets.append(("random", i, random.Random(i).sample(pool, SIZE)))
        found = augment_prompts(None, SIZE, pipe=pipe, settings=AugmentSettings(seed=i))
        sets.append(("greedy", i, list(found.prompts)))
    return sets


def latents(pipe: ptq4adm.TextToAudioPipeline, prompts: list[str]) -> Tensor:
    """[B, C, H, W]; prompt i starts from the noise of seed i."""
    parts = [
        pipe.denoise(pipe.encode_prompts(prompts[i : i + BATCH]), seed=i)
        for i in range(0, len(prompts), BATCH)
    ]
    return torch.cat(parts)


def main() -> None:
    """Measure, print, append the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    held = [text for _, text in heldout_prompts()]
    held = held[:: max(1, len(held) // arguments.prompts)][: arguments.prompts]
    folder = ptq4adm.shipped_pipeline_path()
    float_pipe = ptq4adm.load_pipeline(folder)
    reference = latents(float_pipe, held)
    machine, rows = environment(ROOT), []
    for choice, repeat, prompts in prompt_sets(float_pipe):
        calibration = ptq4adm.calibrate(float_pipe, prompts, seed=1000)
        pipe = ptq4adm.load_pipeline(folder)
        ptq4adm.quantize(pipe, CONFIG, calibration)
        sqnr = latent_sqnr_db(reference, latents(pipe, held))
        row = {"choice": choice, "repeat": repeat, "prompts": len(prompts), "clips": len(held)}
        row |= {
            "sqnr_mean_db": round(float(sqnr.mean()), 3),
            "sqnr_median_db": round(float(sqnr.median()), 3),
            "sqnr_min_db": round(float(sqnr.min()), 3),
        }
        print(row, flush=True)
        rows.append({**machine, **row})
    append_rows(arguments.results / "prompts-quality.csv", rows)


if __name__ == "__main__":
    main()
