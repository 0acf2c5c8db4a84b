"""The text side: a byte-level tokenizer and a small CLAP text encoder.

The encoder is trained with an audio encoder on the log-mels (symmetric contrastive loss)
and a classifier of the sound class that both share. The audio encoder is not shipped.
"""

import itertools
import json
import random
from pathlib import Path

import numpy as np
import torch
from captions import heldout_prompts
from data import Clips, mel_statistics
from loop import Budget, Trainer
from tokenizers import ByteLevelBPETokenizer
from torch import nn
from torch.nn import functional
from transformers import ClapTextConfig, ClapTextModelWithProjection, RobertaTokenizerFast

EMBED_DIM = 128
MAX_TOKENS = 64
NO_CLASS = -100
HELD_OUT = frozenset(prompt.lower() for _, prompt in heldout_prompts())
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]  # Roberta's order: pad is 1


def build_tokenizer(captions: list[str], vocab_size: int = 1000) -> RobertaTokenizerFast:
    """A byte-level BPE tokenizer of the captions; any text has tokens."""
    bpe = ByteLevelBPETokenizer()
    cased = captions + [c[:1].upper() + c[1:] for c in captions[::4]]
    bpe.train_from_iterator(
        cased, vocab_size=vocab_size, min_frequency=2, special_tokens=SPECIAL_TOKENS
    )
    vocab = bpe.get_vocab()
    merges = [tuple(pair) for pair in _merges(bpe)]
    return RobertaTokenizerFast(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def _merges(bpe: ByteLevelBPETokenizer) -> list[list[str]]:
    pairs = json.loads(bpe.to_str())["model"]["merges"]
    return [pair.split(" ") if isinstance(pair, str) else pair for pair in pairs]


def build_text_encoder(vocab_size: int) -> ClapTextModelWithProjection:
    """Two layers of width 128.

    128 positions are needed though prompts have 64 tokens: AudioLDMPipeline pads the
    negative prompt to the width of the embedding.
    """
    config = ClapTextConfig(
        vocab_size=vocab_size,
        hidden_size=EMBED_DIM,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=4 * EMBED_DIM,
        projection_dim=EMBED_DIM,
        max_position_embeddings=EMBED_DIM + 8,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )
    return ClapTextModelWithProjection(config)


class AudioEncoder(nn.Module):
    """Log-mel [B, 256, 64] to an embedding [B, 128]."""

    def __init__(self, mean: float, scale: float):
        super().__init__()
        self.mean, self.scale = mean, scale
        widths = (1, 24, 48, 96, 128)
        self.layers = nn.ModuleList(
            nn.Conv2d(
                a, b, 5 if a == 1 else 3, stride=(4, 2) if a == 1 else 2, padding=2 if a == 1 else 1
            )
            for a, b in itertools.pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in widths[1:])
        self.out = nn.Sequential(nn.Linear(128 * 4 * 2, 256), nn.SiLU(), nn.Linear(256, EMBED_DIM))

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        """Embed a batch of log-mels (not normalised to unit length)."""
        hidden = ((mel - self.mean) / self.scale)[:, None]
        for layer, norm in zip(self.layers, self.norms, strict=True):
            hidden = functional.silu(norm(layer(hidden)))
        pooled = torch.cat([hidden.mean(2), hidden.amax(2)], dim=1)  # [B, 256, 4]
        return self.out(pooled.flatten(1))


class Clap(nn.Module):
    """Text encoder, audio encoder and the class head over both."""

    def __init__(self, text: ClapTextModelWithProjection, audio: AudioEncoder, classes: int):
        super().__init__()
        self.text, self.audio = text, audio
        self.head = nn.Linear(EMBED_DIM, classes)
        self.log_scale = nn.Parameter(torch.tensor(2.3))


def embed(
    encoder: ClapTextModelWithProjection, tokenizer: RobertaTokenizerFast, texts: list[str]
) -> torch.Tensor:
    """Unit-length text embeddings, float32 [len(texts), 128], as AudioLDM computes them."""
    rows = []
    with torch.no_grad():
        for start in range(0, len(texts), 256):
            rows.append(
                functional.normalize(
                    _encode(encoder, tokenizer, texts[start : start + 256]), dim=-1
                ).float()
            )
    return torch.cat(rows).cpu()


def _encode(
    encoder: ClapTextModelWithProjection, tokenizer: RobertaTokenizerFast, texts: list[str]
) -> torch.Tensor:
    tokens = tokenizer(
        texts, padding=True, max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    )
    tokens = tokens.to(encoder.device)
    return encoder(tokens.input_ids, attention_mask=tokens.attention_mask).text_embeds


def vary(caption: str, rng: random.Random) -> str:
    """The caption as another person might type it: words missing, capitals, a full stop.

    Never a held-out prompt: where missing words would make one, none is left out.
    """
    choice = rng.random()
    if rng.random() < 0.4:
        words = caption.split()
        shorter = " ".join([word for word in words if rng.random() > 0.15] or words)
        caption = caption if shorter.lower().rstrip(".") in HELD_OUT else shorter
    if choice < 0.15:
        caption = caption[:1].upper() + caption[1:]
    elif choice < 0.2:
        caption = caption.upper()
    if rng.random() < 0.15:
        caption = caption + "."
    return caption


def train_text(
    clips: Clips, mels: np.ndarray, folder: Path, minutes: float, device: str, batch: int = 128
) -> None:
    """Train tokenizer and text encoder; save them under ``folder``.

    Args:
        clips: the corpus.
        mels: float16 [clips, 256, 64], of all its clips.
        folder: takes ``tokenizer/`` and ``model/`` besides checkpoint and curve.
        minutes: wall-clock budget.
        device: "cpu" or "cuda".
        batch: clips a step.
    """
    rows = clips.rows("train")
    tokenizer = build_tokenizer(sorted({text for row in rows for text in clips.captions[row]}))
    tokenizer.save_pretrained(folder / "tokenizer")
    mean, scale = mel_statistics(mels[rows])
    text = build_text_encoder(len(tokenizer))
    model = Clap(
        text, AudioEncoder(float(mean.mean()), float(scale.mean())), len(clips.class_names)
    ).to(device)
    trainer = Trainer(model, Budget(minutes, 1e-3, ema_decay=0.99), folder, device)
    rng = random.Random(trainer.step)
    labels = np.array(
        [clips.class_names.index(name) if name else NO_CLASS for name in clips.classes]
    )

    def compute_losses() -> dict[str, torch.Tensor]:
        picked = np.array(rng.sample(list(rows), min(batch, len(rows))))
        texts = [vary(rng.choice(clips.captions[row]), rng) for row in picked]
        mel = torch.from_numpy(mels[picked].astype(np.float32)).to(device)
        label = torch.from_numpy(labels[picked]).to(device)
        encoded = functional.normalize(_encode(model.text, tokenizer, [*texts, ""]), dim=-1)
        texts_e, empty = encoded[:-1], encoded[-1:]
        audio_e = functional.normalize(model.audio(mel), dim=-1)
        logits = model.log_scale.clamp(max=4.0).exp() * texts_e @ audio_e.T
        order = torch.arange(len(picked), device=device)
        contrast = 0.5 * (
            functional.cross_entropy(logits, order) + functional.cross_entropy(logits.T, order)
        )
        heads = model.head(10.0 * torch.cat([texts_e, audio_e]))
        classify = functional.cross_entropy(heads, torch.cat([label, label]), ignore_index=NO_CLASS)
        neutral = -functional.log_softmax(model.head(10.0 * empty), dim=-1).mean()
        apart = (functional.relu(texts_e @ empty.T) ** 2).mean()
        loss = contrast + 0.5 * classify + 0.1 * neutral + apart
        return {
            "loss": loss,
            "contrast": contrast,
            "classify": classify,
            "neutral": neutral,
            "apart": apart,
        }

    trainer.run(compute_losses)
    trainer.copy_average()
    text.eval().to("cpu").save_pretrained(folder / "model")


def nearest_class_accuracy(
    folder: Path, clips: Clips, prompts: list[tuple[str, str]]
) -> dict[str, float]:
    """How often a prompt lies nearest to the embedding centroid of its own class.

    Args:
        folder: of a finished `train_text`.
        clips: the corpus; its training captions make the centroids.
        prompts: (class, prompt) pairs.

    Returns:
        "accuracy", and "empty_cosine": the cosine of the empty prompt to its nearest centroid.
    """
    encoder = ClapTextModelWithProjection.from_pretrained(folder / "model").eval()
    tokenizer = RobertaTokenizerFast.from_pretrained(folder / "tokenizer")
    rows = [row for row in clips.rows("train") if clips.classes[row]]
    embeddings = embed(encoder, tokenizer, [clips.captions[row][0] for row in rows])
    names = clips.class_names
    owner = torch.tensor([names.index(clips.classes[row]) for row in rows])
    centroids = torch.stack([embeddings[owner == k].mean(0) for k in range(len(names))])
    centroids = functional.normalize(centroids, dim=-1)
    nearest = (embed(encoder, tokenizer, [prompt for _, prompt in prompts]) @ centroids.T).argmax(1)
    hits = sum(names[int(k)] == name for k, (name, _) in zip(nearest, prompts, strict=True))
    empty = embed(encoder, tokenizer, [""]) @ centroids.T
    return {"accuracy": hits / len(prompts), "empty_cosine": float(empty.max())}
