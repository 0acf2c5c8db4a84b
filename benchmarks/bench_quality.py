"""Paired quality of the shipped pipeline: the same prompts and seeds in float, W8A8 and W4A8.

    python benchmarks/bench_quality.py [--prompts 80] [--threads 2]

The prompts are the 80 held-out ones of training/captions.py (eight of each of ten classes), none of
them seen in training or calibration. Latent SQNR and log-mel distance compare a clip with the float
clip of the same prompt and seed; "same class" asks the nearest-centroid classifier of
training/classifier.npz whether it names both alike. Rows go to benchmarks/results/quality.csv, one
a variant, and every clip's numbers to benchmarks/results/quality-clips.csv.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import ptq4adm
from ptq4adm.bench import append_rows, environment
from ptq4adm.evaluation.mel import log_mel
from ptq4adm.evaluation.paired import latent_sqnr_db, log_mel_distance_db
from ptq4adm.nn import resident_bytes

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "training"))
from captions import heldout_prompts  # noqa: E402 - a script folder, not a package
from classifier import NearestCentroid, features  # noqa: E402

BATCH = 10
VARIANTS = {
    "W8A8": ptq4adm.QuantConfig(scheme="w8a8"),
    "W4A8": ptq4adm.QuantConfig(scheme="w4a8"),
    "W4A8, uniform": ptq4adm.QuantConfig(scheme="w4a8", protect_sensitive=False),
    "W4A8, groups of 64": ptq4adm.QuantConfig(scheme="w4a8", group_size=64),
    "W4A8, dynamic scales": ptq4adm.QuantConfig(scheme="w4a8", activation="dynamic"),
}


def batches(prompts: list[str]) -> Iterator[tuple[int, list[str]]]:
    """First index and prompts of each batch."""
    for start in range(0, len(prompts), BATCH):
        yield start, prompts[start : start + BATCH]


def generate(pipe: ptq4adm.TextToAudioPipeline, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Latents [B, C, H, W] and waveforms [B, S]; prompt i has seed i."""
    latents, waves = [], []
    for start, part in batches(prompts):
        found = pipe.denoise(pipe.encode_prompts(part), seed=start)
        latents.append(found)
        waves.append(pipe.decode(found))
    return torch.cat(latents), torch.cat(waves)


def name_classes(classifier: NearestCentroid, waves: Tensor) -> list[str]:
    """The classifier's name for each waveform."""
    names: list[str] = classifier.predict(features(log_mel(waves)))
    return names


def float_bytes(unet: nn.Module) -> int:
    """Bytes of a float32 UNet."""
    return sum(p.numel() * 4 for p in unet.parameters())


def main() -> None:
    """Measure every variant and append the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=80)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--pipeline", type=Path, default=None, help="default: the shipped one")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder = arguments.pipeline or ptq4adm.shipped_pipeline_path()
    held_out = heldout_prompts()
    picked = held_out[:: max(1, len(held_out) // arguments.prompts)][: arguments.prompts]
    labels, prompts = [name for name, _ in picked], [text for _, text in picked]
    with np.load(ROOT / "training" / "classifier.npz") as arrays:
        classifier = NearestCentroid.from_dict(dict(arrays))
    pipe = ptq4adm.load_pipeline(folder)
    calibration = ptq4adm.calibrate(pipe, seed=1000)
    reference, reference_waves = generate(pipe, prompts)
    reference_names = name_classes(classifier, reference_waves)
    about = {**environment(ROOT), "pipeline": folder.name, "clips": len(prompts)}
    right = float(np.mean([a == b for a, b in zip(reference_names, labels, strict=True)]))
    rows = [
        {
            **about,
            "variant": "float",
            "unet_mb": float_bytes(pipe.unet) / 1e6,
            "right_class": right,
        }
    ]
    clips: list[dict[str, str | int | float]] = []
    for variant in arguments.variants:
        pipe = ptq4adm.load_pipeline(folder)
        ptq4adm.quantize(pipe, VARIANTS[variant], calibration)
        latents, waves = generate(pipe, prompts)
        names = name_classes(classifier, waves)
        sqnr = latent_sqnr_db(reference, latents)
        distance = log_mel_distance_db(reference_waves, waves)
        same = [a == b for a, b in zip(names, reference_names, strict=True)]
        rows.append(
            {
                **about,
                "variant": variant,
                "unet_mb": resident_bytes(pipe.unet) / 1e6,
                "sqnr_median_db": float(sqnr.median()),
                "sqnr_min_db": float(sqnr.min()),
                "mel_median_db": float(distance.median()),
                "same_class": float(np.mean(same)),
                "right_class": float(np.mean([a == b for a, b in zip(names, labels, strict=True)])),
            }
        )
        for i, prompt in enumerate(prompts):
            clips.append(
                {
                    "date": about["date"],
                    "commit": about["commit"],
                    "variant": variant,
                    "prompt": prompt,
                    "seed": i,
                    "class": labels[i],
                    "float_named": reference_names[i],
                    "named": names[i],
                    "sqnr_db": round(float(sqnr[i]), 3),
                    "mel_db": round(float(distance[i]), 3),
                }
            )
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()})
    append_rows(arguments.results / "quality.csv", rows)
    append_rows(arguments.results / "quality-clips.csv", clips)


if __name__ == "__main__":
    main()
