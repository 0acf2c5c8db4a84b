"""`ptq4adm quantize`: calibrate, quantize, save."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from ptq4adm.config import ROUNDINGS, QuantConfig

if TYPE_CHECKING:
    from ptq4adm.calibration import Calibration, Selection
    from ptq4adm.models import TextToAudioPipeline
    from ptq4adm.quantization import QuantPlan

_MB = 1e6
_BUCKETS = 10
# the names of ptq4adm.calibration.STRATEGIES, which is not imported to print a help text
_STRATEGIES = (
    "random",
    "uniform-steps",
    "skewed-steps",
    "density-diversity",
    "activation-aware",
)
_DEFAULT_STRATEGY = "activation-aware"


def add_command(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "quantize",
        help="calibrate a model, quantize its UNet, save it",
        description="Calibrate a text-to-audio pipeline, quantize its UNet and save the pipeline.",
    )
    parser.add_argument(
        "model",
        nargs="?",
        default=SHIPPED,
        metavar="MODEL",
        help="pipeline folder in diffusers' layout, the published files of a model (.ckpt), or "
        "'shipped' (default) for the packaged pipeline",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument(
        "--dry-run", action="store_true", help="print which layer gets what, and why; write nothing"
    )
    _add_scheme_options(parser)
    _add_calibration_options(parser)
    add_original_options(parser)
    add_run_options(parser)
    add_output_options(parser)
    parser.set_defaults(
        run=run,
        parser=parser,
        when_interrupted="nothing was written; run the same command again "
        "(with --cache it goes on where it stopped)",
    )


def _add_scheme_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what it becomes")
    group.add_argument(
        "--bits",
        choices=("w4a8", "w8a8"),
        default="w4a8",
        help="bits of weights and activations (default: w4a8)",
    )
    group.add_argument(
        "--override",
        type=_override,
        action="append",
        default=[],
        metavar="PATTERN=SCHEME",
        help="scheme (w4a8, w8a8, w8 or float) of layers whose name matches, such as "
        "'*.conv_shortcut=w8a8'; repeatable, later ones win",
    )
    group.add_argument(
        "--group-size",
        type=int,
        metavar="64",
        help="4-bit weight scales a block of 64 weights (default: one a channel)",
    )
    group.add_argument(
        "--weight-observer",
        default="squared_error",
        metavar="NAME",
        help="clip of weights: squared_error (default) or absmax",
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
        help="static activation scales from: squared_error, percentile or absmax "
        f"(default: {QuantConfig.activation_observer})",
    )


def _add_calibration_options(parser: argparse.ArgumentParser) -> None:
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
        "--steps", type=whole_number, metavar="N", help="denoising steps (default: the pipeline's)"
    )
    group.add_argument(
        "--guidance", type=float, metavar="G", help="guidance scale (default: the pipeline's)"
    )
    group.add_argument(
        "--buckets",
        type=whole_number,
        metavar="N",
        help=f"timestep buckets with their own scales (default: {_BUCKETS}, at most the steps)",
    )
    group.add_argument("--seed", type=int, default=0, help="seed of the first prompt (default: 0)")
    group.add_argument(
        "--batch", type=whole_number, default=4, metavar="N", help="prompts at once (default: 4)"
    )
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


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.output is None and not args.dry_run:
        args.parser.error("the following arguments are required: -o/--output (or --dry-run)")
    _choose_for_rounding(args)
    _check_choice(args)
    config = QuantConfig(
        scheme=args.bits,
        overrides=dict(args.override),
        weight_observer=args.weight_observer,
        activation=args.activation,
        activation_observer=args.observer,
        group_size=args.group_size,
        backend=args.backend,
        rounding=args.rounding,
    )
    prompts = None if args.prompts is None else read_prompts(args.prompts)

    from ptq4adm.models.components import check_device
    from ptq4adm.models.families import recognize
    from ptq4adm.ops import resolve_backend
    from ptq4adm.packing.folders import check_output
    from ptq4adm.quantization import load_pipeline, plan, quantize, save_pipeline

    # everything that can be refused is refused before the minutes of calibration
    if not args.dry_run:
        check_output(args.output, overwrite=args.overwrite)
    check_device(args.device)
    resolve_backend(args.backend, args.device)
    set_threads(args.threads)
    start = time.monotonic()
    model = model_folder(args.model)
    pipe = load_pipeline(model, device=args.device, **original_options(args))
    calibration = _load_calibration(args)
    planned = plan(pipe, config, calibration)
    # an error stays the only line
    note(args, str(recognize(model)))
    if args.dry_run:
        print_result(args, planned.to_dict(), str(planned))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        if args.rounding != "nearest" and args.inputs is None:
            args.inputs = Path(temporary) / "inputs.safetensors"
        if calibration is None and args.activation == "static":
            if args.augment is not None:
                prompts = _augmented(args, pipe, prompts)
            calibration = _calibrate(args, pipe, prompts, planned)
        inputs = None if args.rounding == "nearest" else args.inputs
        done = quantize(pipe, config, calibration, inputs=inputs, progress=not args.quiet)
    folder = save_pipeline(pipe, args.output, overwrite=args.overwrite)
    seconds = time.monotonic() - start
    print_result(
        args,
        {"command": "quantize", "output": str(folder), "seconds": round(seconds, 2)}
        | {"layers": done.count(), "unet_bytes_float16": done.bytes_before}
        | {"unet_bytes": done.bytes_after, "config": config.to_dict()}
        | {"calibration": None if calibration is None else calibration.digest()},
        f"{done.summary()}\nwrote {folder} in {seconds:.0f} s",
    )
    return 0


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


def _load_calibration(args: argparse.Namespace) -> Calibration | None:
    if args.calibration is None:
        return None
    from ptq4adm.calibration import Calibration

    return Calibration.load(args.calibration)


def _augmented(
    args: argparse.Namespace, pipe: TextToAudioPipeline, seeds: Sequence[str] | None
) -> list[str]:
    from ptq4adm.prompts import PipelineEncoder, augment_prompts

    encoder = PipelineEncoder(pipe, progress=not args.quiet)
    result = augment_prompts(seeds, args.augment, pipe=pipe, encoder=encoder)
    note(
        args,
        f"{len(result.prompts)} prompts from {result.seeds} seeds of the domain {result.domain!r} "
        f"cover {result.after.pairs:.0%} of its pairs, up from {result.before.pairs:.0%}",
    )
    return list(result.prompts)


def _calibrate(
    args: argparse.Namespace,
    pipe: TextToAudioPipeline,
    prompts: Sequence[str] | None,
    planned: QuantPlan,
) -> Calibration:
    from ptq4adm.calibration import default_prompts
    from ptq4adm.quantization import calibrate

    texts = default_prompts() if prompts is None else list(prompts)
    steps = pipe.defaults.steps if args.steps is None else args.steps
    buckets = min(_BUCKETS, steps) if args.buckets is None else args.buckets
    if not args.quiet:
        batches = -(-len(texts) // args.batch)
        estimate = _seconds_per_step(args, pipe, texts[: args.batch]) * steps * batches
        # once for signatures, and once more for the chosen pairs
        estimate *= 1 if args.strategy is None else 2
        note(
            args,
            f"calibrating on {len(texts)} prompts, {steps} steps each: about {estimate:.0f} s; "
            f"the UNet goes from {planned.bytes_before / _MB:.1f} MB in float16 "
            f"to {planned.bytes_after / _MB:.1f} MB",
        )
    calibration = calibrate(
        pipe,
        texts,
        steps=steps,
        guidance=args.guidance,
        seed=args.seed,
        buckets=buckets,
        batch=args.batch,
        progress=not args.quiet,
        cache=args.cache,
        strategy=args.strategy,
        size=args.size,
        inputs=args.inputs,
    )
    if calibration.selection is not None:
        _tell_choice(args, calibration.selection)
    if args.save_calibration is not None:
        calibration.save(args.save_calibration)
    return calibration


def _tell_choice(args: argparse.Namespace, selection: Selection) -> None:
    total = len(selection.meta.prompt_keys) * selection.meta.steps
    note(
        args,
        f"{selection.strategy} chose {len(selection.pairs)} of {total} pairs: "
        f"{selection.coverage:.0%} of the layers' range bins are covered",
    )
    for warning in selection.warnings:
        note(args, f"warning: {warning}")


def _seconds_per_step(
    args: argparse.Namespace, pipe: TextToAudioPipeline, prompts: Sequence[str]
) -> float:
    """Time one recorded step of one batch, after a first one that warms up."""
    from ptq4adm.quantization import calibrate

    seconds = 0.0
    for _ in range(2):
        start = time.monotonic()
        calibrate(pipe, prompts, steps=1, guidance=args.guidance, buckets=1, progress=False)
        seconds = time.monotonic() - start
    return seconds


def _override(text: str) -> tuple[str, str]:
    pattern, separator, scheme = text.rpartition("=")
    if not (separator and pattern and scheme):
        raise argparse.ArgumentTypeError(f"{text!r} is not PATTERN=SCHEME")
    return pattern, scheme
