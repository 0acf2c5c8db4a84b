"""The main job on a small pipeline: plan, quantize, save, load, and everything that is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ptq4adm.calibration import Calibration
from ptq4adm.config import QuantConfig
from ptq4adm.errors import (
    BackendUnavailableError,
    CalibrationError,
    CalibrationMismatchError,
    ConfigError,
    MissingComponentError,
    NonFiniteError,
    PatternError,
    Ptq4admError,
    UncalibratedStepError,
    UnknownBackendError,
    UnsupportedLayerError,
    UnsupportedModelError,
)
from ptq4adm.models import TextToAudioPipeline, real_unet
from ptq4adm.nn import HalfConv2d, W4A8Conv2d, W4A8Linear, W8Linear, resident_bytes
from ptq4adm.nn.storage import StorageLayer
from ptq4adm.quantization import (
    calibrate,
    load_pipeline,
    plan,
    quantize,
)

PROMPTS = ["a dog barks", "rain"]
# where a test is not about scales: those that take no search
FAST: dict[str, Any] = {"weight_observer": "absmax", "activation_observer": "absmax"}


def _latents(pipe: TextToAudioPipeline, steps: int = 4) -> Tensor:
    return pipe.denoise(pipe.encode_prompts(PROMPTS), steps=steps, seed=11)


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def _is_untouched(module: nn.Module, before: dict[str, Tensor]) -> bool:
    after = module.state_dict()
    return (
        after.keys() == before.keys()
        and all(torch.equal(after[name], before[name]) for name in before)
        and not any(isinstance(m, StorageLayer) for m in module.modules())
        and not module._forward_pre_hooks
    )


class TestQuantize:
    """What is replaced, and how well it still works."""

    def test_the_denoiser_is_replaced_in_place_as_planned(
        self, quantized: TextToAudioPipeline, float_pipe: TextToAudioPipeline
    ) -> None:
        unet = quantized.unet
        assert isinstance(unet.conv_in, HalfConv2d)
        assert isinstance(unet.conv_out, HalfConv2d)
        assert isinstance(unet.time_embedding.linear_1, W8Linear)
        assert isinstance(unet.class_embedding, W8Linear)
        assert isinstance(unet.mid_block.resnets[0].conv1, W4A8Conv2d)
        attention = unet.mid_block.attentions[0].transformer_blocks[0]
        assert isinstance(attention.attn1.to_q, W4A8Linear)
        assert isinstance(unet.conv_norm_out, nn.GroupNorm)
        shortcut = unet.up_blocks[0].resnets[0].conv_shortcut
        assert shortcut.layout.segments == (128, 128)
        assert shortcut.x_scale.shape == (2, 4)
        assert not any(type(m) in (nn.Linear, nn.Conv2d) for m in unet.modules())
        assert not any(isinstance(m, StorageLayer) for m in float_pipe.unet.modules())

    def test_layers_keep_their_names_and_the_plan_its_promise(
        self, pipe: TextToAudioPipeline, calibration: Calibration
    ) -> None:
        names = [name for name, _ in pipe.unet.named_modules()]
        planned = plan(pipe, calibration=calibration)
        done = quantize(pipe, calibration=calibration, progress=False)
        assert [name for name, _ in pipe.unet.named_modules()] == names
        assert done == planned
        assert done.bytes_after == resident_bytes(pipe.unet)
        state = pipe.unet.state_dict()
        for row in done.rows:
            stored = {k: t for k, t in state.items() if k.startswith(row.name + ".")}
            assert sum(t.numel() * t.element_size() for t in stored.values()) == row.bytes_after

    @pytest.mark.parametrize(
        ("config", "least_db"),
        [
            (QuantConfig(scheme="w8a8"), 25.0),
            (QuantConfig(scheme="w8a8", activation="dynamic"), 25.0),
            (QuantConfig(scheme="w8"), 30.0),
            (QuantConfig(scheme="float"), 50.0),
            (QuantConfig(), 8.0),
            (QuantConfig(group_size=64), 8.0),
            (QuantConfig(weight_observer="absmax", activation_observer="absmax"), 5.0),
            (QuantConfig(activation_observer="percentile"), 8.0),
        ],
    )
    def test_latents_stay_close_to_the_float_pipelines(
        self,
        pipe: TextToAudioPipeline,
        float_pipe: TextToAudioPipeline,
        calibration: Calibration,
        config: QuantConfig,
        least_db: float,
    ) -> None:
        expected = _latents(float_pipe)
        quantize(pipe, config, calibration, progress=False)
        error = _latents(pipe) - expected
        assert 10 * torch.log10(expected.square().sum() / error.square().sum()) > least_db

    def test_a_bare_denoiser_is_taken(
        self, pipe: TextToAudioPipeline, calibration: Calibration, quantized: TextToAudioPipeline
    ) -> None:
        quantize(pipe.unet, QuantConfig(**FAST), calibration, progress=False)
        assert torch.equal(_latents(pipe), _latents(quantized))

    def test_a_copy_of_a_quantized_model_is_equal_and_separate(
        self, quantized: TextToAudioPipeline
    ) -> None:
        twin = copy.copy(quantized)
        twin.unet = copy.deepcopy(quantized.unet)
        steps = {id(m.step) for m in twin.unet.modules() if getattr(m, "step", None) is not None}
        theirs = {id(m.step) for m in quantized.unet.modules() if getattr(m, "step", None)}
        assert len(steps) == 1
        assert steps.isdisjoint(theirs)
        assert torch.equal(_latents(twin), _latents(quantized))

    def test_a_module_that_two_names_share_is_replaced_under_both(
        self, pipe: TextToAudioPipeline
    ) -> None:
        block = pipe.unet.mid_block.attentions[0].transformer_blocks[0]
        block.attn1.to_k = block.attn1.to_q
        quantize(pipe, QuantConfig(activation="dynamic", **FAST), progress=False)
        assert isinstance(block.attn1.to_q, W4A8Linear)
        assert block.attn1.to_k is block.attn1.to_q

    def test_a_layer_that_no_run_reached_measures_its_input(
        self, pipe: TextToAudioPipeline, calibration: Calibration
    ) -> None:
        name = "mid_block.resnets.0.conv1"
        (record,) = calibration.records[name]
        empty = type(record)(torch.zeros_like(record.counts), *(
            getattr(record, n) for n in ("exponent", "minimum", "maximum")
        ))  # fmt: skip
        partial = Calibration(calibration.meta, {**calibration.records, name: (empty,)})
        done = quantize(pipe, QuantConfig(**FAST), partial, progress=False)
        assert {row.name for row in done.rows if row.activation == "dynamic"} == {name}
        assert "dynamic" in repr(pipe.unet.mid_block.resnets[0].conv1)

    def test_a_warning_says_that_dynamic_ignores_the_calibration(
        self,
        pipe: TextToAudioPipeline,
        calibration: Calibration,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        quantize(pipe, QuantConfig(activation="dynamic", **FAST), calibration, progress=False)
        assert "not used" in caplog.text


class TestRefused:
    """Everything is checked before a module is touched."""

    @pytest.mark.parametrize(
        ("config", "error", "message"),
        [
            (
                QuantConfig(overrides={"up_block.*": "float"}),
                PatternError,
                "closest are 'up_blocks",
            ),
            (QuantConfig(overrides={"conv_in": "w8"}), UnsupportedLayerError, "'conv_in'"),
            (QuantConfig(backend="tpu"), UnknownBackendError, "tpu"),
            (QuantConfig(backend="cuda"), BackendUnavailableError, "cuda"),
        ],
    )
    def test_wrong_configs(
        self,
        pipe: TextToAudioPipeline,
        calibration: Calibration,
        config: QuantConfig,
        error: type[Ptq4admError],
        message: str,
    ) -> None:
        before = _weights(pipe.unet)
        with pytest.raises(error, match=message):
            quantize(pipe, config, calibration, progress=False)
        assert _is_untouched(pipe.unet, before)

    def test_static_scales_without_a_calibration(self, pipe: TextToAudioPipeline) -> None:
        with pytest.raises(CalibrationError, match="none was given"):
            quantize(pipe, progress=False)
        quantize(pipe, QuantConfig(scheme="float"), progress=False)  # needs none

    def test_a_calibration_of_another_model(
        self, other_tiny_pipeline: Path, calibration: Calibration
    ) -> None:
        other = load_pipeline(other_tiny_pipeline)
        before = _weights(other.unet)
        for call in (plan, quantize):
            with pytest.raises(CalibrationMismatchError, match="recorded on model"):
                call(other, QuantConfig(), calibration)
        assert _is_untouched(other.unet, before)

    def test_a_calibration_that_lacks_a_layer(
        self, pipe: TextToAudioPipeline, calibration: Calibration
    ) -> None:
        records = {n: r for n, r in calibration.records.items() if n != "conv_in"}
        with pytest.raises(CalibrationMismatchError, match="0 records for layer 'conv_in'"):
            quantize(pipe, calibration=Calibration(calibration.meta, records), progress=False)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_weights_that_are_not_finite(self, pipe: TextToAudioPipeline, value: float) -> None:
        with torch.no_grad():
            pipe.unet.mid_block.resnets[0].conv1.weight[3, 2, 1, 0] = value
        for call in (
            lambda: quantize(pipe, QuantConfig(activation="dynamic", **FAST), progress=False),
            lambda: calibrate(pipe, PROMPTS, steps=2, progress=False),
        ):
            with pytest.raises(NonFiniteError, match=r"'mid_block\.resnets\.0\.conv1\.weight'"):
                call()

    def test_weights_too_large_for_their_float16(self, pipe: TextToAudioPipeline) -> None:
        with torch.no_grad():
            pipe.unet.conv_out.weight[0, 0, 0, 0] = 1e5
        before = _weights(pipe.unet)
        with pytest.raises(NonFiniteError, match="layer 'conv_out'"):
            quantize(pipe, QuantConfig(activation="dynamic", **FAST), progress=False)
        assert _is_untouched(pipe.unet, before)

    def test_a_quantized_model(
        self, quantized: TextToAudioPipeline, calibration: Calibration
    ) -> None:
        for call in (
            lambda: quantize(quantized, calibration=calibration),
            lambda: plan(quantized),
            lambda: calibrate(quantized, PROMPTS, steps=1),
        ):
            with pytest.raises(ConfigError, match="quantized already"):
                call()

    def test_hooked_layers(self, pipe: TextToAudioPipeline) -> None:
        handle = pipe.unet.conv_in.register_forward_hook(lambda *_: None)
        with pytest.raises(UnsupportedLayerError, match="'conv_in' has hooks"):
            quantize(pipe, QuantConfig(activation="dynamic", **FAST), progress=False)
        handle.remove()

    def test_an_interruption_leaves_the_model_as_it_was(
        self,
        pipe: TextToAudioPipeline,
        calibration: Calibration,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        before = _weights(pipe.unet)
        made = []

        def interrupted(*arguments: Any, **_: Any) -> nn.Module:
            made.append(arguments)
            if len(made) == 20:
                raise KeyboardInterrupt
            return W8Linear(4, 4)

        monkeypatch.setattr("ptq4adm.replacing.quantized_layer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantize(pipe, calibration=calibration, progress=False)
        assert _is_untouched(pipe.unet, before)

    def test_a_step_that_was_not_calibrated(
        self, pipe: TextToAudioPipeline, tiny_pipeline: Path
    ) -> None:
        partial = calibrate(load_pipeline(tiny_pipeline), PROMPTS[:1], steps=2, buckets=8)
        quantize(pipe, QuantConfig(**FAST), partial, progress=False)
        _latents(pipe, steps=2)
        with pytest.raises(UncalibratedStepError, match="calibrate with more steps"):
            _latents(pipe, steps=8)

    def test_what_is_not_a_model(self) -> None:
        with pytest.raises(UnsupportedModelError):
            quantize(nn.Linear(4, 4))

    def test_a_bare_denoiser_cannot_be_calibrated(self, pipe: TextToAudioPipeline) -> None:
        with pytest.raises(MissingComponentError, match="bare denoiser"):
            calibrate(pipe.unet, PROMPTS)


class TestPlan:
    """The table, without changing anything."""

    def test_it_changes_nothing_and_needs_no_calibration(self, pipe: TextToAudioPipeline) -> None:
        before = _weights(pipe.unet)
        text = str(plan(pipe))
        assert _is_untouched(pipe.unet, before)
        for expected in ("conv_in", "w4a8", "w8", "float", "128 + 128", "MB fp16", "% less"):
            assert expected in text

    @pytest.mark.parametrize("name", ["audioldm-s", "audioldm-m", "audioldm-l"])
    def test_published_sizes_shrink_by_70_percent(self, name: str) -> None:
        planned = plan(real_unet(name, device="meta"), QuantConfig())
        assert planned.saving >= 0.70
        assert planned.bytes_before == 2 * sum(
            p.numel() for p in real_unet(name, device="meta").parameters()
        )


class TestSensitiveLayers:
    """Eight bits where a family says that four lose most, unless somebody decides otherwise."""

    @pytest.mark.parametrize("config", [{}, {"scheme": "w8a8"}, {"protect_sensitive": False}])
    def test_they_take_eight_bits_in_w4a8_only(
        self, float_pipe: TextToAudioPipeline, config: dict[str, Any]
    ) -> None:
        found = {r.name: r for r in plan(float_pipe, QuantConfig(**config)).rows}
        shortcuts = [row for name, row in found.items() if name.endswith("conv_shortcut")]
        assert shortcuts
        for row in shortcuts:
            protected = not config
            assert row.scheme == ("w4a8" if "protect_sensitive" in config else "w8a8")
            assert row.reason.startswith("sensitive") == protected

    def test_a_budget_and_overrides_win(self, float_pipe: TextToAudioPipeline) -> None:
        names = [r.name for r in plan(float_pipe).rows if r.reason.startswith("sensitive")]
        first, second, *_ = names
        config = QuantConfig(overrides={second: "float"})
        planned = plan(float_pipe, config, assignment={first: "w4a8", second: "w4a8"})
        found = {row.name: row.scheme for row in planned.rows}
        assert (found[first], found[second]) == ("w4a8", "float")

    def test_the_switch_is_a_truth_value(self) -> None:
        with pytest.raises(ConfigError, match="protect_sensitive: got 1, needs True or False"):
            QuantConfig(protect_sensitive=1)  # type: ignore[arg-type]
