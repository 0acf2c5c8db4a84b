"""Clips to features, a batch of one length at a time, and a cache of them.

A cache is a folder of safetensors files, one a set of clips and embedding. Its key is the sha256 of
the embedding's name and weights, the sample rate and every sample, so nothing in it goes stale.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ptq4adm.calibration.files import write_tensors
from ptq4adm.errors import EvaluationError, NonFiniteError, ShapeError
from ptq4adm.evaluation.embeddings import AudioEmbedding, Embedded
from ptq4adm.evaluation.resample import NAME as RESAMPLER
from ptq4adm.evaluation.resample import resample

_BATCH = 16
_FEATURES, _LOGITS = "features", "logits"


def embed_clips(
    clips: Sequence[Tensor],
    sample_rate: int,
    embedding: AudioEmbedding,
    *,
    cache: str | Path | None = None,
) -> Embedded:
    """Embed clips of any lengths, resampled to the rate of the embedding.

    Args:
        clips: float32 [S] each, full scale is 1.
        sample_rate: of the clips, Hz.
        embedding: what to embed them with.
        cache: folder to find or keep the result in; None keeps nothing.

    Returns:
        features and logits in the order of the clips.

    Raises:
        ShapeError: if there is no clip, one is not [S], or the embedding breaks its promises.
        NonFiniteError: if a clip holds NaN or infinity.
        EvaluationError: if a file of the cache is damaged.
        OutputError: if the cache cannot be written.
    """
    check_clips(clips)
    if cache is None:
        return _embed(clips, sample_rate, embedding)
    path = Path(cache) / f"{_key(clips, sample_rate, embedding)}.safetensors"
    if path.is_file():
        return _read(path, len(clips), embedding)
    found = _embed(clips, sample_rate, embedding)
    tensors = {_FEATURES: found.features}
    if found.logits is not None:
        tensors[_LOGITS] = found.logits
    header = {"embedding": embedding.name, "weights": embedding.weights}
    write_tensors(path, tensors, header, "embedded clips")
    return found


def check_clips(clips: Sequence[Tensor]) -> None:
    """Refuse what is no list of clips.

    Raises:
        ShapeError: if there is no clip, or one is not [S].
        NonFiniteError: if a clip holds NaN or infinity.
    """
    if not len(clips):
        raise ShapeError("clips: got none; give waveforms [S]")
    for i, clip in enumerate(clips):
        if clip.dim() != 1 or not len(clip):
            raise ShapeError(f"clip {i}: got {tuple(clip.shape)}; a waveform [S] is needed")
        if not clip.isfinite().all():
            raise NonFiniteError(f"clip {i}: holds NaN or infinity; drop or regenerate it")


def _embed(clips: Sequence[Tensor], sample_rate: int, embedding: AudioEmbedding) -> Embedded:
    lengths: dict[int, list[int]] = {}
    for i, clip in enumerate(clips):
        lengths.setdefault(len(clip), []).append(i)
    features = torch.full((len(clips), embedding.dimension), torch.nan)
    classes = len(embedding.classes or ())
    logits = torch.full((len(clips), classes), torch.nan) if classes else None
    for places in lengths.values():
        for start in range(0, len(places), _BATCH):
            part = places[start : start + _BATCH]
            waveforms = torch.stack([clips[i].detach().float().cpu() for i in part])
            found = embedding.embed(resample(waveforms, sample_rate, embedding.sample_rate))
            _check(embedding, found, len(part))
            features[part] = found.features
            if logits is not None and found.logits is not None:
                logits[part] = found.logits
    return Embedded(features, logits)


def _check(embedding: AudioEmbedding, found: Embedded, clips: int) -> None:
    shapes = [found.features.shape, None if found.logits is None else found.logits.shape]
    classes = embedding.classes
    needed = [(clips, embedding.dimension), None if classes is None else (clips, len(classes))]
    if shapes != needed:
        raise ShapeError(
            f"embedding {embedding.name!r}: gave features and logits {shapes}, promised {needed}"
        )
    if not found.features.isfinite().all():
        raise NonFiniteError(
            f"embedding {embedding.name!r}: gave NaN or infinity; look for broken weights"
        )


def _key(clips: Sequence[Tensor], sample_rate: int, embedding: AudioEmbedding) -> str:
    digest = hashlib.sha256()
    about = (embedding.name, embedding.weights, embedding.sample_rate, sample_rate, RESAMPLER)
    digest.update(repr(about).encode())
    for clip in clips:
        digest.update(f"\0{len(clip)}\0".encode())
        digest.update(clip.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path, clips: int, embedding: AudioEmbedding) -> Embedded:
    try:
        tensors = load_file(path)
        found = Embedded(tensors[_FEATURES], tensors.get(_LOGITS))
        _check(embedding, found, clips)
    except (SafetensorError, OSError, KeyError, ShapeError) as error:
        raise EvaluationError(
            f"{path}: damaged ({error}); delete it, and it is computed again"
        ) from error
    return found
