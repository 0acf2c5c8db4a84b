"""What the loaders of original checkpoints share: their yaml files, and where a tokenizer is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptq4adm.errors import CheckpointError, MissingComponentError


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one mapping; nothing but plain values.

    Raises:
        MissingComponentError: if there is no such file.
        CheckpointError: if it is not a yaml mapping, or asks for objects.
    """
    # PyYAML comes with transformers; only this needs it
    import yaml  # type: ignore[import-untyped]

    if not path.is_file():
        raise MissingComponentError(f"{path}: missing; copy it beside the weights")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        text = " ".join(str(error).split())
        raise CheckpointError(f"{path}: cannot be read as YAML ({text}); copy it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a mapping, got {type(content).__name__}")
    return content


def load_tokenizer(folders: Sequence[Path], what: str, option: str) -> Any:
    """Load the tokenizer from the first of several folders that is there.

    Args:
        folders: where it may be.
        what: its public name, for messages.
        option: how a caller names another folder, for messages.

    Raises:
        MissingComponentError: if none of them is there.
        CheckpointError: if it cannot be loaded.
    """
    from transformers import AutoTokenizer

    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is None:
        places = " or ".join(str(folder) for folder in folders)
        raise MissingComponentError(
            f"no tokenizer: looked for {places}; download {what} into one of them, or name its "
            f"folder with {option}"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    # a broken tokenizer raises all of these, by its class and by what is broken
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: cannot load the tokenizer ({error})") from error
