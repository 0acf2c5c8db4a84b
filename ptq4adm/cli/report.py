"""`ptq4adm report`: one HTML page about a quantized model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ptq4adm.cli.options import (
    SHIPPED,
    add_original_options,
    add_output_options,
    add_run_options,
    model_folder,
    note,
    original_options,
    print_result,
    read_prompts,
    set_threads,
    whole_number,
)

_CLIPS = 8


def add_command(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "report",
        help="one HTML page: what was done, what it weighs, what it sounds like",
        description="Quantize a float pipeline in W8A8 and W4A8, make the same clips in each, and "
        "write one page with players, spectrograms, a blind test, metrics and charts.",
    )
    parser.add_argument("output", type=Path, metavar="OUT", help="HTML file to write")
    parser.add_argument(
        "model",
        nargs="?",
        default=SHIPPED,
        metavar="MODEL",
        help="float pipeline: folder, published files (.ckpt), or 'shipped' (default)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    group = parser.add_argument_group("clips")
    group.add_argument("--prompts", type=Path, metavar="FILE", help="one a line (default: listed)")
    group.add_argument(
        "--clips",
        type=whole_number,
        default=_CLIPS,
        metavar="N",
        help=f"prompts (default: {_CLIPS})",
    )
    group.add_argument("--steps", type=whole_number, metavar="N", help="denoising steps")
    group.add_argument("--seed", type=int, default=0, help="of the first clip (default: 0)")
    group = parser.add_argument_group("what is known already")
    group.add_argument("--calibration", type=Path, metavar="FILE", help="default: calibrate now")
    group.add_argument(
        "--calibration-prompts", type=Path, metavar="FILE", help="what it is, or was, made of"
    )
    group.add_argument(
        "--sensitivity",
        type=Path,
        metavar="FILE",
        help="of ptq4adm sensitivity; its assignment is heard",
    )
    group.add_argument(
        "--evaluation",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="of ptq4adm evaluate -o; repeatable",
    )
    add_original_options(parser)
    add_run_options(parser)
    add_output_options(parser)
    parser.set_defaults(run=run, parser=parser, when_interrupted="nothing was written")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from ptq4adm.calibration import Calibration, default_prompts
    from ptq4adm.calibration.files import check_output_file
    from ptq4adm.evaluation.result import Evaluation
    from ptq4adm.report import gather, write_report
    from ptq4adm.report.gather import ReportSettings
    from ptq4adm.sensitivity import Sensitivity

    check_output_file(args.output, overwrite=args.overwrite)
    set_threads(args.threads)
    # what is read is read first: a wrong file is told at once
    evaluations = [Evaluation.load(path) for path in args.evaluation]
    sensitivity = None if args.sensitivity is None else Sensitivity.load(args.sensitivity)
    calibration = None if args.calibration is None else Calibration.load(args.calibration)
    listed = None
    if args.calibration_prompts is not None:
        listed = read_prompts(args.calibration_prompts)
    prompts = default_prompts() if args.prompts is None else read_prompts(args.prompts)
    note(args, f"{args.model}: making {min(len(prompts), args.clips)} clips in each form")
    report = gather(
        model_folder(args.model),
        prompts[: args.clips],
        calibration=calibration,
        sensitivity=sensitivity,
        evaluations=evaluations,
        settings=ReportSettings(
            steps=args.steps,
            seed=args.seed,
            calibration_prompts=listed,
            progress=not args.quiet,
        ),
        original={"device": args.device, "backend": args.backend, **original_options(args)},
    )
    path = write_report(report, args.output, overwrite=args.overwrite)
    megabytes = path.stat().st_size / 1e6
    result = {
        "path": str(path),
        "megabytes": round(megabytes, 3),
        "sizes": {row.name: row.bytes for row in report.sizes},
    }
    print_result(args, result, f"wrote {path} ({megabytes:.1f} MB)")
    return 0
