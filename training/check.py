"""Is a rendered corpus sound? Levels of every source, and what the classifier makes of it.

python training/check.py --corpus build/corpus --picture build/corpus/mels.png
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from classifier import NearestCentroid, features
from compact import load_corpus
from sources import SAMPLE_RATE
from vocabulary import CLASSES, VOCABULARIES

from ptq4adm.evaluation.mel import log_mel

REQUIRED_ACCURACY = 0.97
PICTURE_COLUMNS = 8
_CHUNK = 64


def _mels(audio: np.ndarray) -> torch.Tensor:
    """Log-mels of int16 clips, [clips, 256, 64]."""
    scaled = torch.from_numpy(np.asarray(audio, dtype=np.float32) / 32768.0)
    return log_mel(scaled)


def corpus_features(audio: np.ndarray, rows: list[int]) -> np.ndarray:
    """Classifier features of some clips, float32 [len(rows), D]."""
    parts = [rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK)]
    return np.concatenate([features(_mels(audio[part])) for part in parts])


def _rows(clips: list[dict], split: str) -> list[int]:
    return [i for i, clip in enumerate(clips) if clip["class"] and clip["split"] == split]


def classify(audio: np.ndarray, clips: list[dict]) -> tuple[NearestCentroid, np.ndarray]:
    """Fit on the train split; the classifier and its confusion on the test split."""
    train, test = _rows(clips, "train"), _rows(clips, "test")
    model = NearestCentroid.fit(corpus_features(audio, train), [clips[i]["class"] for i in train])
    table = model.confusion(corpus_features(audio, test), [clips[i]["class"] for i in test])
    return model, table


def levels(audio: np.ndarray, clips: list[dict]) -> dict[str, dict[str, float]]:
    """Per source: clips, RMS in dB, clipped samples, spectral centroid, latest onset."""
    report = {}
    hz = np.fft.rfftfreq(audio.shape[1], 1.0 / SAMPLE_RATE)
    for source in VOCABULARIES:
        rows = [i for i, clip in enumerate(clips) if clip["sources"] == [source]][:200]
        if not rows:
            continue
        x = audio[rows].astype(np.float64) / 32768.0
        power = np.abs(np.fft.rfft(x, axis=1)) ** 2
        peak = np.abs(x).max(1, keepdims=True)
        onset = (np.abs(x) > 0.05 * peak).argmax(1) / SAMPLE_RATE
        report[source] = {
            "clips": len(rows),
            "rms_db": float(np.median(20 * np.log10(np.sqrt((x**2).mean(1)) + 1e-9))),
            "clipped": int((np.abs(x) >= 1.0 - 2**-15).sum()),
            "centroid_hz": float(np.median((power * hz).sum(1) / power.sum(1))),
            "latest_onset": float(onset.max()),
        }
    return report


def save_picture(audio: np.ndarray, clips: list[dict], path: Path) -> None:
    """A grid of mel spectrograms, one row a source, time to the right and frequency upwards."""
    import matplotlib.image

    picture = []
    for source in VOCABULARIES:
        rows = [i for i, clip in enumerate(clips) if clip["sources"] == [source]][:PICTURE_COLUMNS]
        cells = np.zeros((PICTURE_COLUMNS, 68, 260))
        if rows:
            mels = _mels(audio[rows])
            shown = (mels - mels.amax((1, 2), keepdim=True)).clamp(min=-7.0) / 7.0 + 1.0
            cells[: len(rows), 2:-2, 2:-2] = shown.transpose(1, 2).flip(1).numpy()
        picture.append(np.concatenate(list(cells), axis=1))
    matplotlib.image.imsave(path, np.concatenate(picture), cmap="magma")


def main() -> int:
    """Print the report; exit code 1 if the classifier misses `REQUIRED_ACCURACY`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, default=Path("build/corpus"), help="folder or tar")
    parser.add_argument("--picture", type=Path, help="also draw mel spectrograms into this PNG")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    audio, clips = load_corpus(arguments.corpus)
    model, table = classify(audio, clips)
    accuracy = float(np.trace(table) / table.sum())
    report = levels(audio, clips)
    if arguments.json:
        print(json.dumps({"accuracy": accuracy, "confusion": table.tolist(), "levels": report}))
    else:
        for source, row in report.items():
            print(
                f"{source:14s}" + "".join(f"  {name} {value:8.5g}" for name, value in row.items())
            )
        print(f"classes {', '.join(model.classes)}\n{table}")
        print(f"right class on the test split: {100 * accuracy:.1f} % of {table.sum()}")
    if arguments.picture:
        save_picture(audio, clips, arguments.picture)
    missing = set(CLASSES) - set(model.classes)
    return 0 if accuracy >= REQUIRED_ACCURACY and not missing else 1


if __name__ == "__main__":
    sys.exit(main())
