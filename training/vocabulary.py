"""The words of the caption grammar, and which aspects each source can have.

`VOCABULARIES` is the one list of sources: ten classes first, then the other sources that only
widen the training set. How a source sounds is in `sources.py`.
"""

import random
from dataclasses import dataclass, field

REGISTERS = ("low", "middle", "high")
TEMPOS = ("slow", "moderate", "fast")
LOUDNESSES = ("soft", "normal", "loud")

REGISTER_ADJECTIVES = {
    "low": ("low", "deep"),
    "middle": ("mid-range",),
    "high": ("high", "high pitched"),
}
REGISTER_TAILS = {
    "register": {name: (f"in a {name} register", f"in the {name} range") for name in REGISTERS},
    "pitch": {name: (f"at a {name} pitch", f"in the {name} range") for name in REGISTERS},
}
TEMPO_ADJECTIVES = {"slow": ("slow",), "moderate": ("moderate",), "fast": ("fast", "quick")}
TEMPO_TAILS = {
    "slow": ("slowly", "at a slow tempo"),
    "moderate": ("at a moderate tempo", "at a moderate speed"),
    "fast": ("quickly", "at a fast tempo", "fast"),
}
LOUDNESS_ADJECTIVES = {
    "soft": ("soft", "quiet", "gentle"),
    "normal": (),
    "loud": ("loud", "strong"),
}
LOUDNESS_TAILS = {
    "soft": ("softly", "quietly"),
    "normal": ("at a normal volume", "at a moderate volume"),
    "loud": ("loudly", "at full volume"),
}

PLURALS = ("drums", "waves", "waves on a sea shore", "repeated notes")


@dataclass(frozen=True)
class Vocabulary:
    """Words and aspects of one source.

    Attributes:
        nouns: names of the source; those that end as one of `PLURALS` take no article.
        actions: participles; a style that is an object follows one of them.
        styles: playing style to its phrasings.
        style_is_object: "playing a melody" rather than "approaching".
        timeless: styles that have no tempo.
        voices: voice to nouns, for speech; replaces `nouns`.
        pitch_word: "register" or "pitch", the word of the register's tail.
        has_register, has_tempo: whether the aspect can vary.
        is_class: whether it is one of the ten classes.
    """

    nouns: tuple[str, ...]
    actions: tuple[str, ...]
    styles: dict[str, tuple[str, ...]] = field(default_factory=dict)
    style_is_object: bool = True
    timeless: tuple[str, ...] = ()
    voices: dict[str, tuple[str, ...]] = field(default_factory=dict)
    pitch_word: str = "register"
    has_register: bool = True
    has_tempo: bool = True
    is_class: bool = False

    def draw(self, rng: random.Random) -> dict[str, str]:
        """Draw one combination of aspects that this source can have."""
        attributes = {}
        if self.voices:
            attributes["voice"] = rng.choice(sorted(self.voices))
        if self.styles:
            attributes["style"] = rng.choice(sorted(self.styles))
        if self.has_register:
            attributes["register"] = rng.choice(REGISTERS)
        if self.has_tempo and attributes.get("style") not in self.timeless:
            attributes["tempo"] = rng.choice(TEMPOS)
        attributes["loudness"] = rng.choice(LOUDNESSES)
        return attributes


_HELD = ("held note", "long note")
_SINGLE = ("single note",)
_MELODY = ("melody", "tune")
_REPEATED = ("repeated notes", "the same note again and again")
_PLAYING = ("playing",)

VOCABULARIES = {
    "speech": Vocabulary(
        nouns=(),
        actions=("speaking", "talking"),
        voices={
            "man": ("male voice", "man's voice", "man"),
            "woman": ("female voice", "woman's voice", "woman"),
        },
        pitch_word="pitch",
        is_class=True,
    ),
    "drums": Vocabulary(
        nouns=("drum kit", "drum set", "drums"),
        actions=_PLAYING,
        styles={
            "steady beat": ("steady beat", "simple beat"),
            "busy beat": ("busy beat", "dense beat"),
            "fill": ("drum fill", "roll on the toms"),
        },
        has_register=False,
        is_class=True,
    ),
    "church_organ": Vocabulary(
        nouns=("church organ", "pipe organ"),
        actions=_PLAYING,
        styles={
            "chord": ("chord", "held chord"),
            "chords": ("row of chords", "series of chords"),
            "melody": _MELODY,
        },
        timeless=("chord",),
        is_class=True,
    ),
    "flute": Vocabulary(
        nouns=("flute", "wooden flute"),
        actions=_PLAYING,
        styles={"held note": _HELD, "melody": _MELODY, "repeated notes": _REPEATED},
        timeless=("held note",),
        is_class=True,
    ),
    "glockenspiel": Vocabulary(
        nouns=("glockenspiel", "music box"),
        actions=_PLAYING,
        styles={
            "arpeggio": ("arpeggio", "broken chord"),
            "melody": _MELODY,
            "repeated notes": _REPEATED,
        },
        is_class=True,
    ),
    "bass_guitar": Vocabulary(
        nouns=("bass guitar", "electric bass"),
        actions=_PLAYING,
        styles={
            "single note": _SINGLE,
            "bass line": ("bass line", "groove"),
            "repeated notes": _REPEATED,
        },
        timeless=("single note",),
        is_class=True,
    ),
    "sea": Vocabulary(
        nouns=("sea waves", "ocean waves", "waves on a sea shore"),
        actions=("rolling", "breaking"),
        styles={
            "steady": ("rushing steadily",),
            "waves": ("rising and falling", "swelling and fading"),
        },
        style_is_object=False,
        timeless=("steady",),
        pitch_word="pitch",
        is_class=True,
    ),
    "helicopter": Vocabulary(
        nouns=("helicopter", "helicopter rotor"),
        actions=("flying", "whirring"),
        styles={
            "approaching": ("approaching", "coming closer"),
            "hovering": ("hovering", "flying overhead"),
            "leaving": ("flying away", "moving away"),
        },
        style_is_object=False,
        has_register=False,
        is_class=True,
    ),
    "bird": Vocabulary(
        nouns=("bird", "little bird", "song bird"),
        actions=("chirping", "tweeting"),
        pitch_word="pitch",
        is_class=True,
    ),
    "telephone": Vocabulary(
        nouns=("telephone", "old telephone", "phone bell"),
        actions=("ringing",),
        pitch_word="pitch",
        is_class=True,
    ),
    "piano": Vocabulary(
        nouns=("piano", "grand piano"),
        actions=_PLAYING,
        styles={"chord": ("chord",), "melody": _MELODY, "arpeggio": ("arpeggio", "broken chord")},
        timeless=("chord",),
    ),
    "violin": Vocabulary(
        nouns=("violin", "fiddle"),
        actions=_PLAYING,
        styles={"held note": _HELD, "melody": _MELODY},
        timeless=("held note",),
    ),
    "trumpet": Vocabulary(
        nouns=("trumpet", "brass trumpet"),
        actions=_PLAYING,
        styles={"held note": _HELD, "melody": _MELODY, "repeated notes": _REPEATED},
        timeless=("held note",),
    ),
    "guitar": Vocabulary(
        nouns=("guitar", "acoustic guitar"),
        actions=_PLAYING,
        styles={"chord": ("chord",), "melody": _MELODY, "arpeggio": ("arpeggio", "broken chord")},
        timeless=("chord",),
    ),
    "marimba": Vocabulary(
        nouns=("marimba", "wooden marimba"),
        actions=_PLAYING,
        styles={"melody": _MELODY, "repeated notes": _REPEATED},
    ),
    "choir": Vocabulary(
        nouns=("choir", "choir of voices"),
        actions=("singing",),
        styles={"held note": _HELD, "chord": ("chord", "held chord")},
        timeless=("held note", "chord"),
        has_tempo=False,
    ),
    "applause": Vocabulary(
        nouns=("audience", "crowd"),
        actions=("applauding", "clapping"),
        pitch_word="pitch",
        has_tempo=False,
    ),
    "tabla": Vocabulary(
        nouns=("tabla", "tabla drum"), actions=("playing", "beating"), has_register=False
    ),
    "bell": Vocabulary(
        nouns=("bell", "metal bell"),
        actions=("ringing", "sounding"),
        pitch_word="pitch",
        has_tempo=False,
    ),
    "crow": Vocabulary(
        nouns=("crow", "black crow"), actions=("calling", "cawing"), pitch_word="pitch"
    ),
    "drone": Vocabulary(
        nouns=("dark drone", "ambient drone"),
        actions=("humming", "sounding"),
        pitch_word="pitch",
        has_tempo=False,
    ),
}

CLASSES = tuple(name for name, vocabulary in VOCABULARIES.items() if vocabulary.is_class)
OTHERS = tuple(name for name in VOCABULARIES if name not in CLASSES)
