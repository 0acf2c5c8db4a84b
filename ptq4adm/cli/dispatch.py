"""`ptq4adm dispatch`: makes a table of measured times from result rows, for backend auto."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from ptq4adm.cli.options import add_output_options, print_result


def add_command(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "dispatch",
        help="make the table from which auto takes the faster backend",
        description="Read rows that `ptq4adm bench --device cuda --results DIR` wrote, and write "
        "the table of one device: the time of every backend and of float16 for each layer. "
        "Without -o it is written where `--backend auto` finds it.",
    )
    parser.add_argument(
        "rows", nargs="+", type=Path, metavar="ROWS.csv", help="gpu-kernels.csv, older ones first"
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="table to write (default: the package's)"
    )
    parser.add_argument(
        "--device", metavar="NAME", help="whose rows, where the files hold several devices'"
    )
    add_output_options(parser)
    parser.set_defaults(run=run, parser=parser, when_interrupted="nothing was written")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from ptq4adm.bench.gpu_dispatch import read_table
    from ptq4adm.dispatch import GPU_BACKENDS, choose_backend, load_table, save_table, table_path

    table = read_table(args.rows, args.device)
    path = args.output or table_path(table.device)
    save_table(path, table)
    table = load_table(path)
    timed = {
        key: sorted({n for t in times.values() for n in t.product})
        for key, times in table.layers.items()
    }
    chosen = Counter(
        choose_backend(table, key, rows=None, candidates=GPU_BACKENDS).backend
        for key, names in timed.items()
        if len(names) > 1
    )
    result = {
        "command": "dispatch",
        "output": str(path),
        "device": table.device,
        "layers": len(table.layers),
        "entries": table.entries,
        "compared": sum(chosen.values()),
        "faster": dict(chosen),
        "runs": [dict(run) for run in table.runs],
    }
    faster = ", ".join(f"{name} in {count}" for name, count in sorted(chosen.items()))
    compared = f"two backends in {result['compared']} of them" + (f": {faster}" if faster else "")
    text = f"{table.device}: {len(table.layers)} layers, {table.entries} entries; {compared}"
    print_result(args, result, f"{text}\nwrote {path}")
    return 0
