"""`ptq4adm generate`: prompts to audio files."""

from __future__ import annotations

import argparse
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptq4adm.cli.options import (
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
from ptq4adm.errors import OutputError

if TYPE_CHECKING:
    from torch import Tensor

    from ptq4adm.models import TextToAudioPipeline

_SUFFIX = ".wav"


def add_command(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "generate",
        help="make audio from prompts",
        description="Make one clip a prompt, with a float or a quantized pipeline.",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="pipeline folder, published files (.ckpt), or 'shipped'"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="OUT",
        help="a .wav file for one prompt, a folder for any number",
    )
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="what to hear; repeatable"
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="prompts, one a line")
    parser.add_argument(
        "--steps", type=whole_number, metavar="N", help="denoising steps (default: the pipeline's)"
    )
    parser.add_argument(
        "--guidance", type=float, metavar="G", help="guidance scale (default: the pipeline's)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the first prompt, the next has seed + 1"
    )
    parser.add_argument(
        "--batch", type=whole_number, default=4, metavar="N", help="prompts at once (default: 4)"
    )
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="length of a clip (default: the model's)"
    )
    add_original_options(parser)
    add_run_options(parser)
    add_output_options(parser)
    parser.set_defaults(
        run=run, parser=parser, when_interrupted="files that are there are complete"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from ptq4adm.models.conditioning import check_prompts
    from ptq4adm.quantization import load_pipeline

    prompts = list(args.prompt) + (read_prompts(args.prompts) if args.prompts else [])
    prompts = check_prompts(prompts)
    is_file = args.output.suffix.lower() == _SUFFIX
    if is_file and len(prompts) > 1:
        args.parser.error(
            f"-o {args.output}: one file cannot hold {len(prompts)} clips; give a folder"
        )
    files = (
        [args.output] if is_file else [args.output / file_name(i, p) for i, p in enumerate(prompts)]
    )
    _prepare_folder(files[0].parent)
    set_threads(args.threads)
    pipe = load_pipeline(
        model_folder(args.model),
        device=args.device,
        backend=args.backend,
        **original_options(args),
    )
    start = time.monotonic()
    _generate(args, pipe, prompts, files)
    seconds = time.monotonic() - start
    steps = pipe.defaults.steps if args.steps is None else args.steps
    guidance = pipe.defaults.guidance if args.guidance is None else args.guidance
    clips = [
        {"prompt": prompt, "seed": args.seed + i, "file": str(file)}
        for i, (prompt, file) in enumerate(zip(prompts, files, strict=True))
    ]
    print_result(
        args,
        {"command": "generate", "clips": clips, "steps": steps, "guidance": guidance}
        | {"sampling_rate": pipe.sampling_rate, "seconds": round(seconds, 3)},
        "\n".join(str(clip["file"]) for clip in clips),
    )
    return 0


def file_name(index: int, prompt: str) -> str:
    """File name of a clip in a folder: its number and the first words of its prompt."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")
    return f"{index:02d}-{words[:40].strip('-') or 'clip'}{_SUFFIX}"


def write_wav(path: Path, waveform: Tensor, sampling_rate: int) -> None:
    """Write one clip as 16-bit PCM; an interrupted call leaves the old file or none.

    Args:
        path: the file.
        waveform: float32 [S]; what is beyond [-1, 1] is clipped.
        sampling_rate: samples a second.

    Raises:
        OutputError: if it cannot be written.
    """
    import soundfile

    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        soundfile.write(
            partial,
            waveform.clamp(-1.0, 1.0).numpy(),
            sampling_rate,
            subtype="PCM_16",
            format="WAV",
        )
        partial.replace(path)
    except (OSError, soundfile.LibsndfileError) as error:
        raise OutputError(f"{path}: cannot be written ({error}); choose another output") from error
    finally:
        partial.unlink(missing_ok=True)


def _generate(
    args: argparse.Namespace, pipe: TextToAudioPipeline, prompts: list[str], files: list[Path]
) -> None:
    from tqdm.auto import tqdm

    steps = pipe.defaults.steps if args.steps is None else args.steps
    batches = -(-len(prompts) // args.batch)
    with tqdm(
        total=steps * batches, desc="generate", unit="step", disable=True if args.quiet else None
    ) as bar:
        for first in range(0, len(prompts), args.batch):
            part = prompts[first : first + args.batch]
            waveforms = pipe(
                part,
                steps=steps,
                guidance=args.guidance,
                seed=args.seed + first,
                seconds=args.seconds,
                callback=lambda *_: bar.update(),
            )
            for file, waveform in zip(files[first:], waveforms, strict=False):
                write_wav(file, waveform, pipe.sampling_rate)


def _prepare_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made ({error}); choose another output") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{folder}: no permission to write; choose another output")
