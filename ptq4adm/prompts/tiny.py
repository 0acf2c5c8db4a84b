"""The domain of the shipped pipeline: the sources, words and sentence forms it was trained on.

The shipped pipeline knows some hundred words. A prompt outside them would calibrate it on
conditions that its use never meets, so here are its words and no others; a test compares them with
`training/vocabulary.py`. The sentence forms that training reserves for evaluation (an aspect first,
aspects joined by "and") are not built.
"""

from __future__ import annotations

from ptq4adm.prompts.general_aspects import LENGTH_ASPECT, ORDER_ASPECT
from ptq4adm.prompts.grammar import Forms
from ptq4adm.prompts.lexicon import BACKGROUND, SEQUENCE, TOGETHER
from ptq4adm.prompts.tables import split_list
from ptq4adm.prompts.taxonomy import (
    MODALITY,
    ORDER,
    SOURCE,
    Action,
    Aspect,
    Source,
    Taxonomy,
    Words,
)

_LOUDNESS = {
    "soft": Words(("soft", "quiet", "gentle"), ("softly", "quietly")),
    "normal": Words((), ("at a normal volume", "at a moderate volume")),
    "loud": Words(("loud", "strong"), ("loudly", "at full volume")),
}
_PITCH = {
    "low": Words(("low", "deep"), ("in a low register", "at a low pitch", "in the low range")),
    "middle": Words(
        ("mid-range",),
        ("in a middle register", "at a middle pitch", "in the middle range"),
    ),
    "high": Words(
        ("high", "high pitched"),
        ("in a high register", "at a high pitch", "in the high range"),
    ),
}
_TEMPO = {
    "slow": Words(("slow",), ("slowly", "at a slow tempo")),
    "moderate": Words(("moderate",), ("at a moderate tempo", "at a moderate speed")),
    "fast": Words(("fast", "quick"), ("quickly", "at a fast tempo", "fast")),
}
# said by the action itself, never added to one
_STYLE = {
    "held": Words(also=("held note", "long note", "single note")),
    "chord": Words(also=("chord", "held chord")),
    "chords": Words(also=("row of chords", "series of chords")),
    "melody": Words(also=("melody", "tune")),
    "arpeggio": Words(also=("arpeggio", "broken chord")),
    "repeated": Words(also=("repeated notes", "the same note again and again")),
    "bass line": Words(also=("bass line", "groove")),
    "steady beat": Words(also=("steady beat", "simple beat")),
    "busy beat": Words(also=("busy beat", "dense beat")),
    "fill": Words(also=("drum fill", "roll on the toms")),
    "steady": Words(also=("rushing steadily",)),
    "waves": Words(also=("rising and falling", "swelling and fading")),
    "approaching": Words(also=("approaching", "coming closer")),
    "hovering": Words(also=("hovering", "flying overhead")),
    "leaving": Words(also=("flying away", "moving away")),
}
_TIMELESS = frozenset({"tempo"})


def _source(
    name: str,
    modality: str,
    nouns: str,
    verbs: str,
    *,
    timeless: str = "",
    without: str = "",
    says: str = "register",
) -> Source:
    """One row: verbs of `timeless` take no tempo, the source has no aspect of `without`."""
    actions = [Action(verb) for verb in split_list(verbs)]
    actions += [Action(verb, without=_TIMELESS) for verb in split_list(timeless)]
    traits = {"loudness", "pitch", "tempo", "style"} - set(without.split())
    return Source(
        name=name,
        family=modality,
        modality=modality,
        nouns=split_list(nouns),
        actions=tuple(actions),
        traits=frozenset(traits),
        avoids=frozenset({"register", "pitch"} - {says}),
    )


_MELODY = "play a {}melody, play a {}tune"
_ARPEGGIO = "play a {}arpeggio, play a {}broken chord"
_REPEATED = "play {}repeated notes, play the same note again and again"
_HELD = "play a held note, play a long note"

_SOURCES = (
    _source("man", "speech", "male voice, man's voice, man", "speak, talk", says="pitch"),
    _source("woman", "speech", "female voice, woman's voice, woman", "speak, talk", says="pitch"),
    _source(
        "drums",
        "music",
        "drum kit, drum set, drums+",
        "play, play a {}steady beat, play a {}simple beat, play a {}busy beat, "
        "play a {}dense beat, play a {}drum fill, play a {}roll on the toms",
        without="pitch",
    ),
    _source(
        "church organ",
        "music",
        "church organ, pipe organ",
        f"play, play a {{}}row of chords, play a {{}}series of chords, {_MELODY}",
        timeless="play a chord, play a held chord",
    ),
    _source("flute", "music", "flute, wooden flute", f"{_MELODY}, {_REPEATED}", timeless=_HELD),
    _source(
        "glockenspiel",
        "music",
        "glockenspiel, music box",
        f"play, {_ARPEGGIO}, {_MELODY}, {_REPEATED}",
    ),
    _source(
        "bass guitar",
        "music",
        "bass guitar, electric bass",
        f"play, play a {{}}bass line, play a {{}}groove, {_REPEATED}",
        timeless="play a single note",
    ),
    _source(
        "sea",
        "ambience",
        "sea waves+, ocean waves+, waves on a sea shore+",
        "roll, break, rise and fall, swell and fade",
        timeless="rush steadily",
        says="pitch",
    ),
    _source(
        "helicopter",
        "effect",
        "helicopter, helicopter rotor",
        "fly, whir, approach, come closer, hover, fly overhead, fly away, move away",
        without="pitch",
    ),
    _source("bird", "effect", "bird, little bird, song bird", "chirp, tweet", says="pitch"),
    _source("telephone", "effect", "telephone, old telephone, phone bell", "ring", says="pitch"),
    _source(
        "piano",
        "music",
        "piano, grand piano",
        f"play, {_MELODY}, {_ARPEGGIO}",
        timeless="play a chord",
    ),
    _source("violin", "music", "violin, fiddle", f"play, {_MELODY}", timeless=_HELD),
    _source(
        "trumpet", "music", "trumpet, brass trumpet", f"{_MELODY}, {_REPEATED}", timeless=_HELD
    ),
    _source(
        "guitar",
        "music",
        "guitar, acoustic guitar",
        f"play, {_MELODY}, {_ARPEGGIO}",
        timeless="play a chord",
    ),
    _source("marimba", "music", "marimba, wooden marimba", f"play, {_MELODY}, {_REPEATED}"),
    _source(
        "choir",
        "music",
        "choir, choir of voices",
        "sing, sing a held note, sing a long note, sing a chord, sing a held chord",
        without="tempo",
    ),
    _source(
        "applause", "effect", "audience, crowd", "applaud, clap", without="tempo", says="pitch"
    ),
    _source("tabla", "music", "tabla, tabla drum", "play, beat", without="pitch"),
    _source("bell", "effect", "bell, metal bell", "ring, sound", without="tempo", says="pitch"),
    _source("crow", "effect", "crow, black crow", "call, caw", says="pitch"),
    _source(
        "drone",
        "ambience",
        "dark drone, ambient drone",
        "hum, sound",
        without="tempo",
        says="pitch",
    ),
)

TINY_TAXONOMY = Taxonomy(
    aspects=(
        Aspect(MODALITY, {name: Words() for name in ("speech", "music", "effect", "ambience")}),
        Aspect(SOURCE, {source.name: Words() for source in _SOURCES}),
        Aspect("style", _STYLE),
        Aspect("pitch", _PITCH),
        Aspect("tempo", _TEMPO),
        Aspect("loudness", _LOUDNESS),
        ORDER_ASPECT,
        LENGTH_ASPECT,
    ),
    sources=_SOURCES,
    # the loudness of a mixture belongs to the whole clip there
    apart=frozenset({frozenset((ORDER, "loudness"))}),
)

TINY_FORMS = Forms(
    openings=("{}", "{}", "{}", "the sound of {}"),
    joins={
        SEQUENCE: ("{a} followed by {b}", "{a}, then {b}", "{a} and then {b}"),
        TOGETHER: ("{a} while {b}", "{a} and {b}", "{a} together with {b}"),
        BACKGROUND: ("{a} over {b}", "{a} with {b} in the background"),
    },
    is_finite=False,
    can_lead=False,
    can_drop_action=True,
    adjective_share=0.6,
    plural_share=0.0,
    attributes=4,
    joined_attributes=1,
)
