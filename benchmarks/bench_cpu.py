"""Every layer shape of AudioLDM-S, AudioLDM-L, TANGO and Make-An-Audio on the CPU, beside peers.

    python benchmarks/bench_cpu.py [--isa native avx2] [--threads 2] [--models ...] [--quick]

`make bench` installs the peers and runs this. Rows go to benchmarks/results/cpu-*.csv, from which
benchmarks/tables.py writes README.md and docs/benchmarks-cpu.md, and benchmarks/roofline.py draws.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ptq4adm.bench.kernels import KernelJob, run_kernels
from ptq4adm.bench.process import ISAS
from ptq4adm.bench.report import format_result
from ptq4adm.bench.rows import environment
from ptq4adm.bench.shapes import MODELS
from ptq4adm.bench.store import KERNELS, PEAKS, save_result

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Measure with each instruction set and save the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isa", nargs="*", default=list(ISAS), choices=ISAS)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--bits", type=int, default=4, choices=(4, 8))
    parser.add_argument("--seconds", type=float, default=None, help="timing of one shape")
    parser.add_argument("--quick", action="store_true", help="two shapes of each kind")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    for isa in arguments.isa:
        job = KernelJob(
            models=tuple(arguments.models),
            isa=isa,
            threads=arguments.threads,
            bits=arguments.bits,
            is_quick=arguments.quick,
            seconds=arguments.seconds,
        )
        result = run_kernels(job)
        result["run"]["commit"] = environment(ROOT)["commit"]
        print(format_result(result))
        tables = {KERNELS: result["rows"], PEAKS: result["peaks"]}
        print(f"\nsaved as {save_result(arguments.results, result['run'], tables)}\n")


if __name__ == "__main__":
    main()
