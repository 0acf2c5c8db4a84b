"""`ptq4adm sensitivity`: what each layer's bits cost at the output, and what a budget buys."""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptq4adm.cli.options import (
    SHIPPED,
    add_layer_options,
    add_original_options,
    add_output_options,
    add_run_options,
    model_folder,
    original_options,
    print_result,
    read_prompts,
    set_threads,
    whole_number,
)
from ptq4adm.config import DEFAULT_PAIRS, QuantConfig

if TYPE_CHECKING:
    from ptq4adm.calibration import Calibration
    from ptq4adm.models import TextToAudioPipeline
    from ptq4adm.sensitivity import Sensitivity

_MB = 1e6
_WORST = 10
# measured on the pairs themselves, so they are spread over the steps alike
INPUTS_STRATEGY = "uniform-steps"


def add_command(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "sensitivity",
        help="measure what each layer's bits cost, and assign bits under a size budget",
        description="Quantize one layer of the UNet at a time, compare the predictions with the "
        "float model's, and write the errors as JSON; with --budget also which layer takes which "
        "bits, and the curve of error against size.",
    )
    parser.add_argument(
        "model",
        nargs="?",
        default=SHIPPED,
        metavar="MODEL",
        help="float pipeline: a folder, published files, or 'shipped' (default)",
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="JSON file to write"
    )
    add_budget_option(parser)
    parser.add_argument(
        "--pairs",
        type=whole_number,
        default=DEFAULT_PAIRS,
        metavar="N",
        help=f"(prompt, step) pairs to compare on (default: {DEFAULT_PAIRS})",
    )
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="prompts, one a line (default: a listed set)"
    )
    add_layer_options(parser)
    parser.add_argument(
        "--observer",
        default=QuantConfig.activation_observer,
        metavar="NAME",
        help=f"activation scales, as of quantize (default: {QuantConfig.activation_observer})",
    )
    parser.add_argument(
        "--steps",
        type=whole_number,
        metavar="N",
        help="denoising steps (default: the pipeline's, at most 25)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the first prompt (default: 0)")
    add_original_options(parser)
    add_run_options(parser)
    add_output_options(parser)
    parser.set_defaults(run=run, when_interrupted="nothing was written; run the same command again")


def add_budget_option(parser: Any) -> None:
    """--budget."""
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SIZE",
        help="largest size of the UNet: up to 1 a share of its float16 bytes (0.30), above 1 in MB",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    config = QuantConfig(
        overrides=dict(args.override),
        weight_observer=args.weight_observer,
        activation_observer=args.observer,
        group_size=args.group_size,
        backend=args.backend,
    )
    prompts = None if args.prompts is None else read_prompts(args.prompts)

    from ptq4adm.calibration.files import check_output_file
    from ptq4adm.models.components import check_device
    from ptq4adm.ops import resolve_backend
    from ptq4adm.quantization import calibrate, load_pipeline

    # everything that can be refused is refused before the minutes of measuring
    check_output_file(args.output)
    check_device(args.device)
    resolve_backend(args.backend, args.device)
    set_threads(args.threads)
    start = time.monotonic()
    pipe = load_pipeline(model_folder(args.model), device=args.device, **original_options(args))
    run_settings = {"steps": args.steps, "seed": args.seed, "progress": not args.quiet}
    if args.budget is not None:
        check_budget(args, pipe, config, None)
    calibration = calibrate(pipe, prompts, **run_settings)
    measured = measure(args, pipe, prompts, config, calibration, pairs=args.pairs)
    measured.save(args.output)
    seconds = time.monotonic() - start
    print_result(
        args,
        {"command": "sensitivity", "output": str(args.output), "seconds": round(seconds, 2)}
        | measured.to_dict(),
        f"{describe(measured)}\nwrote {args.output} in {seconds:.0f} s",
    )
    return 0


def measure(
    args: argparse.Namespace,
    pipe: TextToAudioPipeline,
    prompts: list[str] | None,
    config: QuantConfig,
    calibration: Calibration | None,
    *,
    pairs: int = DEFAULT_PAIRS,
) -> Sensitivity:
    """Record inputs and measure on them; with a budget also assign.

    Args:
        args: of a command with --steps, --seed, --quiet and --budget; --guidance if it has one.
        pipe: float.
        prompts: None for the listed ones.
        config: how layers are quantized.
        calibration: None with dynamic scales.
        pairs: to compare on.
    """
    from ptq4adm.calibrating import calibration_steps
    from ptq4adm.calibration import ChosenInputs, default_prompts
    from ptq4adm.quantization import calibrate
    from ptq4adm.sensitivity import choose, measure_sensitivity

    progress = not args.quiet
    texts = default_prompts() if prompts is None else prompts
    steps = calibration_steps(pipe.defaults) if args.steps is None else args.steps
    guidance = getattr(args, "guidance", None)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "inputs.safetensors"
        calibrate(
            pipe,
            texts,
            steps=steps,
            guidance=guidance,
            seed=args.seed,
            strategy=INPUTS_STRATEGY,
            size=min(pairs, steps * len(texts)),
            inputs=file,
            buckets=1,
            progress=progress,
        )
        inputs = ChosenInputs.load(file)
    found = measure_sensitivity(
        pipe, calibration, inputs, config, pairs=pairs, guidance=guidance, progress=progress
    )
    return found if args.budget is None else choose(found, args.budget)


def check_budget(
    args: argparse.Namespace,
    pipe: TextToAudioPipeline,
    config: QuantConfig,
    calibration: Calibration | None,
) -> None:
    """Refuse a --budget that cannot be met, before anything is measured."""
    from ptq4adm.quantization import plan
    from ptq4adm.sensitivity import budget_bytes

    # a budget decides for the sensitive layers, too
    smallest = plan(pipe, replace(config, scheme="w4a8", protect_sensitive=False), calibration)
    budget_bytes(args.budget, smallest.bytes_before, smallest.bytes_after)


def assign(
    args: argparse.Namespace,
    pipe: TextToAudioPipeline,
    prompts: list[str] | None,
    config: QuantConfig,
    calibration: Calibration | None,
) -> dict[str, str]:
    """Schemes under --budget, of the errors in --sensitivity, or measured now."""
    from ptq4adm.sensitivity import Sensitivity, assign_schemes, resize

    if args.sensitivity is None:
        measured = measure(args, pipe, prompts, config, calibration)
    else:
        measured = resize(Sensitivity.load(args.sensitivity), pipe, calibration, config)
    return assign_schemes(measured, args.budget)


def describe(sensitivity: Sensitivity) -> str:
    """The layers that cost most, and the curve, as text."""
    layers = sorted(sensitivity.layers, key=lambda layer: -layer.error["w4a8"])
    lines = [
        f"{len(layers)} layers, {sensitivity.pairs} pairs; relative squared error of the output:",
        *(
            f"  {x.name}: {x.error['w4a8']:.2e} at w4a8, {x.error['w8a8']:.2e} at w8a8"
            for x in layers[:_WORST]
        ),
    ]
    if len(layers) > _WORST:
        lines.append(f"  and {len(layers) - _WORST} more")
    if sensitivity.chosen is not None:
        counts: dict[str, int] = {}
        for scheme in sensitivity.chosen.values():
            counts[scheme] = counts.get(scheme, 0) + 1
        size = sensitivity.size_of(sensitivity.chosen)
        lines.append(
            f"assigned: {', '.join(f'{n} {s}' for s, n in sorted(counts.items()))}; "
            f"{size / _MB:.2f} MB, {size / sensitivity.float16_bytes:.3f} of float16"
        )
        lines.append("size over float16, predicted error:")
        lines += [f"  {point.size_ratio:.3f}  {point.error:.2e}" for point in sensitivity.pareto]
    return "\n".join(lines)
