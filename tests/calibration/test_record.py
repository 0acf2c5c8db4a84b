"""Recording: what the hooks see, resuming, and what stops a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_model import PROMPTS, Adapter, Net, Pipe
from torch import nn

from ptq4adm.calibration import (
    Calibration,
    RunSettings,
    default_prompts,
    fingerprint,
    prompts_hash,
    record,
)
from ptq4adm.errors import (
    CalibrationError,
    CalibrationMismatchError,
    ConfigError,
    NonFiniteError,
    PromptError,
)
from ptq4adm.prompts import find_domain
from ptq4adm.protocols import DenoiserAdapter

SETTINGS = RunSettings(steps=4, guidance=2.0, buckets=4, batch=2)


def _record(pipe: Any, prompts: Sequence[str] = PROMPTS, **arguments: Any) -> Calibration:
    settings = arguments.pop("settings", SETTINGS)
    return record(Adapter(), pipe, prompts, settings, progress=False, **arguments)


def test_the_adapter_of_these_tests_is_one() -> None:
    assert isinstance(Adapter(), DenoiserAdapter)


def test_every_layer_segment_and_bucket_is_recorded() -> None:
    calibration = _record(Pipe())
    assert {name: len(r) for name, r in calibration.records.items()} == {"first": 1, "shortcut": 2}
    assert calibration.buckets.calibrated == (True,) * 4
    # both halves of the guided batch, 9 positions, each segment's own channels
    counts = [int(r.counts[0].sum()) for r in calibration.records["shortcut"]]
    assert counts == [2 * len(PROMPTS) * 9 * channels for channels in (6, 4)]


def test_segments_and_buckets_have_their_own_ranges() -> None:
    scales = _record(Pipe()).scales("shortcut", "absmax")
    assert scales is not None
    hidden, skip = scales
    assert (skip > 10 * hidden).all()
    # the net multiplies the skip by the timestep: 24, 49, 74, 99 in buckets 0 to 3
    torch.testing.assert_close(skip / skip[3], torch.tensor([24.0, 49.0, 74.0, 99.0]) / 99)


def test_batching_changes_nothing() -> None:
    one = _record(Pipe(), settings=RunSettings(steps=4, guidance=2.0, buckets=4, batch=1))
    all_at_once = _record(Pipe(), settings=RunSettings(steps=4, guidance=2.0, buckets=4, batch=5))
    assert one.digest() == all_at_once.digest()


def test_hooks_are_gone_afterwards_even_after_an_error() -> None:
    pipe = Pipe()
    _record(pipe)
    pipe.broken = ("sound 0", 0)
    with pytest.raises(NonFiniteError):
        _record(pipe)
    assert all(not m._forward_pre_hooks for m in pipe.net.modules())


def test_nan_activations_name_layer_step_and_prompt() -> None:
    pipe = Pipe()
    pipe.broken = ("sound 3", 2)
    message = r"layer 'first'.*at step 3 \(timestep 49\) of prompt 'sound 3'; "
    with pytest.raises(NonFiniteError, match=message):
        _record(pipe)


class TestCache:
    """An interrupted calibration goes on; a finished one is found."""

    def test_it_goes_on_where_it_stopped_with_an_equal_result(self, tmp_path: Path) -> None:
        pipe = Pipe()
        pipe.stop_at = "sound 4"
        with pytest.raises(KeyboardInterrupt):
            _record(pipe, cache=tmp_path)
        assert pipe.runs == [PROMPTS[:2], PROMPTS[2:4]]
        pipe.stop_at = None
        resumed = _record(pipe, cache=tmp_path)
        assert pipe.runs[2:] == [PROMPTS[4:]]
        assert resumed.digest() == _record(Pipe()).digest()
        assert _record(pipe, cache=tmp_path).digest() == resumed.digest()
        assert len(pipe.runs) == 3

    def test_other_settings_prompts_or_weights_do_not_use_it(self, tmp_path: Path) -> None:
        pipe = Pipe()
        _record(pipe, cache=tmp_path)
        runs = len(pipe.runs)
        _record(pipe, PROMPTS[:2], cache=tmp_path)
        assert len(pipe.runs) == runs + 1
        with torch.no_grad():
            pipe.net.first.weight[0, 0] += 1
        _record(pipe, cache=tmp_path)
        assert len(pipe.runs) == runs + 4

    def test_another_scheduler_does_not_use_it(self, tmp_path: Path) -> None:
        pipe = Pipe()
        _record(pipe, cache=tmp_path)
        runs = len(pipe.runs)
        pipe.scheduler.config["beta_start"] = 0.3
        _record(pipe, cache=tmp_path)
        assert len(pipe.runs) == 2 * runs

    def test_a_damaged_cache_is_made_again(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        good = _record(Pipe(), cache=tmp_path)
        (file,) = tmp_path.iterdir()
        file.write_bytes(file.read_bytes()[:100])
        assert _record(Pipe(), cache=tmp_path).digest() == good.digest()
        assert "not readable" in caplog.text


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "empty list"),
        ("one string", "needs a list"),
        (["a", " "], "prompt 1 is empty"),
        (["a", 3], "prompt 1: got int"),
    ],
)
def test_wrong_prompts_are_refused_before_anything_runs(prompts: Any, message: str) -> None:
    pipe = Pipe()
    with pytest.raises(PromptError, match=message):
        _record(pipe, prompts)
    assert not pipe.runs


@pytest.mark.parametrize("field", ["steps", "buckets", "batch"])
def test_settings_out_of_range_are_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field}: got 0"):
        RunSettings(**{"steps": 4, "guidance": 1.0, field: 0})


def test_a_model_without_float_layers_is_refused() -> None:
    pipe = Pipe()
    pipe.net = nn.Sequential(nn.ReLU())  # type: ignore[assignment]
    with pytest.raises(CalibrationError, match="no float linear or convolution"):
        _record(pipe)


def test_default_prompts_are_many_different_and_not_empty() -> None:
    prompts = default_prompts()
    assert len(prompts) == len(set(prompts)) >= 16
    assert all(p.strip() == p and p for p in prompts)
    assert prompts_hash(prompts) != prompts_hash(prompts[::-1])


def test_default_prompts_are_no_captions_of_the_test_split() -> None:
    domain = find_domain("audioldm-tiny")
    assert [prompt for prompt in default_prompts() if domain.is_reserved(prompt)] == []


class TestFingerprint:
    """One model, one fingerprint."""

    def test_dtype_and_copying_do_not_matter(self) -> None:
        net = Net().half()
        assert fingerprint(net) == fingerprint(net.float())

    def test_weights_shapes_and_names_matter(self) -> None:
        net = Net()
        prints = [fingerprint(net)]
        with torch.no_grad():
            net.shortcut.bias += 0.5
        prints.append(fingerprint(net))
        net.first = nn.Conv2d(4, 7, 1)
        prints.append(fingerprint(net))
        net.other = nn.Identity()
        net.renamed, net.first = net.first, nn.Identity()  # type: ignore[assignment]
        prints.append(fingerprint(net))
        assert len(set(prints)) == 4

    def test_a_calibration_refuses_another_model(self) -> None:
        pipe = Pipe()
        calibration = _record(pipe)
        calibration.check(pipe.net)
        with pytest.raises(CalibrationMismatchError, match="calibrate this model"):
            calibration.check(Net())
