"""What the default job takes: `ptq4adm quantize MODEL`, from the published files to a saved folder.

    python benchmarks/bench_quantize.py shipped
    python benchmarks/real_checkpoints.py audioldm-s --work build/real --stage write
    python benchmarks/bench_quantize.py build/real/audioldm-s/audioldm-s-full.ckpt --name audioldm-s

Each model in a process of its own, as a user runs it: loading, calibration on the listed prompts,
quantization, saving. The row goes to benchmarks/results/quantize.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from ptq4adm.bench import append_rows, environment

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Run the job, append its row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="what ptq4adm quantize takes")
    parser.add_argument("--name", help="of the row (default: MODEL)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    machine = environment(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ptq4adm", "quantize", arguments.model]
        command += ["-o", f"{folder}/out", "--json", "--threads", str(arguments.threads)]
        start = time.monotonic()
        with (Path(folder) / "result.json").open("w+") as output:
            job = subprocess.Popen(command, stdout=output)
            # of this one child: RUSAGE_CHILDREN would be the largest of all
            _, status, usage = os.wait4(job.pid, 0)
            seconds = time.monotonic() - start
            if status:
                code = os.waitstatus_to_exitcode(status)
                raise SystemExit(f"{' '.join(command)}: ended with {code}")
            output.seek(0)
            result = json.load(output)
    row = {
        "model": arguments.name or arguments.model,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mb": round(usage.ru_maxrss * 1024 / 1e6),
        "layers": sum(result["layers"].values()),
        "unet_mb_float16": round(result["unet_bytes_float16"] / 1e6, 2),
        "unet_mb": round(result["unet_bytes"] / 1e6, 2),
    }
    print(row)
    append_rows(arguments.results / "quantize.csv", [{**machine, **row}])


if __name__ == "__main__":
    main()
