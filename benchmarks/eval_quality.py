"""The comparison: quantized models of the shipped pipeline against the same real clips.

    python training/corpus.py --split test --out build/corpus-test      # 300 real clips
    python benchmarks/eval_quality.py [--seeds 3] [--variants NAME ...] [--clips 300]

Every variant makes one clip for the first caption of every test clip, none of them used in training
or calibration, from noise that all variants share. Clips are kept under --work, so that a run that
was stopped goes on, and a new metric needs no new clips; rows go to benchmarks/results/quality-eval.csv,
one a variant, seed and embedding. FD, KD and their like compare with the real clips; SQNR, mel
distance and cosine with the float model's clip of the same caption and noise.
"""  # noqa: E501 - a path

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ptq4adm
from ptq4adm.bench import append_rows, environment
from ptq4adm.nn import resident_bytes
from ptq4adm.packing.checkpoint import is_quantized

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "training"))
sys.path.insert(0, str(ROOT / "benchmarks"))
from compact import load_corpus  # noqa: E402 - a script folder, not a package
from eval_metrics import Clips, Judge  # noqa: E402
from eval_variants import VARIANTS, Maker, Variant  # noqa: E402

BATCH = 10
# noise of seed s starts at s * STRIDE: seeds share none
STRIDE = 100_000


def main() -> None:
    """Generate what is missing, judge, append the rows."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    audio, listed = load_corpus(arguments.corpus)
    captions = [clip["captions"][0] for clip in listed[: arguments.clips]]
    classes = [clip["class"] for clip in listed[: arguments.clips]]
    real = torch.from_numpy(audio[: arguments.clips].astype(np.float32) / 32767.0)
    maker = Maker(ptq4adm.shipped_pipeline_path(), arguments.work / "made", arguments.sensitivity)
    digest = hashlib.sha256(json.dumps(captions).encode()).hexdigest()[:12]
    clips = arguments.work / f"clips-{len(captions)}-{digest}"
    for name in dict.fromkeys(["float", *arguments.variants]):
        folder = clips / VARIANTS[name].key()
        _generate(maker, VARIANTS[name], captions, arguments.seeds, folder)
        print(f"{name}: clips are made", flush=True)
    if arguments.only_generate:
        return
    machine = environment(ROOT)
    judge = Judge(
        real,
        classes,
        dict(arguments.embeddings),
        ROOT / "training" / "classifier.npz",
        arguments.work / "embedded",
    )
    rows: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        base = _read(clips / VARIANTS["float"].key(), seed)
        for name in arguments.variants:
            folder = clips / VARIANTS[name].key()
            about = {"variant": name, "group": VARIANTS[name].group, "seed": seed}
            made = json.loads((folder / f"{seed}.json").read_text())
            for found in judge.rows(_read(folder, seed), base):
                row = {**about, "clips": len(captions), **made, **found}
                print(row, flush=True)
                rows.append({**machine, **row})
    append_rows(arguments.results / "quality-eval.csv", rows)


def _generate(
    maker: Maker, variant: Variant, captions: list[str], seeds: int, folder: Path
) -> None:
    """Make one variant's clips, of the seeds that are missing."""
    missing = [seed for seed in range(seeds) if not (folder / f"{seed}.json").is_file()]
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    pipe, cost = maker.make(variant)
    made = {k: round(v, 1) for k, v in asdict(cost).items()}
    # a float UNet is counted in float16
    float_bytes = 2 * sum(p.numel() for p in pipe.unet.parameters())
    size = resident_bytes(pipe.unet) if is_quantized(pipe.unet) else float_bytes
    made |= {"unet_mb": round(size / 1e6, 3), "made_by": environment(ROOT)["commit"]}
    for seed in missing:
        latents, waves = [], []
        for first, part in _batches(captions):
            found = pipe.denoise(pipe.encode_prompts(part), seed=seed * STRIDE + first)
            latents.append(found.numpy())
            waves.append((pipe.decode(found).clamp(-1, 1) * 32767).round().to(torch.int16).numpy())
        arrays = {"latents": np.concatenate(latents), "waves": np.concatenate(waves)}
        np.savez(folder / f"{seed}.npz", **arrays)
        # written last: it says that the clips are whole
        (folder / f"{seed}.json").write_text(json.dumps(made))


def _batches(captions: list[str]) -> Iterator[tuple[int, list[str]]]:
    for first in range(0, len(captions), BATCH):
        yield first, captions[first : first + BATCH]


def _read(folder: Path, seed: int) -> Clips:
    with np.load(folder / f"{seed}.npz") as arrays:
        waves: Tensor = torch.from_numpy(arrays["waves"].astype(np.float32) / 32767.0)
        return Clips(torch.from_numpy(arrays["latents"]), waves)


def _embedding(text: str) -> tuple[str, Path | None]:
    name, separator, path = text.partition("=")
    return name, Path(path) if separator else None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=ROOT / "build" / "corpus-test")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "eval")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument(
        "--embeddings",
        nargs="*",
        type=_embedding,
        default=[("musicnn-MTT", ROOT / ".venv" / "musicnn" / "musicnn")],
        metavar="NAME[=WEIGHTS]",
        help="with the folder, wheel or file of its weights (default: musicnn-MTT)",
    )
    parser.add_argument(
        "--sensitivity",
        type=Path,
        default=ROOT / "benchmarks" / "results" / "sensitivity-audioldm-tiny.json",
        help="errors of the layers, of ptq4adm sensitivity",
    )
    parser.add_argument("--only-generate", action="store_true", help="judge later")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--clips", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
