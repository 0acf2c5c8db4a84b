"""`ptq4adm evaluate`: how far two sets of clips are apart."""

from __future__ import annotations

import argparse
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
from ptq4adm.errors import ConfigError, PromptError

if TYPE_CHECKING:
    from ptq4adm.evaluation.clips import ClipSet
    from ptq4adm.evaluation.result import Evaluation

_BATCH = 8
_EMBEDDING = "musicnn-MTT"
# options without a default that pipelines alone look at
_OF_PIPELINES = ("prompts", "clips", "steps", "guidance")


def add_command(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "evaluate",
        help="distances between two sets of clips",
        description="Compare TEST with REFERENCE in the space of an embedding. Each is a folder of "
        ".wav files, or a pipeline, whose clips are then made from prompts and seeds.",
    )
    side = "folder of .wav files, pipeline folder, published files (.ckpt), or 'shipped'"
    parser.add_argument("reference", metavar="REFERENCE", help=side)
    parser.add_argument("test", metavar="TEST", help="the same, with as many clips")
    parser.add_argument(
        "--embedding",
        default=_EMBEDDING,
        metavar="NAME",
        help="musicnn-MTT, musicnn-MSD, cdpam, logmel-stats (no weights), cnn14-16k, vggish or "
        f"clap (default: {_EMBEDDING})",
    )
    parser.add_argument(
        "--weights", type=Path, metavar="PATH", help="file or folder of its weights"
    )
    parser.add_argument(
        "--paired",
        action="store_true",
        help="clip i of both is the same prompt and seed: adds the figures of pairs",
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="JSON file to write the result to"
    )
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep embedded clips there")
    _add_pipeline_options(parser)
    add_original_options(parser)
    add_run_options(parser)
    add_output_options(parser)
    parser.set_defaults(run=run, parser=parser, when_interrupted="nothing was written")


def _add_pipeline_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("clips of a pipeline")
    group.add_argument("--prompts", type=Path, metavar="FILE", help="prompts, one a line")
    group.add_argument(
        "--clips",
        type=whole_number,
        metavar="N",
        help="to make; prompts are repeated with other seeds (default: one a prompt)",
    )
    group.add_argument("--seed", type=int, default=0, help="of the first clip, the next has + 1")
    group.add_argument(
        "--steps", type=whole_number, metavar="N", help="denoising steps (default: the pipeline's)"
    )
    group.add_argument(
        "--guidance", type=float, metavar="G", help="guidance scale (default: the pipeline's)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from ptq4adm.calibration.files import check_output_file
    from ptq4adm.evaluation.embeddings import load_embedding
    from ptq4adm.evaluation.evaluate import evaluate

    if args.output is not None:
        check_output_file(args.output)
    _check_options(args)
    set_threads(args.threads)
    # before clips are made: missing weights are known at once
    embedding = load_embedding(args.embedding, args.weights)
    reference, test = (_clips(args, name) for name in (args.reference, args.test))
    result = evaluate(reference, test, embedding=embedding, paired=args.paired, cache=args.cache)
    text = describe(result)
    if args.output is not None:
        result.save(args.output)
        text += f"\nwrote {args.output}"
    print_result(args, result.to_dict(), text)
    return 0


def describe(result: Evaluation) -> str:
    """The figures as a table, and the warnings."""
    lines = [
        f"reference {result.reference}",
        f"test      {result.test}",
        f"{result.clips} clips each; embedding {result.embedding}, {result.dimension} features, "
        f"weights {result.weights[:16]}",
        "",
    ]
    width = max(len(metric.name) for metric in result.metrics)
    for m in result.metrics:
        unit = f" {m.unit}" if m.unit else ""
        lines.append(
            f"{m.name:<{width}}  {m.value:>10.4g}  [{m.low:.4g}, {m.high:.4g}]{unit}  {m.detail}"
        )
    lines.append(f"in brackets: {result.metrics[0].level:.0%} confidence")
    lines += [f"warning: {warning}" for warning in result.warnings]
    return "\n".join(lines)


def _clips(args: argparse.Namespace, name: str) -> ClipSet:
    """The clips of one side."""
    from ptq4adm.evaluation.clips import has_wav_files, read_folder

    path = Path(name)
    is_empty = not path.exists() or (path.is_dir() and not any(path.iterdir()))
    if name != SHIPPED and (is_empty or has_wav_files(path)):
        return read_folder(path)
    return _generate(args, name)


def _check_options(args: argparse.Namespace) -> None:
    """Refuse what would have no effect."""
    from ptq4adm.evaluation.clips import has_wav_files

    given = [name for name in _OF_PIPELINES if getattr(args, name) is not None]
    if given and all(has_wav_files(Path(name)) for name in (args.reference, args.test)):
        raise ConfigError(
            f"--{given[0]}: is for clips that a pipeline makes, and {args.reference} and "
            f"{args.test} are folders of clips; leave it out, or name a pipeline"
        )


def _generate(args: argparse.Namespace, name: str) -> ClipSet:
    from tqdm.auto import tqdm

    from ptq4adm.evaluation.clips import ClipSet
    from ptq4adm.models.conditioning import check_prompts
    from ptq4adm.quantization import load_pipeline

    if args.prompts is None:
        raise PromptError(f"{name}: a pipeline needs prompts to make clips from: --prompts FILE")
    prompts = check_prompts(read_prompts(args.prompts))
    count = args.clips or len(prompts)
    prompts = [prompts[i % len(prompts)] for i in range(count)]
    pipe = load_pipeline(
        model_folder(name), device=args.device, backend=args.backend, **original_options(args)
    )
    note(args, f"{name}: making {count} clips")
    starts = tqdm(
        range(0, count, _BATCH), desc="clips", unit="batch", disable=True if args.quiet else None
    )
    waveforms = [
        clip
        for start in starts
        for clip in pipe(
            prompts[start : start + _BATCH],
            steps=args.steps,
            guidance=args.guidance,
            seed=args.seed + start,
        )
    ]
    title = f"{name}, prompts {args.prompts.name}, seed {args.seed}"
    return ClipSet(waveforms, pipe.sampling_rate, title)
