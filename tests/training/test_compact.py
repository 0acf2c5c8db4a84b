import json

import compact
import numpy as np
import pytest
from compact import CorpusError, load_corpus, write_compact
from sources import CLIP_SAMPLES


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A corpus of 26 clips of tones: two blocks, the second short."""
    monkeypatch.setattr(compact, "BLOCK_CLIPS", 20)
    seconds = np.arange(CLIP_SAMPLES) / 16000.0
    tones = [np.sin(2 * np.pi * hz * seconds) for hz in (300.0, 700.0, 1100.0)]
    audio = np.stack([(8000 * tones[i % 3]).astype(np.int16) for i in range(26)])
    np.save(tmp_path / "audio.npy", audio)
    lines = [json.dumps({"index": i, "captions": [f"tone {i % 3}"]}) for i in range(26)]
    (tmp_path / "clips.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_compact_form_keeps_clips_in_place(folder) -> None:
    out = folder / "corpus.tar"
    assert write_compact(folder, out) == 26
    audio, clips = load_corpus(out)
    whole, whole_clips = load_corpus(folder)
    assert clips == whole_clips
    assert audio.shape == whole.shape
    for row in (0, 1, 19, 20, 25):
        x, y = whole[row, 2000:-2000].astype(np.float64), audio[row, 2000:-2000].astype(np.float64)
        assert np.corrcoef(x, y)[0, 1] > 0.95


def test_compact_form_stays_under_its_limit(folder) -> None:
    out = folder / "corpus.tar"
    write_compact(folder, out)
    limit = out.stat().st_size - 1
    assert write_compact(folder, folder / "small.tar", limit=limit) == 20
    assert (folder / "small.tar").stat().st_size <= limit
    assert len(load_corpus(folder / "small.tar")[0]) == 20


def test_limit_too_small_for_a_block_leaves_no_file(folder) -> None:
    with pytest.raises(CorpusError, match="not one block"):
        write_compact(folder, folder / "none.tar", limit=1000)
    assert not list(folder.glob("none*"))


def test_captions_without_their_audio_are_refused(folder) -> None:
    with (folder / "clips.jsonl").open("a") as lines:
        lines.write('{"index": 26}\n')
    with pytest.raises(CorpusError, match="27 captions"):
        load_corpus(folder)
