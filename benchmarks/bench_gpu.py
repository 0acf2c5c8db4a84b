"""Every product, norm and gate of the models on a GPU, beside PyTorch in float16.

    python benchmarks/bench_gpu.py [--models tango ...] [--quick] [--results DIR] [--deadline 180]
    TRITON_INTERPRET=1 python benchmarks/bench_gpu.py --rehearse --results /tmp/rehearsal

`make gpu` runs this among other things. Rows go to benchmarks/results/gpu-*.csv by default; a
rehearsal, which needs no GPU, has to name another folder.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from ptq4adm.bench.gpu_backends import BACKENDS
from ptq4adm.bench.gpu_environment import check_results
from ptq4adm.bench.gpu_faults import exit_code
from ptq4adm.bench.gpu_kernels import GpuJob, run_gpu_kernels
from ptq4adm.bench.gpu_report import format_gpu, save_gpu
from ptq4adm.bench.gpu_shapes import GPU_KINDS
from ptq4adm.bench.shapes import MODELS

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Measure and save the rows; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--kinds", nargs="*", default=list(GPU_KINDS), choices=GPU_KINDS)
    parser.add_argument("--bits", nargs="*", type=int, default=[4, 8], choices=(4, 8))
    parser.add_argument(
        "--backends", nargs="*", default=[], choices=BACKENDS, help="(default: all)"
    )
    parser.add_argument("--quick", action="store_true", help="two shapes of each kind")
    parser.add_argument("--rehearse", action="store_true", help="toy shapes, no GPU")
    parser.add_argument("--seconds", type=float, default=None, help="timing of one shape")
    parser.add_argument("--deadline", type=float, default=None, help="seconds of the whole")
    parser.add_argument("--configs", type=Path, default=None, help="folder of measured tiles")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    check_results(arguments.results, is_rehearsal=arguments.rehearse)
    job = GpuJob(
        models=tuple(arguments.models),
        kinds=tuple(arguments.kinds),
        bits=tuple(arguments.bits),
        backends=tuple(arguments.backends),
        is_quick=arguments.quick,
        is_rehearsal=arguments.rehearse,
        seconds=arguments.seconds,
        deadline=arguments.deadline,
        configs=arguments.configs,
    )
    result = run_gpu_kernels(job, save=partial(save_gpu, arguments.results))
    print(format_gpu(result))
    print(f"\nrows in {arguments.results}")
    return exit_code(result)


if __name__ == "__main__":
    sys.exit(main())
