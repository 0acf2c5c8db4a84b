from __future__ import annotations

import random

import captions
import text


def test_a_varied_caption_is_never_a_held_out_prompt() -> None:
    rng = random.Random(0)
    for _, prompt in captions.heldout_prompts():
        # one word too many: dropping it would make the prompt
        for _ in range(200):
            varied = text.vary(f"{prompt} then", rng)
            assert varied.lower().rstrip(".") != prompt.lower()


def test_vary_drops_words_and_keeps_their_order() -> None:
    rng = random.Random(0)
    words = "a slow piano melody in the low range".split()
    lengths = set()
    for _ in range(100):
        varied = text.vary(" ".join(words), rng).lower().rstrip(".").split()
        rest = iter(words)
        assert all(word in rest for word in varied)
        lengths.add(len(varied))
    assert len(lengths) > 3
