"""`ptq4adm bench`: this package's kernels beside other libraries', on the shapes of real models."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from ptq4adm.cli.options import add_output_options, note, print_result, whole_number
from ptq4adm.errors import ConfigError

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
        "(pip install 'ptq4adm[bench]'). With --unet: whole steps of a model. With --device cuda: "
        "products, norms and gates beside PyTorch in float16, on a GPU; a wrong result becomes a "
        "row with the reason, and the exit code 1.",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
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
    parser.add_argument(
        "--bits", type=int, help="bits of the weights, 4 or 8 (default: 4; both with cuda)"
    )
    parser.add_argument(
        "--threads", type=whole_number, metavar="N", help="of every variant (default: all cores)"
    )
    parser.add_argument("--quick", action="store_true", help="few shapes, less than a minute")
    parser.add_argument("--seconds", type=float, metavar="S", help="timing of one shape")
    parser.add_argument(
        "--unet",
        metavar="NAME",
        help="time whole steps of this model instead of its layers; with cuda: several, separated "
        "by commas, or all",
    )
    parser.add_argument(
        "--rounds", type=whole_number, default=5, metavar="N", help="steps of each with --unet"
    )
    parser.add_argument("--results", type=Path, metavar="DIR", help="folder of CSV rows to add to")
    _add_gpu_options(parser)
    add_output_options(parser)
    parser.set_defaults(
        run=run, parser=parser, when_interrupted="rows of a GPU are kept, no others were written"
    )


def _add_gpu_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("with --device cuda")
    group.add_argument(
        "--rehearse",
        action="store_true",
        help="toy shapes in Triton's interpreter and the emulator of CUDA, without a GPU "
        "(TRITON_INTERPRET=1)",
    )
    group.add_argument(
        "--backend",
        action="append",
        metavar="NAME",
        help="this package's backend, triton or cuda; repeatable (default: all that can run)",
    )
    group.add_argument(
        "--variant", action="append", metavar="NAME", help="variant of --unet; repeatable"
    )
    group.add_argument(
        "--deadline", type=float, metavar="S", help="begin no other shape after S seconds"
    )
    group.add_argument(
        "--configs", type=Path, metavar="DIR", help="measured tiles (default: the package's)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.device not in ("cpu", "cuda"):
        raise ConfigError(f"--device {args.device}: expected cpu or cuda")
    if args.seconds is not None and args.seconds <= 0:
        raise ConfigError(f"--seconds {args.seconds}: expected a positive number")
    if args.device == "cuda":
        return _run_gpu(args)
    if args.backend:
        raise ConfigError("--backend: names a backend of GPUs; give --device cuda")
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
        bits=args.bits or 4,
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
        model=args.unet, isa=args.isa, threads=threads, rounds=args.rounds, bits=args.bits or 4
    )
    note(args, f"{args.unet}: every variant is made first; this takes a minute or more")
    result = unet.run_unet(job, progress=not args.quiet)
    return result, {store.UNET: result["rows"]}, unet.format_unet(result)


def _run_gpu(args: argparse.Namespace) -> int:
    from ptq4adm.bench import gpu_environment, gpu_faults, gpu_report

    gpu_environment.check_results(args.results, is_rehearsal=args.rehearse)
    save = None if args.results is None else partial(gpu_report.save_gpu, args.results)
    result, text = (_run_gpu_unets if args.unet else _run_gpu_kernels)(args, save)
    print_result(args, result, text)
    return gpu_faults.exit_code(result)


def _run_gpu_kernels(args: argparse.Namespace, save: Any) -> tuple[dict[str, Any], str]:
    from ptq4adm.bench import gpu_kernels, gpu_report

    default = gpu_kernels.GpuJob
    job = default(
        models=tuple(args.model or default.models),
        kinds=tuple(args.kind or default.kinds),
        bits=(args.bits,) if args.bits else default.bits,
        backends=tuple(args.backend or default.backends),
        is_quick=args.quick,
        is_rehearsal=args.rehearse,
        seconds=args.seconds,
        deadline=args.deadline,
        configs=args.configs,
    )
    result = gpu_kernels.run_gpu_kernels(job, progress=not args.quiet, save=save)
    result["ratios"] = gpu_report.group_ratios(result["rows"])
    return result, gpu_report.format_gpu(result)


def _run_gpu_unets(args: argparse.Namespace, save: Any) -> tuple[dict[str, Any], str]:
    from ptq4adm.bench import gpu_tiles, gpu_unet, gpu_unet_report

    default = gpu_unet.GpuUNetJob
    gpu_tiles.use_configs(args.configs)
    job = default(
        models=default.models if args.unet == "all" else tuple(args.unet.split(",")),
        variants=tuple(args.variant or default.variants),
        backends=tuple(args.backend or default.backends),
        rounds=args.rounds,
        is_rehearsal=args.rehearse,
        deadline=args.deadline,
    )
    result = gpu_unet.run_gpu_unets(job, progress=not args.quiet, save=save)
    return result, gpu_unet_report.format_unets(result)
