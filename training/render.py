"""Scores to audio: fluidsynth for notes, sonic-pi samples for percussion, espeak-ng for speech.

Fluidsynth is started once for a hundred clips, which lie in one long MIDI file with silence
between them, because loading the sound font takes longer than playing a clip.
"""

import functools
import io
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import resample_poly
from sources import CLIP_SAMPLES, CLIP_SECONDS, SAMPLE_RATE, Score

SOUND_FONT = Path("/usr/share/fluidr3mono-gm-soundfont/FluidR3Mono_GM.sf3")
SAMPLE_FOLDER = Path("/usr/share/sonic-pi/samples")
APT_LINE = "apt-get install fluidsynth fluidr3mono-gm-soundfont sonic-pi-samples espeak-ng"

# twice the target rate: partials between 16 and 22 kHz then alias only above 8 kHz and are
# removed by the decimation
FLUID_RATE = 2 * SAMPLE_RATE
FLUID_BATCH = 100
# silence after a clip in which the releases die away; cymbals ring longest
TAIL_MS = 1500
DRUM_TAIL_MS = 2600
_TICKS_PER_BEAT = 500  # at the default 500 000 us a beat one tick is one millisecond
_BEND_RANGE = 12  # semitones
_BEND_PER_CENT = 8191 / (100.0 * _BEND_RANGE)


class MissingProgramError(RuntimeError):
    """A Debian package that the corpus is rendered from is not installed."""


def require_programs() -> None:
    """Check that everything the renderers call is installed.

    Raises:
        MissingProgramError: naming what is missing and the line that installs it.
    """
    missing = [name for name in ("fluidsynth", "espeak-ng") if shutil.which(name) is None]
    missing += [str(path) for path in (SOUND_FONT, SAMPLE_FOLDER) if not path.exists()]
    if missing:
        raise MissingProgramError(f"missing: {', '.join(missing)}; install with: {APT_LINE}")


def render_scores(
    scores: list[Score], jobs: int = 2, progress: Callable[[int], object] = lambda _: None
) -> np.ndarray:
    """Render every score to one clip.

    Args:
        scores: any mixture of engines.
        jobs: fluidsynth processes at a time.
        progress: called with the number of clips of each batch done.

    Returns:
        float32 [clips, 40960], not normalised.
    """
    audio = np.zeros((len(scores), CLIP_SAMPLES), dtype=np.float32)

    def run(rows: list[int]) -> None:
        batch = [scores[row] for row in rows]
        if batch[0].engine == "fluidsynth":
            audio[rows] = _fluidsynth(batch)
        else:
            one = _espeak if batch[0].engine == "espeak" else _samples
            audio[rows] = np.stack([one(score) for score in batch])
        progress(len(rows))

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, _batches(scores)))
    return audio


def _batches(scores: list[Score]) -> Iterable[list[int]]:
    """Rows that can share one run: the same engine, and drums apart for their longer tails."""
    groups: dict[tuple, list[int]] = {}
    for row, score in enumerate(scores):
        pre_roll = any(note.start < 0 for note in score.notes)
        groups.setdefault((score.engine, score.is_drum, pre_roll), []).append(row)
    for rows in groups.values():
        for start in range(0, len(rows), FLUID_BATCH):
            yield rows[start : start + FLUID_BATCH]


def _midi_events(score: Score, origin_ms: int) -> Iterable[tuple[int, int, object]]:
    """Messages of one clip as (milliseconds, order, message); note-offs go before note-ons."""
    import mido  # only rendering needs it

    channel = 9 if score.is_drum else 0
    first = min(note.start for note in score.notes)
    setup = origin_ms + round(1000 * min(first, 0.0))
    yield setup, 0, mido.Message("program_change", channel=channel, program=score.program)
    yield setup, 0, mido.Message("control_change", channel=channel, control=11, value=127)
    for control, value in ((101, 0), (100, 0), (6, _BEND_RANGE)):  # RPN 0: range of the wheel
        yield (
            setup,
            0,
            mido.Message("control_change", channel=channel, control=control, value=value),
        )
    yield (
        setup,
        0,
        mido.Message(
            "pitchwheel", channel=channel, pitch=round(score.detune_cents * _BEND_PER_CENT)
        ),
    )
    for seconds, value in score.expression:
        message = mido.Message(
            "control_change", channel=channel, control=11, value=min(max(value, 0), 127)
        )
        yield origin_ms + round(1000 * seconds), 1, message
    for note in score.notes:
        begin = origin_ms + round(1000 * note.start)
        end = min(
            begin + max(round(1000 * note.duration), 20), origin_ms + round(1000 * CLIP_SECONDS)
        )
        key = int(note.pitch)
        yield begin, 3, mido.Message("note_on", channel=channel, note=key, velocity=note.velocity)
        yield end, 2, mido.Message("note_off", channel=channel, note=key)


def _fluidsynth(scores: list[Score]) -> np.ndarray:
    """Play clips of one batch in one MIDI file and cut them apart: float32 [clips, 40960]."""
    import mido

    pre_roll_ms = max(0, *(round(-1000 * note.start) for score in scores for note in score.notes))
    tail_ms = DRUM_TAIL_MS if scores[0].is_drum else TAIL_MS
    period_ms = pre_roll_ms + round(1000 * CLIP_SECONDS) + tail_ms
    track = mido.MidiTrack()
    now = 0
    for index, score in enumerate(scores):
        events = sorted(
            _midi_events(score, index * period_ms + pre_roll_ms), key=lambda event: event[:2]
        )
        for time_ms, _, message in events:
            track.append(message.copy(time=time_ms - now))
            now = time_ms
    with tempfile.TemporaryDirectory() as folder:
        midi, wav = Path(folder, "score.mid"), Path(folder, "score.wav")
        mido.MidiFile(ticks_per_beat=_TICKS_PER_BEAT, tracks=[track]).save(midi)
        command = [
            "fluidsynth",
            "-ni",
            "-q",
            "-R",
            "0",
            "-C",
            "0",
            "-g",
            "0.3",
            "-r",
            str(FLUID_RATE),
        ]
        command += ["-O", "float", "-F", str(wav), str(SOUND_FONT), str(midi)]
        subprocess.run(command, check=True, capture_output=True)
        stereo, _ = soundfile.read(wav, dtype="float32", always_2d=True)
    mono = resample_poly(stereo.mean(axis=1), SAMPLE_RATE, FLUID_RATE).astype(np.float32)
    mono = np.pad(mono, (0, SAMPLE_RATE))
    per_ms = SAMPLE_RATE // 1000
    starts = (np.arange(len(scores)) * period_ms + pre_roll_ms) * per_ms
    return np.stack([mono[start : start + CLIP_SAMPLES] for start in starts])


@functools.cache
def _load_sample(name: str) -> np.ndarray:
    audio, rate = soundfile.read(SAMPLE_FOLDER / f"{name}.flac", dtype="float32", always_2d=True)
    mono = resample_poly(audio.mean(axis=1), SAMPLE_RATE, rate).astype(np.float32)
    return mono / max(float(np.abs(mono).max()), 1e-6)


def _samples(score: Score) -> np.ndarray:
    """Mix samples at their times; `pitch` is the playback ratio: float32 [40960]."""
    clip = np.zeros(CLIP_SAMPLES, dtype=np.float32)
    for note in score.notes:
        sample = _load_sample(note.sample)
        if note.pitch != 1.0:
            sample = resample_poly(sample, 1000, round(1000 * note.pitch)).astype(np.float32)
        start = round(note.start * SAMPLE_RATE)
        length = min(len(sample), CLIP_SAMPLES - start)
        clip[start : start + length] += sample[:length] * np.float32(note.velocity / 127.0)
    return clip


def _espeak(score: Score) -> np.ndarray:
    """Speak the text from its first sound on, cut at the clip's end: float32 [40960]."""
    command = ["espeak-ng", "--stdout", "-v", score.voice, "-s", str(score.words_per_minute)]
    command += ["-p", str(score.voice_pitch), score.text]
    wav = subprocess.run(command, check=True, capture_output=True).stdout
    # espeak-ng writes a header of unlimited length to a pipe, so the samples are read raw
    header = wav.index(b"data") + 8
    rate = soundfile.info(io.BytesIO(wav)).samplerate
    audio = np.frombuffer(
        wav[header : header + (len(wav) - header) // 2 * 2], dtype="<i2"
    ) / np.float32(32768.0)
    audio = resample_poly(audio, SAMPLE_RATE, rate).astype(np.float32)
    loud = np.flatnonzero(np.abs(audio) > 0.05 * np.abs(audio).max())
    audio = audio[max(loud[0] - 200, 0) :]
    return np.pad(audio, (0, max(0, CLIP_SAMPLES - len(audio))))[:CLIP_SAMPLES]
