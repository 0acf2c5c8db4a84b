"""Train the shipped pipeline from a rendered corpus.

    python training/train.py --corpus build/corpus --work build/training --minutes 100

runs every stage in order: text, vae, latents, decoder, unet, vocoder, assemble. Every stage can be
stopped and goes on from its checkpoint; a finished one is skipped. On a machine with two
cores run the vocoder beside the others: ``--stages vocoder`` in a second process.
"""

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
from assemble import assemble
from card import write_card
from data import Clips, load_clips, load_mels, save_array
from diffusers import AutoencoderKL
from loop import Budget, Trainer
from text import embed, nearest_class_accuracy, train_text, vary
from transformers import ClapTextModelWithProjection, RobertaTokenizerFast
from unet import Conditions, train_unet
from vae import (
    encode_moments,
    freeze_encoder,
    reconstruction_error,
    train_decoder,
    train_vae,
)
from vocoder import train_vocoder

STAGES = ("text", "vae", "latents", "decoder", "unet", "vocoder", "assemble")
SHARES = {"text": 0.05, "vae": 0.13, "decoder": 0.12, "unet": 0.45, "vocoder": 0.25}
DEFAULT_OUTPUT = Path(__file__).resolve().parent.parent / "ptq4adm" / "assets" / "audioldm-tiny"

MANIFEST = Path(__file__).resolve().parent / "manifest.json"


def run_stage(stage: str, clips: Clips, args: argparse.Namespace) -> None:
    """Run one stage unless its result is there."""
    folder = args.work / stage
    if (folder / "model").exists():
        print(f"{stage}: finished before", flush=True)
        return
    minutes = args.minutes * SHARES.get(stage, 0.0)
    if stage == "latents":
        _encode_latents(clips, args)
        return
    if stage == "unet":
        _train_unet(clips, args, minutes)
        return
    mels, train, test = load_mels(clips, args.work), clips.rows("train"), clips.rows("test")
    if stage == "text":
        train_text(clips, mels, folder, minutes, args.device)
        prompts = [
            (clips.classes[row], text)
            for row in test
            if clips.classes[row]
            for text in clips.captions[row]
        ]
        _report(folder, nearest_class_accuracy(folder, clips, prompts))
    elif stage in ("vae", "decoder"):
        if stage == "vae":
            train_vae(mels[train], folder, minutes, args.device, half=not args.full_precision)
        else:
            _train_decoder(mels[train], train, args, minutes)
        vae = AutoencoderKL.from_pretrained(folder / "model").eval()
        _report(folder, {"test_l1": reconstruction_error(vae, mels[test[:200]])})
    else:
        train_vocoder(
            clips.audio[train],
            mels[train],
            folder,
            minutes,
            args.device,
            half=not args.full_precision,
        )


def _report(folder: Path, numbers: dict[str, float]) -> None:
    print(f"{folder.name}: {json.dumps(numbers)}", flush=True)
    (folder / "report.json").write_text(json.dumps(numbers) + "\n", encoding="utf-8")


def _encode_latents(clips: Clips, args: argparse.Namespace) -> None:
    path = args.work / "latents.npy"
    if path.exists():
        print("latents: finished before", flush=True)
        return
    start = time.monotonic()
    vae = AutoencoderKL.from_pretrained(args.work / "vae" / "model").eval().to(args.device)
    moments = encode_moments(vae, load_mels(clips, args.work), args.device)
    save_array(path, torch.stack(moments).numpy())
    print(f"latents: {len(clips.audio)} clips in {time.monotonic() - start:.0f} s", flush=True)


def _train_decoder(
    mels: np.ndarray, train: np.ndarray, args: argparse.Namespace, minutes: float
) -> None:
    vae = AutoencoderKL.from_pretrained(args.work / "vae" / "model").to(args.device)
    budget = Budget(minutes, 1e-3, ema_decay=0.995)
    trainer = Trainer(freeze_encoder(vae), budget, args.work / "decoder", args.device)
    means, scales = torch.from_numpy(np.load(args.work / "latents.npy"))[:, torch.from_numpy(train)]
    train_decoder(vae, (means, scales), mels, trainer)


def _train_unet(clips: Clips, args: argparse.Namespace, minutes: float) -> None:
    train = clips.rows("train")
    means, scales = torch.from_numpy(np.load(args.work / "latents.npy"))
    tokenizer = RobertaTokenizerFast.from_pretrained(args.work / "text" / "tokenizer")
    encoder = ClapTextModelWithProjection.from_pretrained(args.work / "text" / "model").eval()
    rng = random.Random(args.seed)
    texts = [
        clips.captions[row] + [vary(text, rng) for text in clips.captions[row]] for row in train
    ]
    captions = sorted({text for row in texts for text in row})
    number = {text: i for i, text in enumerate(captions)}
    owners = [[number[text] for text in row] for row in texts]
    embeddings = embed(encoder, tokenizer, [*captions, ""])
    conditions = Conditions(embeddings[:-1], owners, embeddings[-1])
    moments = means[torch.from_numpy(train)], scales[torch.from_numpy(train)]
    train_unet(
        moments,
        conditions,
        args.work / "unet",
        minutes,
        args.device,
        args.batch,
        not args.full_precision,
    )


def main() -> None:
    """Parse the command line and run the stages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, default=Path("build/corpus"))
    parser.add_argument(
        "--work", type=Path, default=Path("build/training"), help="checkpoints and finished parts"
    )
    parser.add_argument(
        "--output", type=Path, default=DEFAULT_OUTPUT, help="folder of the assembled pipeline"
    )
    parser.add_argument(
        "--minutes", type=float, default=100.0, help="wall-clock budget of all stages together"
    )
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=16, help="batch of the UNet")
    parser.add_argument("--full-precision", action="store_true", help="no bfloat16")
    parser.add_argument(
        "--guidance", type=float, default=2.5, help="default guidance scale of the pipeline"
    )
    parser.add_argument(
        "--steps", type=int, default=25, help="default number of steps of the pipeline"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    if set(args.stages) - {"assemble"}:
        clips = load_clips(args.corpus)
        for stage in (name for name in STAGES if name in args.stages and name != "assemble"):
            run_stage(stage, clips, args)
    if "assemble" in args.stages:
        sizes = assemble(args.work, args.output, args.guidance, args.steps)
        write_card(args.output, args.work, MANIFEST)
        print(f"{args.output}: {sum(sizes.values()) / 1e6:.1f} MB, {json.dumps(sizes)}")


if __name__ == "__main__":
    main()
