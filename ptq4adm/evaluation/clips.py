"""Sets of clips: waveforms of one sample rate, and folders of .wav files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ptq4adm.errors import AudioFileError, MissingComponentError, ShapeError

_PATTERN = "*.wav"


@dataclass(frozen=True)
class ClipSet:
    """Clips to evaluate.

    Attributes:
        waveforms: float [S] each, full scale is 1; `list(x)` makes them of a tensor [N, S].
        sample_rate: of all of them, Hz.
        name: shown in results.
        keys: what pairs a clip with one of another set, such as its file name; empty if the order
            does.
    """

    waveforms: Sequence[Tensor]
    sample_rate: int
    name: str
    keys: tuple[str, ...] = ()


def has_wav_files(folder: Path) -> bool:
    """Whether a path is a folder with .wav files in it."""
    return folder.is_dir() and any(folder.glob(_PATTERN))


def read_folder(folder: str | Path) -> ClipSet:
    """Read the .wav files of a folder in the order of their names; channels are averaged.

    Raises:
        MissingComponentError: if there is no such folder, or no .wav file in it.
        AudioFileError: if a file cannot be read, or is empty.
        ShapeError: if the files have different sample rates.
    """
    import soundfile

    folder = Path(folder)
    paths = sorted(folder.glob(_PATTERN)) if folder.is_dir() else []
    if not paths:
        raise MissingComponentError(
            f"{folder}: no .wav files; name a folder of clips (ptq4adm generate makes one), or the "
            "folder of a pipeline"
        )
    waveforms: list[Tensor] = []
    rates: dict[int, str] = {}
    for path in paths:
        try:
            samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        except (OSError, soundfile.LibsndfileError) as error:
            raise AudioFileError(
                f"{path}: cannot be read ({error}); copy it again, or move it away"
            ) from error
        if not len(samples):
            raise AudioFileError(f"{path}: holds no sample; move it away")
        rates.setdefault(int(rate), path.name)
        waveforms.append(torch.from_numpy(samples).mean(1))
    if len(rates) > 1:
        found = ", ".join(f"{rate} Hz ({name})" for rate, name in sorted(rates.items()))
        raise ShapeError(f"{folder}: sample rates differ: {found}; make them one")
    return ClipSet(waveforms, next(iter(rates)), str(folder), tuple(path.name for path in paths))
