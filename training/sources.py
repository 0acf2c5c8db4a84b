"""What each source plays: aspects of a clip to a score of notes, samples or words.

Owns the musical content (pitches, rhythms, patterns, sentences). Turning a score into audio is
`render.py`; choosing the aspects is `corpus.py`.
"""

import math
import random
from dataclasses import dataclass, field

CLIP_SECONDS = 2.56
SAMPLE_RATE = 16000
CLIP_SAMPLES = 40960

NOTES_PER_SECOND = {"slow": (1.0, 1.5), "moderate": (2.2, 3.2), "fast": (5.0, 7.5)}
BEATS_PER_MINUTE = {"slow": (60, 78), "moderate": (95, 120), "fast": (150, 190)}
SAMPLE_KITS = (
    {"kick": "drum_heavy_kick", "snare": "drum_snare_hard", "hat": "drum_cymbal_closed"},
    {"kick": "drum_bass_hard", "snare": "drum_snare_soft", "hat": "drum_cymbal_pedal"},
    {"kick": "bd_808", "snare": "sn_dub", "hat": "drum_cymbal_closed"},
    {"kick": "bd_haus", "snare": "sn_dolf", "hat": "drum_cymbal_soft"},
    {"kick": "bd_tek", "snare": "sn_zome", "hat": "drum_cymbal_pedal"},
)
SAMPLE_TOMS = {
    "tom_high": "drum_tom_hi_hard",
    "tom_middle": "drum_tom_mid_hard",
    "tom_low": "drum_tom_lo_hard",
    "crash": "drum_splash_hard",
}
TABLA_SAMPLES = (
    "tabla_dhec",
    "tabla_ghe1",
    "tabla_ghe4",
    "tabla_ghe8",
    "tabla_na",
    "tabla_na_s",
    "tabla_te2",
)
SOURCE_SAMPLES = {
    "bell": ("perc_bell",),
    "crow": ("misc_crow",),
    "drone": ("ambi_drone", "ambi_haunted_hum", "ambi_lunar_land"),
}
GM_DRUM_KITS = (0, 8, 16, 24, 32, 40)
GM_DRUM_KEYS = {
    "kick": 36,
    "snare": 38,
    "hat": 42,
    "tom_high": 50,
    "tom_middle": 47,
    "tom_low": 43,
    "crash": 49,
}


@dataclass(frozen=True)
class Note:
    """One note or sample; `start` in seconds from the clip's start, negative for a pre-roll."""

    start: float
    duration: float
    pitch: float  # MIDI key, or for samples the playback ratio
    velocity: int  # 1 to 127
    sample: str = ""


@dataclass
class Score:
    """One clip before rendering; `engine` is "fluidsynth", "samples" or "espeak"."""

    engine: str
    notes: list[Note] = field(default_factory=list)
    program: int = 0
    is_drum: bool = False
    detune_cents: float = 0.0
    expression: list[tuple[float, int]] = field(default_factory=list)  # (seconds, 0 to 127)
    text: str = ""
    voice: str = ""
    words_per_minute: int = 0
    voice_pitch: int = 0


@dataclass(frozen=True)
class Instrument:
    """A General MIDI program and its lowest and highest key in each register."""

    programs: tuple[int, ...]
    low: tuple[int, int]
    middle: tuple[int, int]
    high: tuple[int, int]


INSTRUMENTS = {
    "church_organ": Instrument((19,), (43, 50), (55, 62), (67, 74)),
    "flute": Instrument((73,), (65, 71), (74, 81), (84, 92)),
    "glockenspiel": Instrument((9, 10), (67, 74), (77, 85), (88, 96)),
    "bass_guitar": Instrument((33, 34), (28, 34), (36, 42), (44, 52)),
    "piano": Instrument((0,), (36, 47), (53, 65), (72, 86)),
    "violin": Instrument((40,), (55, 62), (67, 75), (80, 90)),
    "trumpet": Instrument((56,), (54, 60), (63, 70), (73, 81)),
    "guitar": Instrument((24, 25), (40, 48), (52, 60), (64, 74)),
    "marimba": Instrument((12,), (48, 56), (60, 69), (74, 86)),
    "choir": Instrument((52,), (43, 52), (55, 64), (67, 76)),
}
_CHORDS = ((0, 4, 7), (0, 3, 7), (0, 5, 9), (0, 4, 9), (0, 7, 12), (0, 3, 8))
_SCALES = ((0, 2, 4, 7, 9), (0, 3, 5, 7, 10), (0, 2, 4, 5, 7, 9, 11))
# the sound font's effects do not follow the key, so their pitch is set by the wheel (+-1200 cents)
EFFECT_KEY = 60
_EFFECT_CENTS = {
    "low": (-1000.0, -500.0),
    "middle": (-150.0, 150.0),
    "high": (500.0, 1000.0),
    "slow": (-1000.0, -500.0),
    "moderate": (-150.0, 150.0),
    "fast": (500.0, 1000.0),
}

ACCENTS = ("en-us", "en-gb", "en-gb-scotland")
VARIANTS = {"man": ("", "+m1", "+m3", "+m7"), "woman": ("+f1", "+f2", "+f3", "+f4")}
_WHO = (
    "the old man,my sister,a young doctor,our teacher,the captain,her brother,the farmer,"
    "a tall stranger,the little girl,everybody here,the postman,his neighbour"
).split(",")
_DOES = (
    "is walking,was looking,has been waiting,will travel,went home,keeps running,sat down,"
    "came back,is coming,wants to go,had to hurry,likes to sing"
).split(",")
_WHERE = (
    "along the river,in the garden,behind the red house,to the market,near the station,"
    "over the green hill,in front of the window,through the open door,under the bridge,"
    "on a rainy day,before the evening,with a heavy suitcase"
).split(",")


def _velocity(rng: random.Random) -> int:
    return rng.randint(75, 120)


def _melody(low: int, high: int, rng: random.Random) -> list[int]:
    """The keys of a random scale inside the register, walked at random: 24 of them."""
    scale, root = rng.choice(_SCALES), rng.randrange(12)
    keys = [key for key in range(low - 2, high + 3) if (key - root) % 12 in scale]
    position = rng.randrange(len(keys))
    walk = []
    for _ in range(24):
        walk.append(keys[position])
        step = rng.choice((-2, -1, -1, 0, 1, 1, 2))
        position = min(max(position + step, 0), len(keys) - 1)
    return walk


def _play(pitches: list[int], tempo: str, rng: random.Random, legato: float) -> list[Note]:
    """Play pitches one after another at the tempo, some twice as long unless the tempo is fast."""
    period = 1.0 / rng.uniform(*NOTES_PER_SECOND[tempo])
    notes, start = [], rng.uniform(0.0, 0.06)
    for pitch in pitches:
        if start > CLIP_SECONDS - 0.05:
            break
        length = period * (2 if tempo == "moderate" and rng.random() < 0.2 else 1)
        notes.append(Note(start, length * legato, pitch, _velocity(rng)))
        start += length
    return notes


def _instrument_notes(instrument: Instrument, attributes: dict, rng: random.Random) -> list[Note]:
    low, high = getattr(instrument, attributes["register"])
    style = attributes["style"]
    key = rng.randint(low, high)
    if style in ("held note", "single note"):
        return [Note(rng.uniform(0.0, 0.06), 3.0, key, _velocity(rng))]
    if style == "chord":
        keys = [key - 3 + interval for interval in rng.choice(_CHORDS)]
        start, velocity = rng.uniform(0.0, 0.06), _velocity(rng)
        return [Note(start, 3.0, pitch, velocity) for pitch in keys]
    if style == "arpeggio":
        keys = [key - 3 + interval for interval in rng.choice(_CHORDS)] + [key + 9]
        order = rng.choice(([0, 1, 2, 3], [3, 2, 1, 0], [0, 1, 2, 3, 2, 1], [0, 2, 1, 3]))
        pitches = [keys[i] for i in order] * 6
    elif style == "repeated notes":
        pitches = [key] * 24
    else:  # melody, bass line
        pitches = _melody(low, high, rng)
    return _play(pitches, attributes["tempo"], rng, legato=rng.uniform(0.6, 0.98))


def _organ(attributes: dict, rng: random.Random) -> Score:
    """Full chords, or a melody over a held pedal: what tells an organ from a flute."""
    low, high = getattr(INSTRUMENTS["church_organ"], attributes["register"])
    key, velocity = rng.randint(low, high), _velocity(rng)
    pedal = [Note(0.0, 3.0, pitch, velocity) for pitch in (key - 19, key - 12)]
    if attributes["style"] == "chord":
        notes = pedal + [Note(0.0, 3.0, key + i, velocity) for i in rng.choice(_CHORDS)]
    elif attributes["style"] == "chords":
        roots = _play(_melody(low, high, rng), attributes["tempo"], rng, legato=0.95)
        chord = rng.choice(_CHORDS)
        notes = [
            Note(n.start, n.duration, n.pitch + i, velocity) for n in roots for i in (-12, *chord)
        ]
    else:
        notes = pedal + _play(_melody(low, high, rng), attributes["tempo"], rng, legato=0.95)
    return Score("fluidsynth", notes, program=19, detune_cents=rng.uniform(-30.0, 30.0))


def _drum_hits(attributes: dict, rng: random.Random) -> list[tuple[float, str, int]]:
    """The pattern as (seconds, drum, velocity)."""
    step = 60.0 / rng.uniform(*BEATS_PER_MINUTE[attributes["tempo"]]) / 4  # a sixteenth
    style, first = attributes["style"], rng.choice((0, 0, 8))
    kicks = {0, 8} | set(rng.sample((6, 7, 10, 11, 14), rng.randint(0, 2)))
    busy_kicks = {0} | set(rng.sample(range(2, 16), 5))
    toms = ["snare"] * rng.randint(0, 4) + ["tom_high"] * 4 + ["tom_middle"] * 4 + ["tom_low"] * 4
    hits = []
    for index in range(int(CLIP_SECONDS / step) + 1):
        place, time = (index + first) % 16, 0.01 + index * step
        if time > CLIP_SECONDS - 0.02:
            break
        if style == "fill":
            drum = toms[index % len(toms)]
            if index and index % len(toms) == 0:
                hits.append((time, "crash", 110))
            if rng.random() < 0.85 or index == 0:
                hits.append((time, drum, rng.randint(80, 120)))
            continue
        is_busy = style == "busy beat"
        if place in (busy_kicks if is_busy else kicks):
            hits.append((time, "kick", rng.randint(100, 125)))
        if place in (4, 12) or (is_busy and rng.random() < 0.2):
            hits.append(
                (time, "snare", rng.randint(95, 120) if place in (4, 12) else rng.randint(40, 70))
            )
        if is_busy or place % 2 == 0:
            hits.append((time, "hat", rng.randint(50, 100)))
    return hits


def _drums(attributes: dict, rng: random.Random) -> Score:
    hits = _drum_hits(attributes, rng)
    if rng.random() < 0.6:
        notes = [Note(time, 0.2, GM_DRUM_KEYS[drum], velocity) for time, drum, velocity in hits]
        return Score("fluidsynth", notes, program=rng.choice(GM_DRUM_KITS), is_drum=True)
    kit = {**SAMPLE_TOMS, **rng.choice(SAMPLE_KITS)}
    ratio = 2 ** rng.uniform(-0.15, 0.15)
    return Score(
        "samples", [Note(time, 0.0, ratio, velocity, kit[drum]) for time, drum, velocity in hits]
    )


def _bursts(attributes: dict, rng: random.Random, rates: dict, fill: float) -> list[Note]:
    """Repeat an effect at a rate, each time sounding for the share `fill` of its period."""
    period = 1.0 / rng.uniform(*rates[attributes["tempo"]])
    notes, start = [], rng.uniform(0.0, 0.08)
    while start < CLIP_SECONDS - 0.1:
        notes.append(Note(start, period * fill, EFFECT_KEY, _velocity(rng)))
        start += period * rng.uniform(0.9, 1.1)
    return notes


def _cents(attributes: dict, aspect: str, rng: random.Random) -> float:
    return rng.uniform(*_EFFECT_CENTS[attributes[aspect]])


def _telephone(attributes: dict, rng: random.Random) -> Score:
    rates = {"slow": (0.75, 0.95), "moderate": (1.4, 1.8), "fast": (2.8, 3.8)}
    notes = _bursts(attributes, rng, rates, rng.uniform(0.5, 0.7))
    return Score("fluidsynth", notes, program=124, detune_cents=_cents(attributes, "register", rng))


def _bird(attributes: dict, rng: random.Random) -> Score:
    rates = {"slow": (1.2, 1.7), "moderate": (2.6, 3.4), "fast": (5.5, 8.0)}
    notes = _bursts(attributes, rng, rates, 0.5)
    return Score("fluidsynth", notes, program=123, detune_cents=_cents(attributes, "register", rng))


def _helicopter(attributes: dict, rng: random.Random) -> Score:
    low, high = rng.randint(30, 60), rng.randint(110, 127)
    style = attributes["style"]
    begin, end = {"approaching": (low, high), "leaving": (high, low), "hovering": (high, high)}[
        style
    ]
    curve = [(CLIP_SECONDS * i / 16, round(begin + (end - begin) * i / 16)) for i in range(17)]
    # the sample swells for 1.5 s, so it starts before the clip
    notes = [Note(-1.4, 6.0, EFFECT_KEY, 110)]
    cents = _cents(attributes, "tempo", rng)
    return Score(
        "fluidsynth", notes, program=125, detune_cents=cents, expression=[(-1.4, begin), *curve]
    )


def _sea(attributes: dict, rng: random.Random) -> Score:
    notes = [Note(-rng.uniform(0.4, 1.4), 6.0, key, 110) for key in (EFFECT_KEY, EFFECT_KEY + 5)]
    cents = _cents(attributes, "register", rng)
    curve = [(-1.4, 120)]
    if attributes["style"] == "waves":
        rate = rng.uniform(
            *{"slow": (0.35, 0.45), "moderate": (0.75, 0.95), "fast": (1.6, 2.1)}[
                attributes["tempo"]
            ]
        )
        phase = rng.uniform(0.0, 0.5)
        times = [CLIP_SECONDS * i / 64 for i in range(65)]
        curve += [(t, round(75 + 50 * math.cos(2 * math.pi * (rate * t - phase)))) for t in times]
    return Score("fluidsynth", notes, program=122, detune_cents=cents, expression=curve)


def _speech(attributes: dict, rng: random.Random) -> Score:
    """Two sentences, so that the clip is full at any speed."""
    sentences = [f"{rng.choice(_WHO)} {rng.choice(_DOES)} {rng.choice(_WHERE)}" for _ in range(2)]
    accent, variant = rng.choice(ACCENTS), rng.choice(VARIANTS[attributes["voice"]])
    low, high = {"low": (5, 20), "middle": (40, 55), "high": (75, 95)}[attributes["register"]]
    slow, fast = {"slow": (100, 120), "moderate": (155, 180), "fast": (235, 280)}[
        attributes["tempo"]
    ]
    return Score(
        "espeak",
        text=", ".join([*sentences, sentences[0]]),
        voice=accent + variant,
        words_per_minute=rng.randint(slow, fast),
        voice_pitch=rng.randint(low, high),
    )


def _applause(attributes: dict, rng: random.Random) -> Score:
    notes = [Note(-rng.uniform(0.5, 1.2), 5.0, key, 110) for key in (EFFECT_KEY, EFFECT_KEY + 5)]
    return Score("fluidsynth", notes, program=126, detune_cents=_cents(attributes, "register", rng))


def _tabla(attributes: dict, rng: random.Random) -> Score:
    period = 1.0 / rng.uniform(
        *{"slow": (1.5, 2.0), "moderate": (3.0, 4.0), "fast": (6.0, 8.0)}[attributes["tempo"]]
    )
    notes = [
        Note(0.01 + i * period, 0.0, 1.0, rng.randint(60, 127), rng.choice(TABLA_SAMPLES))
        for i in range(int((CLIP_SECONDS - 0.05) / period))
        if i == 0 or rng.random() < 0.85
    ]
    return Score("samples", notes)


def _sampled(source: str, attributes: dict, rng: random.Random) -> Score:
    octave = {"low": -0.6, "middle": 0.0, "high": 0.6}[attributes["register"]]
    ratio, name = 2 ** (octave + rng.uniform(-0.15, 0.15)), rng.choice(SOURCE_SAMPLES[source])
    period = {"slow": 1.3, "moderate": 0.8, "fast": 0.45}.get(
        attributes.get("tempo", ""), 10.0
    ) * rng.uniform(0.9, 1.1)
    times = [0.01 + i * period for i in range(int(CLIP_SECONDS / period) + 1)]
    return Score("samples", [Note(time, 0.0, ratio, 110, name) for time in times if time < 2.4])


_EFFECTS = {
    "church_organ": _organ,
    "drums": _drums,
    "telephone": _telephone,
    "bird": _bird,
    "helicopter": _helicopter,
    "sea": _sea,
    "speech": _speech,
    "applause": _applause,
    "tabla": _tabla,
}


def compose(source: str, attributes: dict, rng: random.Random) -> Score:
    """Write the score of one clip.

    Args:
        source: a key of `vocabulary.VOCABULARIES`.
        attributes: its aspects, as drawn by `Vocabulary.draw`.
        rng: decides pitches, rhythm, samples and words.
    """
    if source in _EFFECTS:
        return _EFFECTS[source](attributes, rng)
    if source in SOURCE_SAMPLES:
        return _sampled(source, attributes, rng)
    instrument = INSTRUMENTS[source]
    notes = _instrument_notes(instrument, attributes, rng)
    return Score(
        "fluidsynth",
        notes,
        program=rng.choice(instrument.programs),
        detune_cents=rng.uniform(-30.0, 30.0),
    )
