"""Draw benchmarks/results/roofline-cpu.png: kernels under the measured ceilings of the machine.

    python benchmarks/roofline.py

Every point is one layer shape. Its intensity counts each operand once: float32 activations read,
weights as they are stored, the output as it is written. Points above the slanted line work out of
the caches: the line is the bandwidth of memory.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl

from ptq4adm.bench.ours import OURS
from ptq4adm.bench.report import by_shape
from ptq4adm.bench.store import KERNELS, PEAKS, read_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

mpl.use("agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, str]

# bytes of a weight and of an output element
VARIANTS = {
    OURS: ("ptq4adm W4A8", "#d62728", 0.5, 4),
    "fbgemm-int8": ("FBGEMM int8", "#1f77b4", 1, 1),
    "torch-fp32": ("PyTorch float32", "#7f7f7f", 4, 4),
}
MARKERS = {"conv3x3": "o", "conv1x1": "s", "linear": "^"}
CEILINGS = {
    "avx2": {"fma_avx2": "float32 FMA, AVX2", "maddubs_avx2": "int8 vpmaddubsw, AVX2"},
    "native": {
        "fma_avx512": "float32 FMA, AVX-512",
        "maddubs_avx2": "int8 vpmaddubsw, AVX2",
        "dpbusd_512": "int8 vpdpbusd, AVX-512 VNNI",
    },
}
TITLES = {"avx2": "AVX2", "native": "all instructions"}
FLOAT_BYTES = 4


def intensity(row: Row, weight_bytes: float, output_bytes: int) -> float:
    """Operations a byte of a layer's operands.

    The input of a convolution is about M x C values, K = 9 C or C; strides and enlargement change
    that by 4, which the picture does not need.
    """
    M, N, K = (int(row[name]) for name in "MNK")
    channels = K // 9 if row["kind"].startswith("conv3x3") else K
    operand_bytes = FLOAT_BYTES * M * channels + weight_bytes * N * K + output_bytes * M * N
    return 2.0 * M * N * K / operand_bytes


def draw(axes: Axes, isa: str, rows: list[Row], peaks: dict[str, float]) -> None:
    """One instruction set's ceilings and points."""
    low, high = 4.0, 2000.0
    for kind, label in CEILINGS[isa].items():
        if kind not in peaks:
            continue
        knee = peaks[kind] / peaks["copy"]
        axes.plot([low, knee, high], [low * peaks["copy"], peaks[kind], peaks[kind]], "k-", lw=0.8)
        axes.annotate(f"{label}: {peaks[kind]:.0f}", (low * 1.1, peaks[kind] * 1.03), fontsize=7)
    for variant, (label, colour, weight_bytes, output_bytes) in VARIANTS.items():
        for kind, marker in MARKERS.items():
            found = [
                v[variant]
                for v in by_shape([r for r in rows if r["kind"].startswith(kind)]).values()
                if variant in v
            ]
            axes.scatter(
                [intensity(row, weight_bytes, output_bytes) for row in found],
                [
                    2e-6 * int(r["M"]) * int(r["N"]) * int(r["K"]) / float(r["median_ms"])
                    for r in found
                ],
                s=14,
                marker=marker,
                color=colour,
                alpha=0.6,
                linewidths=0,
                label=f"{label}, {kind}",
            )
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(low, high),
        xlabel="operations a byte",
        title=f"{TITLES[isa]}, {rows[0]['threads']} threads",
    )
    axes.grid(True, which="major", lw=0.3)


def main() -> None:
    """Draw the newest rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    results = parser.parse_args().results
    kernels = [row for row in read_table(results, KERNELS) if row["bits"] == "4"]
    if not kernels:
        raise SystemExit(f"{results}: no rows of {KERNELS}; run benchmarks/bench_cpu.py first")
    threads = max((row["threads"] for row in kernels), key=int)
    isas = [isa for isa in CEILINGS if any(row["isa"] == isa for row in kernels)]
    figure, panels = plt.subplots(
        1, len(isas), figsize=(5.2 * len(isas), 4.9), sharey=True, squeeze=False
    )
    for axes, isa in zip(panels[0], isas, strict=True):
        rows = [row for row in kernels if row["isa"] == isa and row["threads"] == threads]
        peaks = {
            row["peak"]: float(row["giga_a_second"])
            for row in read_table(results, PEAKS)
            if row["isa"] == isa and row["threads"] == threads
        }
        draw(axes, isa, rows, peaks)
    panels[0][0].set_ylabel("10^9 operations a second")
    figure.suptitle(f"{kernels[-1]['device']}: every layer shape of the models", fontsize=10)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, fontsize=7, ncols=len(VARIANTS), loc="lower center", frameon=False
    )
    figure.tight_layout(rect=(0, 0.12, 1, 1))  # the legend stands below
    target = results / "roofline-cpu.png"
    figure.savefig(target, dpi=110, metadata={"Software": None})
    print(f"{target}: {target.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
