"""Sections that are heard: players beside spectrograms, and the blind test."""

from __future__ import annotations

import json
from html import escape

import numpy as np

from ptq4adm.evaluation.picture import RANGE_DB
from ptq4adm.report.data import Report, Sample
from ptq4adm.report.html import text
from ptq4adm.report.sound import (
    difference_uri,
    mel_db,
    peak_difference,
    spectrogram_uri,
    top_of,
    wav_uri,
)


def listening(report: Report) -> str:
    """A card a prompt: every form's player and spectrogram, and the difference of the last."""
    mels = [
        [mel_db(take.wave, report.sampling_rate) for take in sample.takes]
        for sample in report.samples
    ]
    top = top_of([mel for row in mels for mel in row])
    most = peak_difference([(row[0], row[-1]) for row in mels])
    cards = "".join(
        _card(report, i, sample, row, top, most)
        for i, (sample, row) in enumerate(zip(report.samples, mels, strict=True))
    )
    last = report.samples[0].takes[-1].name
    return (
        "<p>Every row is one prompt from one noise, so what differs is the quantization. "
        "Spectrograms: 64 mel bands from 0 to 8 kHz upwards, time to the right, one colour scale "
        f"for all. The last picture is float minus {text(last)}, on a scale of its own.</p>"
        f'<div class="scale magma" role="img" aria-label="Colour scale from {top - RANGE_DB:.0f} '
        f'to {top:.0f} dB"></div><div class="ends note"><span>{top - RANGE_DB:.0f} dB</span>'
        f"<span>{top:.0f} dB</span></div>"
        f'<div class="scale diverging" role="img" aria-label="Difference from {-most:.0f} to '
        f'{most:.0f} dB, white is none"></div>'
        f'<div class="ends note"><span>{-most:.0f} dB: {text(last)} is louder</span>'
        f"<span>{most:.0f} dB: float is louder</span></div>{cards}"
    )


def _card(
    report: Report, index: int, sample: Sample, mels: list[np.ndarray], top: float, most: float
) -> str:
    figures = []
    for j, (take, mel) in enumerate(zip(sample.takes, mels, strict=True)):
        seconds = len(take.wave) / report.sampling_rate
        sqnr = "reference" if take.sqnr_db is None else f"{take.sqnr_db:.1f} dB latent SQNR"
        figures.append(
            f'<figure><img src="{spectrogram_uri(mel, top)}" alt="Mel spectrogram of '
            f'{text(take.name)}, {seconds:.2f} seconds, loudest bin {float(mel.max()):.0f} dB">'
            f"<figcaption><b>{text(take.name)}</b><span>{sqnr}</span></figcaption>"
            f'<audio controls preload="metadata" id="{take_id(index, j)}" '
            f'aria-label="{text(take.name)}: {escape(sample.prompt, quote=True)}" '
            f'src="{wav_uri(take.wave, report.sampling_rate)}"></audio></figure>'
        )
    difference = mels[0] - mels[-1]
    rms = float(np.sqrt(np.mean(difference**2)))
    last = sample.takes[-1].name
    figures.append(
        f'<figure><img src="{difference_uri(difference, most)}" alt="Difference of the mel '
        f'spectrograms of float and {text(last)}, root mean square {rms:.1f} dB">'
        f"<figcaption><b>float &minus; {text(last)}</b><span>{rms:.1f} dB rms</span></figcaption>"
        "</figure>"
    )
    return (
        f'<article class="card"><h3>“{text(sample.prompt)}” '
        f'<span class="quiet">seed {sample.seed}</span></h3>'
        f'<div class="takes">{"".join(figures)}</div></article>'
    )


def blind_test(report: Report) -> str:
    """Float against the last form, unseen."""
    last = len(report.samples[0].takes) - 1
    pairs = [
        {
            "prompt": sample.prompt,
            "takes": [{"id": take_id(i, j), "name": sample.takes[j].name} for j in (0, last)],
        }
        for i, sample in enumerate(report.samples)
    ]
    # "<" would end the script element early
    data = json.dumps(pairs).replace("<", "\\u003c")
    return (
        f"<p>A and B are float and {text(report.samples[0].takes[last].name)} of one prompt, in an "
        "order that is drawn anew each time; X is one of them. With many answers, the probability "
        "says whether you hear a difference.</p>"
        '<noscript><p class="warning">The blind test needs JavaScript; the players above do not.'
        '</p></noscript><div class="card"><div id="blind-room"></div>'
        '<p id="blind-says" role="status" aria-live="polite"></p></div>'
        f'<script type="application/json" id="blind-pairs">{data}</script>'
    )


def take_id(sample: int, take: int) -> str:
    """Id of one player."""
    return f"clip-{sample}-{take}"
