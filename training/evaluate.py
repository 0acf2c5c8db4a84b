"""Judge a trained pipeline: does a held-out prompt give a sound of its class?

    python training/evaluate.py --pipeline ptq4adm/assets/audioldm-tiny --corpus build/corpus
    python training/evaluate.py --sweep     # guidance and steps, on captions of the valid split

Eight prompts a class are generated, turned into waveforms, and classified from their
log-mel. Beside it stand the same numbers for real clips, and for real clips through the
vocoder and through autoencoder and vocoder: what the denoiser could reach at best.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from captions import heldout_prompts
from card import evaluation_table, write_card
from classifier import NearestCentroid, features
from data import Clips, load_clips, load_mels
from diffusers import AudioLDMPipeline
from train import DEFAULT_OUTPUT, MANIFEST

from ptq4adm.evaluation.mel import log_mel

AUDIO_SECONDS = 2.56
CLASSIFIER = Path(__file__).resolve().parent / "classifier.npz"
GRID = ((1.0, 25), (1.5, 25), (2.0, 25), (2.5, 25), (3.5, 25), (2.5, 15), (2.5, 50))


def fit_classifier(clips: Clips, mels: np.ndarray) -> NearestCentroid:
    """The classifier of the real training clips."""
    rows = [row for row in clips.rows("train") if clips.classes[row]]
    return NearestCentroid.fit(mel_features(mels[rows]), [clips.classes[row] for row in rows])


def mel_features(mels: np.ndarray) -> np.ndarray:
    """Classifier features of float16 log-mels [clips, 256, 64], in batches."""
    batches = [
        features(torch.from_numpy(mels[i : i + 64].astype(np.float32)))
        for i in range(0, len(mels), 64)
    ]
    return np.concatenate(batches)


def generate(
    pipeline: AudioLDMPipeline,
    prompts: list[str],
    guidance: float,
    steps: int,
    seed: int = 0,
    batch: int = 20,
) -> torch.Tensor:
    """Waveforms of the prompts, float32 [len(prompts), 40960].

    Prompt i starts from the noise of ``seed + i``, whatever the batch.
    """
    shape = (pipeline.unet.config.in_channels, 32, 8)
    noise = torch.stack(
        [
            torch.randn(shape, generator=torch.Generator().manual_seed(seed + i))
            for i in range(len(prompts))
        ]
    )
    waves = []
    for start in range(0, len(prompts), batch):
        rows = slice(start, start + batch)
        result = pipeline(
            prompts[rows],
            audio_length_in_s=AUDIO_SECONDS,
            num_inference_steps=steps,
            guidance_scale=guidance,
            latents=noise[rows].clone(),
        )
        waves.append(torch.from_numpy(result.audios))
    return torch.cat(waves)


def resynthesise(pipeline: AudioLDMPipeline, mels: torch.Tensor, through_vae: bool) -> torch.Tensor:
    """Waveforms of real log-mels [B, 256, 64] by the vocoder, or by autoencoder and vocoder."""
    waves = []
    with torch.no_grad():
        for part in mels.split(16):
            if through_vae:
                part = pipeline.vae.decode(
                    pipeline.vae.encode(part[:, None]).latent_dist.mean
                ).sample[:, 0]
            waves.append(pipeline.vocoder(part))
    return torch.cat(waves)


def judge(classifier: NearestCentroid, mels: torch.Tensor, labels: list[str]) -> dict:
    """Accuracy, confusion and spread of log-mels [B, 256, 64] whose classes are known."""
    values = np.concatenate([features(part) for part in mels.split(64)])
    table = classifier.confusion(values, labels)
    return {
        "clips": len(labels),
        "accuracy": float(np.trace(table) / table.sum()),
        "confusion": table.tolist(),
        "spread": classifier.spread(values, labels),
    }


def evaluate(
    pipeline: AudioLDMPipeline, clips: Clips, mels: np.ndarray, guidance: float, steps: int
) -> dict:
    """Every number of the model card."""
    classifier = fit_classifier(clips, mels)
    rows = [row for row in clips.rows("test") if clips.classes[row]]
    labels = [clips.classes[row] for row in rows]
    real = torch.from_numpy(mels[rows].astype(np.float32))
    report: dict = {"classes": classifier.classes, "guidance": guidance, "steps": steps}
    report["real_test"] = judge(classifier, real, labels)
    for name, through_vae in (("vocoder", False), ("vae_vocoder", True)):
        again = log_mel(resynthesise(pipeline, real, through_vae))
        report[name] = judge(classifier, again, labels)
        report[name]["log_mel_l1"] = float((again - real).abs().mean())
    prompts = heldout_prompts()
    start = time.monotonic()
    waves = generate(pipeline, [text for _, text in prompts], guidance, steps)
    report["generated"] = judge(classifier, log_mel(waves), [name for name, _ in prompts])
    report["generated"]["seconds_a_clip"] = (time.monotonic() - start) / len(prompts)
    report["spread_ratio"] = {
        name: report["generated"]["spread"][name] / spread
        for name, spread in report["real_test"]["spread"].items()
    }
    report["spread_ratio_mean"] = float(np.mean(list(report["spread_ratio"].values())))
    return report


def sweep(pipeline: AudioLDMPipeline, clips: Clips, mels: np.ndarray, per_class: int) -> list[dict]:
    """Accuracy and spread over guidance scales and steps, on captions of the valid split."""
    classifier = fit_classifier(clips, mels)
    rows = [row for row in clips.rows("valid") if clips.classes[row]]
    real = judge(
        classifier,
        torch.from_numpy(mels[rows].astype(np.float32)),
        [clips.classes[row] for row in rows],
    )
    picked = [
        row
        for name in clips.class_names
        for row in [r for r in rows if clips.classes[r] == name][:per_class]
    ]
    labels, prompts = (
        [clips.classes[row] for row in picked],
        [clips.captions[row][0] for row in picked],
    )
    results = []
    for guidance, steps in GRID:
        found = judge(classifier, log_mel(generate(pipeline, prompts, guidance, steps)), labels)
        ratio = float(
            np.mean([found["spread"][name] / spread for name, spread in real["spread"].items()])
        )
        row = {
            "guidance": guidance,
            "steps": steps,
            "accuracy": found["accuracy"],
            "spread_ratio": ratio,
        }
        print(json.dumps(row), flush=True)
        results.append(row)
    return results


def main() -> None:
    """Parse the command line, judge the pipeline, write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pipeline", type=Path, default=DEFAULT_OUTPUT)
    parser.add_argument("--corpus", type=Path, default=Path("build/corpus"))
    parser.add_argument(
        "--work", type=Path, default=Path("build/training"), help="where mels.npy is kept"
    )
    parser.add_argument("--guidance", type=float, default=2.5)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument(
        "--sweep", action="store_true", help="try guidance scales and steps instead"
    )
    parser.add_argument("--sweep-per-class", type=int, default=8)
    parser.add_argument(
        "--out", type=Path, help="JSON report; default evaluation.json in the pipeline's folder"
    )
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clips = load_clips(args.corpus)
    mels = load_mels(clips, args.work)
    pipeline = AudioLDMPipeline.from_pretrained(args.pipeline, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if args.sweep:
        report: dict | list = sweep(pipeline, clips, mels, args.sweep_per_class)
    else:
        report = evaluate(pipeline, clips, mels, args.guidance, args.steps)
        # kept beside the scripts: benchmarks judge quantized clips without the corpus
        np.savez_compressed(CLASSIFIER, **fit_classifier(clips, mels).to_dict())
        print(evaluation_table(report))
    name = "sweep.json" if args.sweep else "evaluation.json"
    path = args.out or args.pipeline / name
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    write_card(args.pipeline, args.work, MANIFEST)


if __name__ == "__main__":
    main()
