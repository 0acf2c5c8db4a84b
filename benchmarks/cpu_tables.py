"""Tables of the CPU benchmark, from the rows that ptq4adm.bench.store keeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ptq4adm.bench.ours import MATMUL, OURS, QUANTIZE
from ptq4adm.bench.report import GROUPS, by_shape, group_ratios, peer_names, step_milliseconds
from ptq4adm.bench.store import KERNELS, PEAKS, UNET, read_table
from ptq4adm.bench.unet import DYNAMIC, FLOAT, STATIC

Row = dict[str, str]

NOT_MEASURED = "Not measured yet: `make bench-full` writes the rows."
_WIDER = "†"
_ISA_TITLES = {"avx2": "AVX2", "native": "all instructions"}


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]], note: str) -> str:
    """A table with a note below it."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join([*("| " + " | ".join(row) + " |" for row in rows), "", note])


def kernel_table(results: Path) -> str:
    """Ratios by group of layers, one line a group and instruction set, one column a peer."""
    runs = _configurations(read_table(results, KERNELS))
    if not runs:
        return NOT_MEASURED
    peers = list(dict.fromkeys(name for rows in runs.values() for name in peer_names(rows)))
    lines = []
    for group in GROUPS:
        for (isa, threads), rows in runs.items():
            ratios = {r["peer"]: r for r in group_ratios(rows) if r["group"] == group}
            if not ratios:
                continue
            count = max(int(ratio["shapes"]) for ratio in ratios.values())
            title = f"{group} ({count}), {_ISA_TITLES[isa]}, {threads} threads"
            cells = [_ratio(ratios[peer], isa) if peer in ratios else "" for peer in peers]
            lines.append([title, *cells])
    note = (
        "Median time of the peer over ours, geometric mean over the shapes (least): above 1 this "
        "package is faster. Quantization of the activations is inside every int8 and int4 time. "
        f"{_WIDER} the library cannot be kept from AVX-512, which was sampled while it ran. "
        f"`benchmarks/bench_cpu.py`; {_where(runs)}. Every shape: [docs/benchmarks-cpu.md]"
        "(docs/benchmarks-cpu.md)."
    )
    return markdown(["layers (shapes)", *peers], lines, note)


def unet_table(results: Path) -> str:
    """Whole steps: seconds, ratio to float32, memory."""
    rows = read_table(results, UNET)
    if not rows:
        return NOT_MEASURED
    lines = []
    for row in rows:
        base = _same(rows, row, FLOAT)
        assert base is not None
        own = min(
            (float(r["median_s"]) for v in (STATIC, DYNAMIC) if (r := _same(rows, row, v))),
            default=None,
        )
        seconds = float(row["median_s"])
        lines.append(
            [
                f"{row['model']}, {_ISA_TITLES[row['isa']]}",
                row["variant"],
                f"{seconds:.3f} s",
                f"{float(base['median_s']) / seconds:.2f}",
                "" if own is None else f"{seconds / own:.2f}",
                f"{float(row['weights_mb']):.0f} MB",
                f"{float(row['peak_mb']):.0f} ({float(row['anonymous_mb']):.0f}) MB",
                f"{float(row['error']):.2g}",
            ]
        )
    header = [
        "one step (random weights, batch 2)",
        "variant",
        "median",
        "times faster than torch-fp32",
        "ptq4adm's better one is faster by",
        "weights",
        "peak memory of the process (now, without files)",
        "relative error",
    ]
    return markdown(
        header, lines, f"`benchmarks/bench_unet_cpu.py`; {_where(_configurations(rows))}."
    )


def shape_table(results: Path) -> str:
    """Every shape and variant, one table a model, instruction set and number of threads."""
    runs = _configurations(read_table(results, KERNELS))
    if not runs:
        return NOT_MEASURED
    parts = []
    for (isa, threads), rows in runs.items():
        peers = peer_names(rows)
        for model in dict.fromkeys(row["model"] for row in rows):
            own = [row for row in rows if row["model"] == model]
            title = f"### {model}, {_ISA_TITLES[isa]}, {threads} threads"
            header = ["shape", "a step", "ptq4adm ms", "of it quantize", "GOPS", *peers]
            lines = [_shape_line(*item, peers) for item in by_shape(own).items()]
            lines.append(_sum_line(own, model, peers))
            note = "Instructions: " + "; ".join(_isas(own, name) for name in (OURS, *peers)) + "."
            parts.append(title + "\n\n" + markdown(header, lines, note))
    where = f"Peers: milliseconds (times slower than ptq4adm). {_where(runs)}."
    return "\n\n".join([where, *parts])


def peak_table(results: Path) -> str:
    """Measured ceilings."""
    rows = read_table(results, PEAKS)
    if not rows:
        return NOT_MEASURED
    newest = max(row["date"] for row in rows)
    rows = [row for row in rows if row["date"] == newest]
    threads = sorted({int(row["threads"]) for row in rows})
    rates = {(row["peak"], int(row["threads"])): float(row["giga_a_second"]) for row in rows}
    lines = [
        [kind, *(f"{rates[kind, count]:.0f}" for count in threads)]
        for kind in dict.fromkeys(row["peak"] for row in rows)
    ]
    header = ["ceiling", *(f"{count} thread{'s' if count > 1 else ''}" for count in threads)]
    note = "10^9 operations a second; copy: 10^9 bytes a second, read and written."
    return markdown(header, lines, note)


def _configurations(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """(instruction set, threads) to rows, W4A8 only; AVX2 first."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row["isa"], int(row["threads"]))):
        if row["bits"] == "4":
            found.setdefault((row["isa"], row["threads"]), []).append(row)
    return found


def _ratio(entry: dict[str, object], isa: str) -> str:
    mark = _WIDER if isa == "avx2" and "avx512" in str(entry["peer_isa"]) else ""
    return f"{entry['geometric_mean']:.2f} ({entry['least']:.2f}){mark}"


def _shape_line(shape: str, variants: dict[str, Row], peers: Sequence[str]) -> list[str]:
    ours = variants[OURS]
    own_ms = float(ours["median_ms"])
    operations = 2.0 * int(ours["M"]) * int(ours["N"]) * int(ours["K"])
    cells = [
        shape,
        ours["count"],
        f"{own_ms:.3f}",
        f"{float(variants[QUANTIZE]['median_ms']):.3f}",
        f"{operations / own_ms / 1e6:.0f}",
    ]
    for peer in peers:
        if peer not in variants:
            cells.append("")
            continue
        theirs = float(variants[peer]["median_ms"])
        cells.append(f"{theirs:.3f} ({theirs / own_ms:.2f})")
    return cells


def _sum_line(rows: Sequence[Row], model: str, peers: Sequence[str]) -> list[str]:
    own = step_milliseconds(rows, model, OURS)
    quantize = step_milliseconds(rows, model, QUANTIZE)
    assert own is not None
    assert quantize is not None
    calls = sum(int(row["count"]) for row in rows if row["variant"] == MATMUL)
    cells = ["all, times their count", str(calls), f"{own:.1f}", f"{quantize:.1f}", ""]
    for peer in peers:
        total = step_milliseconds(rows, model, peer)
        cells.append("" if total is None else f"{total:.1f} ({total / own:.2f})")
    return cells


def _isas(rows: Sequence[Row], variant: str) -> str:
    isas = sorted({row["variant_isa"] for row in rows if row["variant"] == variant})
    return f"{variant} {', '.join(isas)}"


def _same(rows: Sequence[Row], row: Row, variant: str) -> Row | None:
    """The row of another variant in the same run and model."""
    for other in rows:
        if (other["run"], other["model"], other["variant"]) == (row["run"], row["model"], variant):
            return other
    return None


def _where(runs: dict[tuple[str, str], list[Row]]) -> str:
    last = max((row for rows in runs.values() for row in rows), key=lambda row: row["date"])
    versions = ", ".join(
        f"{column.removeprefix('version_')} {last[column]}"
        for column in ("version_onnxruntime", "version_openvino", "version_nncf")
        if last.get(column)
    )
    return (
        f"{last['device']}, torch {last['torch']}{', ' if versions else ''}{versions}, commit "
        f"{last['commit']}, {last['date']} UTC"
    )
