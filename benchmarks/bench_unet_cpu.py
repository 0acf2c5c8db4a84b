"""One step of AudioLDM-S and TANGO on the CPU: W4A8, PyTorch float32, OpenVINO float32 and int8.

    python benchmarks/bench_unet_cpu.py [--models audioldm-s tango] [--isa native] [--rounds 5]

Random weights, batch 2 (guidance), latents of 10.24 s. Every variant has a process of its own, so
TANGO needs about 16 GB of memory and 5 GB of disk for the converted models (`--cache` keeps them).
Rows go to benchmarks/results/cpu-unet.csv.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ptq4adm.bench.process import ISAS
from ptq4adm.bench.rows import environment
from ptq4adm.bench.shapes import MODELS
from ptq4adm.bench.store import UNET, save_result
from ptq4adm.bench.unet import TOLERANCES, UNetJob, format_unet, run_unet

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Measure every model and save the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models", nargs="*", default=["audioldm-s", "tango"], choices=list(MODELS)
    )
    parser.add_argument("--variants", nargs="*", default=list(TOLERANCES), choices=list(TOLERANCES))
    parser.add_argument("--isa", nargs="*", default=["native"], choices=ISAS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--bits", type=int, default=4, choices=(4, 8))
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each variant")
    parser.add_argument("--cache", type=Path, default=None, help="folder for converted models")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    for isa in arguments.isa:
        for model in arguments.models:
            job = UNetJob(
                model=model,
                variants=tuple(arguments.variants),
                isa=isa,
                threads=arguments.threads,
                rounds=arguments.rounds,
                bits=arguments.bits,
                cache=arguments.cache,
            )
            result = run_unet(job)
            result["run"]["commit"] = environment(ROOT)["commit"]
            print(format_unet(result))
            saved = save_result(arguments.results, result["run"], {UNET: result["rows"]})
            print(f"\nsaved as {saved}\n")


if __name__ == "__main__":
    main()
