"""The options of `ptq4adm quantize`, and which of them go together."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ptq4adm.cli import sensitivity
from ptq4adm.cli.options import add_layer_options, whole_number
from ptq4adm.config import DEFAULT_BUCKETS, ROUNDINGS, QuantConfig

# the names of ptq4adm.calibration.STRATEGIES, which a machine with torch alone cannot import
_STRATEGIES = (
    "random",
    "uniform-steps",
    "skewed-steps",
    "density-diversity",
    "activation-aware",
)
_DEFAULT_STRATEGY = "activation-aware"


def add_scheme_options(parser: argparse.ArgumentParser) -> None:
    """Add what the model becomes."""
    group = parser.add_argument_group("what it becomes")
    group.add_argument(
        "--bits",
        choices=("w4a8", "w8a8"),
        default="w4a8",
        help="bits of weights and activations (default: w4a8)",
    )
    add_layer_options(group)
    group.add_argument(
        "--uniform",
        action="store_true",
        help="4 bits for the layers that the model's family calls sensitive, too (default: those "
        "few take 8)",
    )
    sensitivity.add_budget_option(group)
    group.add_argument(
        "--sensitivity",
        type=Path,
        metavar="FILE",
        help="with --budget: errors that `ptq4adm sensitivity` measured (default: measure now)",
    )
    group.add_argument(
        "--correction",
        action="store_true",
        help="fit a line for every step and channel of the predictions beside the float model, "
        "and keep it with the pipeline",
    )
    group.add_argument(
        "--rounding",
        choices=ROUNDINGS,
        default=QuantConfig.rounding,
        help="integers from the weight alone (nearest, default), or from inputs as well, which are "
        f"recorded here at chosen pairs (--strategy, default {_DEFAULT_STRATEGY})",
    )
    group.add_argument(
        "--activation",
        choices=("static", "dynamic"),
        default="static",
        help="activation scales: calibrated (default), or measured at every call",
    )
    group.add_argument(
        "--observer",
        default=QuantConfig.activation_observer,
        metavar="NAME",
        help="static activation scales from: squared_error, p2.4, percentile or absmax "
        f"(default: {QuantConfig.activation_observer})",
    )


def add_calibration_options(parser: argparse.ArgumentParser) -> None:
    """Add how it is calibrated."""
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--prompts", type=Path, metavar="FILE", help="prompts, one a line (default: a listed set)"
    )
    group.add_argument(
        "--augment",
        type=whole_number,
        metavar="N",
        help="calibrate on N prompts: those of --prompts, or seeds of the model's domain, and "
        "others that cover what is missing (see: ptq4adm prompts)",
    )
    group.add_argument(
        "--steps",
        type=whole_number,
        metavar="N",
        help="denoising steps (default: the pipeline's, at most 25)",
    )
    group.add_argument(
        "--guidance", type=float, metavar="G", help="guidance scale (default: the pipeline's)"
    )
    group.add_argument(
        "--buckets",
        type=whole_number,
        metavar="N",
        help="timestep buckets with their own scales "
        f"(default: {DEFAULT_BUCKETS}, at most the steps)",
    )
    group.add_argument("--seed", type=int, default=0, help="seed of the first prompt (default: 0)")
    group.add_argument(
        "--batch", type=whole_number, default=4, metavar="N", help="prompts at once (default: 4)"
    )
    _add_choice_options(group)
    group.add_argument(
        "--calibration", type=Path, metavar="FILE", help="use this calibration, make none"
    )
    group.add_argument(
        "--save-calibration", type=Path, metavar="FILE", help="keep the calibration in a file"
    )
    group.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="keep what is done, to go on after an interruption",
    )


def _add_choice_options(group: Any) -> None:
    group.add_argument(
        "--strategy",
        choices=_STRATEGIES,
        help="record chosen (prompt, step) pairs only, chosen in this way (default: all pairs)",
    )
    group.add_argument(
        "--size",
        type=whole_number,
        metavar="N",
        help="pairs that --strategy chooses (default: 256, or all if there are fewer)",
    )
    group.add_argument(
        "--inputs",
        type=Path,
        metavar="FILE",
        help="keep what the UNet is given at the chosen pairs in a file; with --calibration and "
        "--rounding, the file that was kept with it",
    )


def check_options(args: argparse.Namespace) -> None:
    """Refuse options that do not go together; complete those that follow from others."""
    if args.output is None and not args.dry_run:
        args.parser.error("the following arguments are required: -o/--output (or --dry-run)")
    if args.uniform and (args.budget is not None or args.bits != "w4a8"):
        args.parser.error(
            "--uniform is of one scheme of 4 bits: leave out --budget, and --bits w8a8"
        )
    if args.sensitivity is not None and args.budget is None:
        args.parser.error("--sensitivity is of a size budget: give --budget, too")
    if args.budget is not None and args.dry_run and args.sensitivity is None:
        args.parser.error("--dry-run measures nothing: give --sensitivity FILE to plan a --budget")
    _choose_for_rounding(args)
    _check_choice(args)


def _choose_for_rounding(args: argparse.Namespace) -> None:
    """Record inputs for a rounding that looks at them, or take those that were kept."""
    if args.rounding == "nearest":
        return
    if args.activation == "dynamic":
        args.parser.error(
            f"--rounding {args.rounding} records inputs with a calibration, and dynamic scales "
            "need none; use --activation static"
        )
    if args.calibration is None:
        args.strategy = args.strategy or _DEFAULT_STRATEGY
    elif args.inputs is None:
        args.parser.error(
            f"--rounding {args.rounding} looks at inputs: give --inputs, the file kept with the "
            "calibration, too"
        )


def _check_choice(args: argparse.Namespace) -> None:
    """Refuse options of a choice where none is made."""
    if args.strategy is None:
        is_read = args.rounding != "nearest" and args.calibration is not None
        for name in ("size",) if is_read else ("size", "inputs"):
            if getattr(args, name) is not None:
                args.parser.error(f"--{name} is of a choice of pairs: give --strategy, too")
        return
    if args.calibration is not None:
        args.parser.error("--strategy chooses for a new calibration, and --calibration gives one")
    if args.activation == "dynamic":
        args.parser.error("--strategy chooses for a calibration, and dynamic scales need none")
