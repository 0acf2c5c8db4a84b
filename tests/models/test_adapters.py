"""What the adapters say about a UNet, held against the UNet itself."""

from __future__ import annotations

import fnmatch
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from ptq4adm.errors import (
    ConfigError,
    MissingComponentError,
    UnsupportedLayerError,
    UnsupportedModelError,
)
from ptq4adm.models import (
    find_adapter,
    make_an_audio_unet,
    real_unet,
    shipped_pipeline_path,
    tango_unet,
)
from ptq4adm.models.audioldm import AudioLDM
from ptq4adm.models.components import COMPONENTS
from ptq4adm.models.pipeline import TextToAudioPipeline
from ptq4adm.protocols import DenoiserAdapter

PROMPTS = ["a dog barks", "a bell"]


@pytest.fixture(scope="module")
def pipe(tiny_pipeline: Path) -> TextToAudioPipeline:
    return AudioLDM.from_folder(tiny_pipeline)


def _concatenations(monkeypatch: pytest.MonkeyPatch, run: object) -> list[tuple[int, int]]:
    """Channels of the halves of every two-tensor concatenation along channels."""
    seen: list[tuple[int, int]] = []
    cat = torch.cat

    def record(tensors, dim=0, **kwargs):  # type: ignore[no-untyped-def]
        if len(tensors) == 2 and dim == 1 and tensors[0].dim() == 4:
            seen.append((tensors[0].shape[1], tensors[1].shape[1]))
        return cat(tensors, dim=dim, **kwargs)

    monkeypatch.setattr(torch, "cat", record)
    run()  # type: ignore[operator]
    return seen


def test_segments_are_the_sizes_that_a_forward_concatenates(
    pipe: TextToAudioPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    segments = find_adapter(pipe).segments(pipe.unet)
    order: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: order.append(name))
        for name, module in pipe.unet.named_modules()
        if name in segments
    ]
    seen = _concatenations(monkeypatch, lambda: pipe(PROMPTS, steps=1, guidance=1.0))
    for hook in hooks:
        hook.remove()
    assert len(seen) == 4
    assert [segments[name] for name in order] == seen


@pytest.mark.parametrize("name", ["audioldm-s", "audioldm-m", "audioldm-l"])
def test_segments_of_the_published_models_fill_every_shortcut_input(name: str) -> None:
    unet = real_unet(name, device="meta")
    segments = find_adapter(unet).segments(unet)
    shortcuts = {
        module_name
        for module_name, _ in unet.named_modules()
        if module_name.startswith("up_blocks.") and module_name.endswith("conv_shortcut")
    }
    assert set(segments) == shortcuts
    assert len(segments) == 12
    for module_name, sizes in segments.items():
        assert sum(sizes) == unet.get_submodule(module_name).in_channels
    first = real_unet(name, device="meta").config.block_out_channels[0]
    assert segments["up_blocks.3.resnets.2.conv_shortcut"] == (first, first)


@pytest.mark.parametrize(
    ("name", "millions"), [("audioldm-s", 185.0), ("audioldm-m", 416.0), ("audioldm-l", 739.1)]
)
def test_real_unets_have_the_published_number_of_parameters(name: str, millions: float) -> None:
    unet = real_unet(name, device="meta")
    assert sum(p.numel() for p in unet.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_real_unet_refuses_an_unknown_name() -> None:
    with pytest.raises(ConfigError, match="audioldm-xl"):
        real_unet("audioldm-xl")


def test_every_rule_matches_a_layer_or_names_an_optional_one(pipe: TextToAudioPipeline) -> None:
    names = [n for n, m in pipe.unet.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    optional = {"class_embedding.*", "add_embedding.*"}
    for rule in find_adapter(pipe).rules(pipe.unet):
        assert rule.reason
        if rule.pattern not in optional:
            assert fnmatch.filter(names, rule.pattern), rule.pattern


def test_rules_keep_the_ends_float_and_embeddings_weight_only(pipe: TextToAudioPipeline) -> None:
    rules = find_adapter(pipe).rules(pipe.unet)

    def scheme(name: str) -> str | None:
        return next(
            (r.scheme for r in reversed(rules) if fnmatch.fnmatchcase(name, r.pattern)), None
        )

    assert scheme("conv_in") == scheme("conv_out") == "float"
    assert scheme("time_embedding.linear_1") == scheme("class_embedding") == "w8"
    assert scheme("down_blocks.0.resnets.0.time_emb_proj") == "w8"
    assert scheme("down_blocks.1.resnets.0.conv1") is None


def test_sensitive_layers_are_few_and_the_shortcuts_come_first(pipe: TextToAudioPipeline) -> None:
    def sensitive(unet: nn.Module) -> list[str]:
        return [r.pattern for r in find_adapter(pipe).rules(unet) if r.is_sensitive]

    audioldm = real_unet("audioldm-s", device="meta")
    patterns = sensitive(audioldm)
    assert patterns[:2] == ["*.conv_shortcut", "up_blocks.3.resnets.*.conv?"]
    assert len(patterns) == 4
    # two levels: each is a large part of it
    assert sensitive(make_an_audio_unet(device="meta")) == ["*.conv_shortcut"]
    for unet in (audioldm, make_an_audio_unet(device="meta")):
        weights = {n.removesuffix(".weight"): p.numel() for n, p in unet.named_parameters()}
        patterns = sensitive(unet)
        share = sum(
            count
            for name, count in weights.items()
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        )
        assert 0 < share <= sum(weights.values()) / 16


def test_keys_and_values_of_text_are_weight_only(pipe: TextToAudioPipeline) -> None:
    for build in (tango_unet, make_an_audio_unet):
        unet = build(device="meta")
        patterns = [rule.pattern for rule in find_adapter(pipe).rules(unet)]
        assert "*.attn2.to_k" in patterns
        assert "*.attn2.to_v" in patterns
    # attn2 of AudioLDM sees the image
    assert not any("attn2" in rule.pattern for rule in find_adapter(pipe).rules(pipe.unet))


def test_find_adapter_knows_our_pipeline_diffusers_and_a_bare_unet(
    pipe: TextToAudioPipeline,
) -> None:
    from diffusers import AudioLDMPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = AudioLDMPipeline(**{name: getattr(pipe, name) for name in COMPONENTS})
    for model, family in (
        (pipe, "audioldm"),
        (theirs, "audioldm"),
        (pipe.unet, "unet2d-condition"),
    ):
        adapter = find_adapter(model)
        assert isinstance(adapter, DenoiserAdapter)
        assert adapter.family == family
        assert adapter.num_train_timesteps(model) == 1000
        assert adapter.denoiser(model).config.sample_size == 8
    ours = find_adapter(pipe).run(pipe, PROMPTS, steps=2, guidance=2.0, seed=3)
    same = find_adapter(theirs).run(theirs, PROMPTS, steps=2, guidance=2.0, seed=3)
    assert torch.equal(ours, same)


def test_a_bare_unet_cannot_be_run_from_prompts(pipe: TextToAudioPipeline) -> None:
    adapter = find_adapter(pipe.unet)
    with pytest.raises(MissingComponentError, match="activation='dynamic'"):
        adapter.run(pipe.unet, PROMPTS, steps=1, guidance=1.0, seed=0)
    with pytest.raises(MissingComponentError, match="bare denoiser"):
        adapter.sampling_defaults(pipe.unet)


def test_find_adapter_refuses_other_models() -> None:
    with pytest.raises(UnsupportedModelError, match="Linear is not a supported model"):
        find_adapter(nn.Linear(2, 2))
    with pytest.raises(UnsupportedModelError, match="str"):
        find_adapter("a folder")


def test_find_adapter_names_what_a_pipeline_lacks(pipe: TextToAudioPipeline) -> None:
    class Partial:
        unet = pipe.unet
        vae = pipe.vae
        scheduler = pipe.scheduler

    with pytest.raises(MissingComponentError, match="no text_encoder, tokenizer, vocoder"):
        find_adapter(Partial())


def test_segments_refuse_another_structure() -> None:
    unet = real_unet("audioldm-s", device="meta")
    adapter = find_adapter(unet)
    with pytest.raises(UnsupportedLayerError, match="no conv_in"):
        adapter.segments(nn.Sequential(nn.Conv2d(1, 1, 1)))
    del unet.down_blocks[2]
    with pytest.raises(UnsupportedLayerError, match="skip connection"):
        adapter.segments(unet)


def test_shipped_pipeline_path_says_when_it_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.resources.files", lambda _: tmp_path)
    with pytest.raises(MissingComponentError, match="reinstall ptq4adm"):
        shipped_pipeline_path()
    (tmp_path / "audioldm-tiny").mkdir()
    (tmp_path / "audioldm-tiny" / "model_index.json").write_text("{}")
    assert shipped_pipeline_path() == tmp_path / "audioldm-tiny"
