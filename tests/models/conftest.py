"""Published files with random weights, for the tests of several families."""

from __future__ import annotations

from pathlib import Path

import pytest
from originals import checkpoints
from originals.checkpoints import TINY_MAKE_AN_AUDIO, Weights


@pytest.fixture(scope="session")
def make_an_audio_files(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Weights, Weights]:
    """Make-An-Audio's published folder, and the state dicts of checkpoint and vocoder: read it."""
    folder = tmp_path_factory.mktemp("files") / "useful_ckpts"
    return folder, *checkpoints.write_make_an_audio(folder, TINY_MAKE_AN_AUDIO)
