import corpus
import numpy as np
import pytest
from compact import load_corpus
from sources import CLIP_SAMPLES


@pytest.fixture
def _renderer(monkeypatch):
    """Noise in the place of the Debian programs, the same for the same score."""

    def render(scores, _jobs, _on_clip):
        seeds = [abs(hash(repr(score))) % 2**32 for score in scores]
        return np.stack([np.random.default_rng(s).normal(size=CLIP_SAMPLES) for s in seeds])

    monkeypatch.setattr(corpus, "render_scores", render)
    monkeypatch.setattr(corpus, "require_programs", lambda: None)


@pytest.mark.usefixtures("_renderer")
def test_a_split_is_that_part_of_the_whole(tmp_path) -> None:
    corpus.build(tmp_path / "whole", 60, 3, 1)
    corpus.build(tmp_path / "test", 60, 3, 1, split="test")
    whole, clips = load_corpus(tmp_path / "whole")
    part, chosen = load_corpus(tmp_path / "test")
    assert chosen == [clip for clip in clips if clip["split"] == "test"]
    assert 10 <= len(chosen) < 60
    assert np.array_equal(part, whole[[clip["index"] for clip in chosen]])
