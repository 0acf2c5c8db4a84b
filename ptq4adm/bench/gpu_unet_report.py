"""What a benchmark of whole steps on a GPU says."""

from __future__ import annotations

from typing import Any

from ptq4adm.bench.gpu_faults import failed_lines
from ptq4adm.bench.gpu_report import columns, describe_run, variant_label
from ptq4adm.bench.macs import describe_shares


def format_unets(result: dict[str, Any]) -> str:
    """The text that `ptq4adm bench --device cuda --unet` prints."""
    table = [
        [
            "model",
            "variant",
            "ms",
            "x fp16 graph",
            "weights MB",
            "peak MB",
            "error",
            "build s",
            "kept",
        ]
    ]
    for row in result["rows"]:
        if row["failed"] or row.get("skipped"):
            continue
        table.append(
            [
                row["model"],
                variant_label(row),
                f"{row['ms']:.2f}",
                "" if row["ratio_fp16_graph"] == "" else f"{row['ratio_fp16_graph']:.2f}",
                f"{row['weights_mb']:.0f}",
                f"{row['peak_mb']:.0f}",
                f"{row['error']:.2g}",
                f"{row['build_s']:.0f}",
                str(row["hoisted"]),
            ]
        )
    lines = [describe_run(result["run"]), "", *columns(table, left=2), ""]
    lines += [
        f"{row['model']} {variant_label(row)}: {row['graph_breaks']} graph breaks"
        for row in result["rows"]
        if row.get("graph_breaks", "") != ""
    ]
    lines += [
        f"{row['model']} {variant_label(row)}: multiply-adds with weights: {shares}"
        for row in result["rows"]
        if (shares := describe_shares(row))
    ]
    lines += [f"not measured: {name}: {why}" for name, why in result["missing"].items()]
    lines += [f"no time for: {model}" for model in result["left_out"]]
    lines += [f"not compiled ahead: {reason}" for reason in result["uncompiled"]]
    lines += failed_lines(result["failed"])
    return "\n".join(lines)
