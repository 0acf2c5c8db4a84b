"""What the commands share: argument types, the model's folder, prompts from a file, output."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ptq4adm.errors import PromptError
from ptq4adm.models import shipped_pipeline_path

SHIPPED = "shipped"
BACKENDS = "auto, reference, cpu, triton or cuda"


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """--json, --quiet."""
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("--quiet", action="store_true", help="no progress bars, no estimates")


def add_layer_options(group: Any) -> None:
    """--override, --group-size, --weight-observer."""
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
        help="clip of weights: squared_error (default), p2.4 or absmax",
    )


def _override(text: str) -> tuple[str, str]:
    pattern, separator, scheme = text.rpartition("=")
    if not (separator and pattern and scheme):
        raise argparse.ArgumentTypeError(f"{text!r} is not PATTERN=SCHEME")
    return pattern, scheme


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """--backend, --device, --threads."""
    parser.add_argument(
        "--backend", default="auto", metavar="NAME", help=f"kernels to run on: {BACKENDS}"
    )
    parser.add_argument("--device", default="cpu", help="device of the model (default: cpu)")
    parser.add_argument(
        "--threads", type=whole_number, metavar="N", help="threads to compute with (default: all)"
    )


def add_original_options(parser: argparse.ArgumentParser) -> None:
    """--tokenizer, --heads, --ema."""
    group = parser.add_argument_group(
        "published files (a .ckpt file, or its folder)", "what they do not say themselves"
    )
    group.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="folder of the tokenizer, bert-base-uncased or roberta-base (default: the one of that "
        "name beside the .ckpt file)",
    )
    group.add_argument(
        "--heads",
        choices=("diffusers", "original"),
        help="AudioLDM: attention heads as diffusers' conversion has them (default), or as the "
        "original code",
    )
    group.add_argument(
        "--ema",
        action="store_true",
        default=None,
        help="AudioLDM: the averaged weights of the UNet, as the original code takes them",
    )


def original_options(args: argparse.Namespace) -> dict[str, Any]:
    """Those of `add_original_options` that were given."""
    options = {name: getattr(args, name) for name in ("tokenizer", "heads", "ema")}
    return {name: value for name, value in options.items() if value is not None}


def whole_number(text: str) -> int:
    """Argument type: at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def set_threads(count: int | None) -> None:
    """Follow --threads."""
    if count is not None:
        import torch

        torch.set_num_threads(count)


def model_folder(name: str) -> Path:
    """Folder of MODEL: "shipped" is the packaged pipeline, anything else a path.

    Raises:
        MissingComponentError: if the packaged pipeline is not installed.
    """
    return shipped_pipeline_path() if name == SHIPPED else Path(name)


def read_prompts(path: Path) -> list[str]:
    """Prompts of a text file, one a line; empty lines and lines that begin with # are passed over.

    Raises:
        PromptError: if the file cannot be read or holds none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(
            f"{path}: cannot read prompts ({error}); give a UTF-8 text file"
        ) from error
    prompts = [line.strip() for line in lines]
    prompts = [line for line in prompts if line and not line.startswith("#")]
    if not prompts:
        raise PromptError(f"{path}: no prompts; write one a line")
    return prompts


def print_result(args: argparse.Namespace, result: dict[str, Any], text: str) -> None:
    """Print the result as JSON or as text."""
    print(json.dumps(result, indent=2, allow_nan=False) if args.json else text)


def note(args: argparse.Namespace, message: str) -> None:
    """Tell a person something that is not the result."""
    if not args.quiet:
        print(message, file=sys.stderr, flush=True)
