"""`ptq4adm quantize`: calibrate, quantize, save."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptq4adm.cli import sensitivity
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
)
from ptq4adm.cli.quantize_options import (
    add_calibration_options,
    add_scheme_options,
    check_options,
)
from ptq4adm.config import DEFAULT_BUCKETS, QuantConfig

if TYPE_CHECKING:
    from ptq4adm.calibration import Calibration, Selection
    from ptq4adm.models import TextToAudioPipeline
    from ptq4adm.quantization import QuantPlan

_MB = 1e6
_CORRECTION_SEED = 1_000_000


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
    add_scheme_options(parser)
    add_calibration_options(parser)
    add_original_options(parser)
    add_run_options(parser)
    add_output_options(parser)
    parser.set_defaults(
        run=run,
        parser=parser,
        when_interrupted="nothing was written; run the same command again "
        "(with --cache it goes on where it stopped)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    check_options(args)
    config = QuantConfig(
        scheme=args.bits,
        overrides=dict(args.override),
        weight_observer=args.weight_observer,
        activation=args.activation,
        activation_observer=args.observer,
        protect_sensitive=not args.uniform,
        group_size=args.group_size,
        backend=args.backend,
        rounding=args.rounding,
    )
    prompts = None if args.prompts is None else read_prompts(args.prompts)

    from ptq4adm.calibration.files import check_output_file
    from ptq4adm.models.components import check_device
    from ptq4adm.models.families import recognize
    from ptq4adm.ops import resolve_backend
    from ptq4adm.packing.folders import check_output
    from ptq4adm.quantization import load_pipeline, plan, save_pipeline

    # everything that can be refused is refused before the minutes of calibration
    if not args.dry_run:
        check_output(args.output, overwrite=args.overwrite)
        if args.save_calibration is not None:
            check_output_file(args.save_calibration)
    check_device(args.device)
    resolve_backend(args.backend, args.device)
    set_threads(args.threads)
    start = time.monotonic()
    model = model_folder(args.model)
    pipe = load_pipeline(model, device=args.device, **original_options(args))
    calibration = _load_calibration(args)
    assignment = None
    if args.budget is not None:
        sensitivity.check_budget(args, pipe, config, calibration)
    if args.sensitivity is not None:
        assignment = sensitivity.assign(args, pipe, prompts, config, calibration)
    planned = plan(pipe, config, calibration, assignment=assignment)
    # an error stays the only line
    note(args, str(recognize(model)))
    if args.dry_run:
        print_result(args, planned.to_dict(), str(planned))
        return 0
    done, calibration = _quantize(args, pipe, config, prompts, planned, calibration, assignment)
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


def _quantize(
    args: argparse.Namespace,
    pipe: TextToAudioPipeline,
    config: QuantConfig,
    prompts: list[str] | None,
    planned: QuantPlan,
    calibration: Calibration | None,
    assignment: Mapping[str, str] | None,
) -> tuple[QuantPlan, Calibration | None]:
    """Calibrate, measure and quantize, as far as it was not done before."""
    from ptq4adm.quantization import quantize

    with tempfile.TemporaryDirectory() as temporary:
        if args.rounding != "nearest" and args.inputs is None:
            args.inputs = Path(temporary) / "inputs.safetensors"
        if calibration is None and args.activation == "static":
            texts = prompts if args.augment is None else _augmented(args, pipe, prompts)
            calibration = _calibrate(args, pipe, texts, planned)
        if args.budget is not None and assignment is None:
            assignment = sensitivity.assign(args, pipe, prompts, config, calibration)
        done = quantize(
            pipe,
            config,
            calibration,
            inputs=None if args.rounding == "nearest" else args.inputs,
            assignment=assignment,
            progress=not args.quiet,
        )
    if args.correction:
        _correct(args, pipe, prompts)
    return done, calibration


def _correct(
    args: argparse.Namespace, pipe: TextToAudioPipeline, prompts: Sequence[str] | None
) -> None:
    from ptq4adm.quantization import load_pipeline

    reference = load_pipeline(
        model_folder(args.model), device=args.device, **original_options(args)
    )
    from ptq4adm.correcting import fit_correction

    pipe.correction = fit_correction(
        pipe,
        reference,
        prompts,
        steps=args.steps,
        guidance=args.guidance,
        # other noise than the calibration's
        seed=args.seed + _CORRECTION_SEED,
        progress=not args.quiet,
    )


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
    from ptq4adm.calibrating import calibration_steps
    from ptq4adm.calibration import default_prompts
    from ptq4adm.quantization import calibrate

    texts = default_prompts() if prompts is None else list(prompts)
    steps = calibration_steps(pipe.defaults) if args.steps is None else args.steps
    buckets = min(DEFAULT_BUCKETS, steps) if args.buckets is None else args.buckets
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
