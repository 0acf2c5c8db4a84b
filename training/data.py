"""What the trainers read: the corpus, its log-mels and their statistics.

A corpus is a folder with ``audio.npy`` (int16 [S, 40960], 16 kHz) and ``clips.jsonl``
(one object a clip: index, split, class, captions). This module does not render it.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch

from ptq4adm.evaluation.mel import log_mel

CLIP_SAMPLES = 40960
CLIP_FRAMES = 256


@dataclasses.dataclass
class Clips:
    """Clips of one corpus, in the order of its audio file.

    Attributes:
        audio: int16 [clips, 40960], mapped from disk.
        splits: the split of each clip ("train", "test", ...).
        classes: the sound class of each clip; "" for mixtures and sounds outside the classes.
        captions: the captions of each clip, at least one.
    """

    audio: np.ndarray
    splits: list[str]
    classes: list[str]
    captions: list[list[str]]

    def rows(self, split: str) -> np.ndarray:
        """Indices of the clips of one split, int64 ascending."""
        return np.array([i for i, name in enumerate(self.splits) if name == split], dtype=np.int64)

    @property
    def class_names(self) -> list[str]:
        """The classes, sorted."""
        return sorted(set(self.classes) - {""})


def load_clips(corpus: Path) -> Clips:
    """Read a corpus folder.

    Raises:
        FileNotFoundError: if the folder holds no corpus.
        ValueError: if the manifest and the audio disagree.
    """
    corpus = Path(corpus)
    audio = np.load(corpus / "audio.npy", mmap_mode="r")
    with (corpus / "clips.jsonl").open(encoding="utf-8") as lines:
        clips = sorted(
            (json.loads(line) for line in lines if line.strip()), key=lambda clip: clip["index"]
        )
    if len(clips) != len(audio):
        raise ValueError(
            f"{corpus}: {len(clips)} clips in clips.jsonl but {len(audio)} in audio.npy"
        )
    return Clips(
        audio,
        [c["split"] for c in clips],
        [c["class"] or "" for c in clips],
        [c["captions"] for c in clips],
    )


def waveforms(audio: np.ndarray) -> torch.Tensor:
    """int16 samples as float32 in [-1, 1]."""
    return torch.from_numpy(audio.astype(np.float32) / 32768.0)


def load_mels(clips: Clips, work: Path) -> np.ndarray:
    """Log-mels of every clip, float16 [clips, 256, 64], computed once and kept in ``work``."""
    path = Path(work) / "mels.npy"
    if path.exists() and np.load(path, mmap_mode="r").shape[0] == len(clips.audio):
        return np.load(path)
    mels = np.empty((len(clips.audio), CLIP_FRAMES, 64), dtype=np.float16)
    for start in range(0, len(mels), 64):
        mels[start : start + 64] = log_mel(waveforms(clips.audio[start : start + 64])).numpy()
    save_array(path, mels)
    return mels


def save_array(path: Path, values: np.ndarray) -> None:
    """Write an array so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npy")
    np.save(partial, values)
    partial.replace(path)


def mel_statistics(mels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each mel bin, float32 [64] both, from at most 2000 clips."""
    sample = mels[:: max(1, len(mels) // 2000)].astype(np.float32)
    return sample.mean((0, 1)), sample.std((0, 1)).clip(min=0.1)


def write_fake_corpus(corpus: Path, clips: int = 400, seed: int = 0) -> None:
    """A corpus of chirps and noise in the right form, to try the trainers on."""
    corpus.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    seconds = np.arange(CLIP_SAMPLES) / 16000.0
    audio = np.empty((clips, CLIP_SAMPLES), dtype=np.int16)
    with (corpus / "clips.jsonl").open("w", encoding="utf-8") as manifest:
        for i in range(clips):
            kind = i % 10
            wave = np.sin(2 * np.pi * (200 + 150 * kind) * seconds * rng.uniform(0.9, 1.1))
            wave = wave * np.exp(-seconds * rng.uniform(0, 3)) + rng.normal(
                0, 0.01 * (1 + kind), CLIP_SAMPLES
            )
            audio[i] = (wave / np.abs(wave).max() * rng.uniform(3000, 30000)).astype(np.int16)
            captions = [
                f"a tone of kind {kind}",
                f"kind {kind}, {'short' if i % 3 else 'long'} tone",
            ]
            row = {
                "index": i,
                "split": "test" if i % 8 == 7 else "train",
                "class": f"kind{kind}",
                "captions": captions,
            }
            manifest.write(json.dumps(row) + "\n")
    np.save(corpus / "audio.npy", audio)
