"""What the choice of (prompt, step) pairs does to the quantized shipped pipeline, at equal size.

    python benchmarks/bench_calibration.py --seed 0 [--size 64] [--pool 48] [--prompts 20]
    python benchmarks/bench_calibration.py --seed 0 --ablations

A seed draws a pool of prompts from the domain's grammar, the noise they are run with, and the
choices. Every strategy chooses as many pairs of the same signatures; "all pairs" records every one.
Each calibration quantizes the model, which makes held-out prompts of training/captions.py from the
noise of the float model. Rows of latent SQNR, and of what was covered, go to
benchmarks/results/calibration.csv.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ptq4adm
from ptq4adm.bench import append_rows, environment
from ptq4adm.calibration import STRATEGIES, Calibration, SelectionSettings
from ptq4adm.calibration.strategies import covering
from ptq4adm.evaluation.paired import latent_sqnr_db
from ptq4adm.prompts import AugmentSettings, find_domain
from ptq4adm.prompts.generator import make_pool

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "training"))
from captions import heldout_prompts  # noqa: E402 - a script folder, not a package

BATCH = 10
ALL = "all pairs"
# W8A8 beside W4A8: its error is the activations' alone, which is what pairs decide
CONFIGS = (("w4a8", "absmax"), ("w8a8", "absmax"), ("w8a8", "squared_error"))


def choices(size: int, seed: int, *, is_ablation: bool) -> dict[str, SelectionSettings | None]:
    """What is compared, by name."""
    if not is_ablation:
        named = {name: SelectionSettings(name, size, seed) for name in STRATEGIES}
        return {ALL: None, **named}
    ours = "activation-aware"
    return {
        f"{ours}, one set of bins": SelectionSettings(ours, size, seed, by_bucket=False),
        f"{ours}, 99.9th percentile": SelectionSettings(ours, size, seed, statistic="p999"),
        f"{ours}, covers only": SelectionSettings(covering(0.0), size, seed),
        f"{ours}, matches only": SelectionSettings(covering(1.0), size, seed),
    }


def latents(pipe: ptq4adm.TextToAudioPipeline, prompts: list[str]) -> Tensor:
    """[B, C, H, W]; prompt i starts from the noise of seed i."""
    parts = [
        pipe.denoise(pipe.encode_prompts(prompts[i : i + BATCH]), seed=i)
        for i in range(0, len(prompts), BATCH)
    ]
    return torch.cat(parts)


def clipped_share(calibration: Calibration, everything: Calibration) -> float:
    """Share of (layer, bucket) ranges that are less than 0.9 of those of all pairs."""
    low = count = 0
    for name in everything.records:
        mine, full = calibration.scales(name, "absmax"), everything.scales(name, "absmax")
        if mine is not None and full is not None:
            low += int((mine < 0.9 * full).sum())
            count += full.numel()
    return low / count


def main() -> None:
    """Measure, print, append the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--pool", type=int, default=48, help="prompts that pairs are chosen of")
    parser.add_argument("--prompts", type=int, default=20, help="held-out prompts")
    parser.add_argument("--ablations", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    held = [text for _, text in heldout_prompts()]
    held = held[:: max(1, len(held) // arguments.prompts)][: arguments.prompts]
    candidates = make_pool(find_domain("audioldm-tiny"), AugmentSettings.pool, AugmentSettings.seed)
    pool = random.Random(arguments.seed).sample(candidates, arguments.pool)
    folder = ptq4adm.shipped_pipeline_path()
    float_pipe = ptq4adm.load_pipeline(folder)
    reference, machine = latents(float_pipe, held), environment(ROOT)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as cache:
        run: dict[str, Any] = {"seed": 1000 * (arguments.seed + 1), "progress": False}
        everything = ptq4adm.calibrate(float_pipe, pool, cache=cache, **run)
        picked = choices(arguments.size, arguments.seed, is_ablation=arguments.ablations)
        for name, settings in picked.items():
            start = time.monotonic()
            calibration = everything
            if settings is not None:
                calibration = ptq4adm.calibrate(
                    float_pipe, pool, cache=cache, strategy=settings, **run
                )
            seconds = time.monotonic() - start
            chosen = calibration.selection
            every = len(pool) * calibration.meta.steps
            about = {"strategy": name, "seed": arguments.seed, "pool_prompts": len(pool)}
            about |= {"pairs": every if chosen is None else len(chosen.pairs)}
            about |= {"coverage": 1.0 if chosen is None else round(chosen.coverage, 4)}
            about |= {"distance": 0.0 if chosen is None else round(chosen.distance, 4)}
            about |= {"clipped_share": round(clipped_share(calibration, everything), 4)}
            about |= {"seconds": round(seconds, 1)}
            for scheme, observer in CONFIGS:
                pipe = ptq4adm.load_pipeline(folder)
                config = ptq4adm.QuantConfig(
                    scheme=scheme, activation_observer=observer, protect_sensitive=False
                )
                ptq4adm.quantize(pipe, config, calibration, progress=False)
                sqnr = latent_sqnr_db(reference, latents(pipe, held))
                row = {**about, "scheme": scheme, "observer": observer, "clips": len(held)}
                row |= {"sqnr_mean_db": round(float(sqnr.mean()), 3)}
                row |= {"sqnr_median_db": round(float(sqnr.median()), 3)}
                row |= {"sqnr_min_db": round(float(sqnr.min()), 3)}
                print(row, flush=True)
                rows.append({**machine, **row})
    append_rows(arguments.results / "calibration.csv", rows)


if __name__ == "__main__":
    main()
