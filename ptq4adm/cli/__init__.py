"""The command `ptq4adm`: parses, calls the library, prints; decides nothing.

Results go to standard output, progress and messages to standard error. Exit codes: 0 done, 1 an
error (one line says which), 2 a wrong command line, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence

import ptq4adm
from ptq4adm.cli import (
    bench,
    dispatch,
    doctor,
    evaluate,
    generate,
    inspect,
    prompts,
    quantize,
    report,
    sensitivity,
    tune,
)
from ptq4adm.errors import Ptq4admError

_COMMANDS = (
    prompts,
    sensitivity,
    quantize,
    generate,
    evaluate,
    report,
    inspect,
    bench,
    tune,
    dispatch,
    doctor,
)
EXIT_ERROR = 1
EXIT_SIGNAL = 128  # plus the signal's number
EXIT_INTERRUPTED = EXIT_SIGNAL + signal.SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; None for those of the process.

    Returns:
        The exit code.
    """
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:
        # argparse has printed the usage (2) or the help (0)
        return int(stop.code or 0)
    logging.basicConfig(format="ptq4adm: %(message)s", level=logging.WARNING)
    try:
        with _terminable():
            code: int = args.run(args)
            sys.stdout.flush()
    except SystemExit as stop:
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print(f"ptq4adm: interrupted; {args.when_interrupted}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # the reader of the output has left, as `head` does; keep the interpreter from flushing
        # again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    except (Ptq4admError, OSError, MemoryError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"ptq4adm: error: {message}", file=sys.stderr)
        return EXIT_ERROR
    return code


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Turn SIGTERM into an orderly exit, so that half-made files are cleaned up as at Ctrl-C."""

    def stop(number: int, _: object) -> None:
        raise SystemExit(EXIT_SIGNAL + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="ptq4adm",
        description="Quantize text-to-audio diffusion models: 4-bit weights, 8-bit activations.",
    )
    parser.add_argument("--version", action="version", version=f"ptq4adm {ptq4adm.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for module in _COMMANDS:
        module.add_command(commands)
    return parser
