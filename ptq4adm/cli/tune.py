"""`ptq4adm tune`: measures tiles of a backend's kernels on this GPU and writes the fastest."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from ptq4adm.cli.options import add_output_options, note, print_result


def add_command(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "tune",
        help="measure tiles of the kernels on this GPU",
        description="Compile, check and time tiles for the products of real models, and write the "
        "fastest where the kernels look them up. Products that are in the files are not measured "
        "again: an interrupted run goes on. A wrong result is not used; the exit code is 1 then.",
    )
    parser.add_argument(
        "--backend", default="triton", metavar="NAME", help="triton (default) or cuda"
    )
    parser.add_argument(
        "--model",
        action="append",
        metavar="NAME",
        help="model whose layers are tuned; repeatable (default: tango, audioldm-s, audioldm-l)",
    )
    parser.add_argument(
        "--kind", action="append", metavar="KIND", help="kind of layers; repeatable"
    )
    parser.add_argument(
        "--bits", action="append", type=int, metavar="N", help="4 or 8; repeatable (default: 4)"
    )
    parser.add_argument(
        "--group-size",
        type=int,
        choices=(64,),
        metavar="64",
        help="tune products whose weights have a multiplier for every 64 of a channel",
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder of the files (default: the package's)"
    )
    parser.add_argument(
        "--results", type=Path, metavar="DIR", help="folder of the CSV of all measurements"
    )
    parser.add_argument("--quick", action="store_true", help="fewer tiles for each product")
    parser.add_argument(
        "--deadline", type=float, metavar="S", help="begin no other product after S seconds"
    )
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the files")
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="toy shapes in Triton's interpreter and the emulator of CUDA, without a GPU "
        "(TRITON_INTERPRET=1)",
    )
    add_output_options(parser)
    parser.set_defaults(
        run=run, parser=parser, when_interrupted="finished products are kept; run it again"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from ptq4adm.bench import gpu_environment, gpu_faults, gpu_report, gpu_tune

    gpu_environment.check_results(args.results, is_rehearsal=args.rehearse)
    default = gpu_tune.TuneJob
    job = default(
        models=tuple(args.model or default.models),
        kinds=tuple(args.kind or default.kinds),
        bits=tuple(args.bits or default.bits),
        backend=args.backend,
        output=args.output,
        is_quick=args.quick,
        is_rehearsal=args.rehearse,
        deadline=args.deadline,
        is_fresh=args.fresh,
        is_grouped=args.group_size is not None,
    )
    if args.backend == "triton":
        note(args, "tune: in batches, each compiled on all cores first")
    save = None if args.results is None else partial(gpu_report.save_gpu, args.results)
    result = gpu_tune.run_tune(job, progress=not args.quiet, save=save)
    print_result(args, result, gpu_tune.format_tune(result))
    return gpu_faults.exit_code(result)
