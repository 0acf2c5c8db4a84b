"""`ptq4adm bench`: this package's kernels beside other libraries', on the shapes of real models."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ptq4adm.cli.options import add_output_options, note, print_result, whole_number
from ptq4adm.errors import BackendUnavailableError, ConfigError

_QUICK_MODELS = ("audioldm-s",)
# what is printed as JSON, tables of rows to save, what is printed as text
_Outcome = tuple[dict[str, Any], dict[str, list[dict[str, Any]]], str]


def add_command(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "bench",
        help="time the kernels beside other libraries'",
        description="Check, then time every layer shape of real models: these kernels, PyTorch, "
        "FBGEMM, oneDNN, ONNX Runtime and OpenVINO, as far as they are installed "
        "(pip install 'ptq4adm[bench]'). With --unet: whole steps of a model.",
    )
    parser.add_argument("--device", default="cpu", help="only cpu in this version")
    parser.add_argument(
        "--model", action="append", metavar="NAME", help="model whose layers are timed; repeatable"
    )
    parser.add_argument(
        "--kind",
        action="append",
        metavar="KIND",
        help="kind of layers, such as conv3x3; repeatable",
    )
    parser.add_argument(
        "--peer", action="append", metavar="NAME", help="library to compare with; repeatable"
    )
    parser.add_argument(
        "--isa",
        default="native",
        metavar="NAME",
        help="native, or avx2: nothing newer, wherever a library can be told so",
    )
    parser.add_argument("--bits", type=int, default=4, help="bits of the weights, 4 or 8")
    parser.add_argument(
        "--threads", type=whole_number, metavar="N", help="of every variant (default: all cores)"
    )
    parser.add_argument("--quick", action="store_true", help="few shapes, less than a minute")
    parser.add_argument("--seconds", type=float, metavar="S", help="timing of one shape")
    parser.add_argument(
        "--unet", metavar="NAME", help="time whole steps of this model instead of its layers"
    )
    parser.add_argument(
        "--rounds", type=whole_number, default=5, metavar="N", help="steps of each with --unet"
    )
    parser.add_argument("--results", type=Path, metavar="DIR", help="folder of CSV rows to add to")
    add_output_options(parser)
    parser.set_defaults(run=run, parser=parser, when_interrupted="no rows were written")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.device != "cpu":
        raise BackendUnavailableError(
            f"--device {args.device}: this version benchmarks the cpu only; use --device cpu"
        )
    if args.seconds is not None and args.seconds <= 0:
        raise ConfigError(f"--seconds {args.seconds}: expected a positive number")
    import torch

    from ptq4adm.bench import store

    threads = args.threads or torch.get_num_threads()
    if args.unet is not None:
        result, tables, text = _run_unet(args, threads)
    else:
        result, tables, text = _run_kernels(args, threads)
    if args.results is not None:
        store.save_result(args.results, result["run"], tables)
    print_result(args, result, text)
    return 0


def _run_kernels(args: argparse.Namespace, threads: int) -> _Outcome:
    from ptq4adm.bench import kernels, report, store

    job = kernels.KernelJob(
        models=tuple(args.model or (_QUICK_MODELS if args.quick else kernels.KernelJob.models)),
        kinds=tuple(args.kind or kernels.KernelJob.kinds),
        isa=args.isa,
        threads=threads,
        bits=args.bits,
        peers=tuple(args.peer) if args.peer else None,
        is_quick=args.quick,
        seconds=args.seconds,
    )
    result = kernels.run_kernels(job, progress=not args.quiet)
    result["ratios"] = report.group_ratios(result["rows"])
    tables = {store.KERNELS: result["rows"], store.PEAKS: result["peaks"]}
    return result, tables, report.format_result(result)


def _run_unet(args: argparse.Namespace, threads: int) -> _Outcome:
    from ptq4adm.bench import store, unet

    job = unet.UNetJob(
        model=args.unet, isa=args.isa, threads=threads, rounds=args.rounds, bits=args.bits
    )
    note(args, f"{args.unet}: every variant is made first; this takes a minute or more")
    result = unet.run_unet(job, progress=not args.quiet)
    return result, {store.UNET: result["rows"]}, unet.format_unet(result)
