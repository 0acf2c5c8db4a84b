"""Signatures: what is recorded, resuming, what is refused, bins, memory."""

from __future__ import annotations

import json
import math
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_model import PROMPTS, Adapter, Net, Pipe, seeded
from torch import Tensor, nn

from ptq4adm.calibration import RunSettings, Signatures, open_signatures, record_signatures
from ptq4adm.calibration import signature_record as recording
from ptq4adm.calibration.bins import bin_signatures, log_bins
from ptq4adm.calibration.signature_record import SAMPLE, SignatureRecorder
from ptq4adm.calibration.signatures import STATISTICS, SignatureMeta, shard_path, write_shard
from ptq4adm.errors import (
    CalibrationError,
    CalibrationMismatchError,
    ConfigError,
    NonFiniteError,
    OutputError,
)

SETTINGS = RunSettings(steps=4, guidance=2.0, buckets=4, batch=2)
STRATA = torch.tensor([3, 2, 1, 0])


def _record(pipe: Any, folder: Path, **arguments: Any) -> Signatures:
    prompts = arguments.pop("prompts", PROMPTS)
    settings = arguments.pop("settings", SETTINGS)
    return record_signatures(Adapter(), pipe, prompts, settings, folder, progress=False)


def _values(signatures: Signatures) -> Tensor:
    """[P, S, R, H, 4]."""
    return torch.cat([values for _, values in signatures.blocks()])


def _oracle(x: Tensor) -> list[float]:
    """Statistics of one sample, from their definitions in float64."""
    flat = x.double().flatten()
    ordered = flat.abs().sort().values
    p999 = ordered[math.ceil(0.999 * len(flat)) - 1]
    values = (ordered[-1], p999, flat.mean(), flat.square().mean().sqrt())
    return [float(value) for value in values]


class TestWhatIsRecorded:
    """Values against their definitions."""

    def test_every_prompt_step_site_and_half_has_its_statistics(self, tmp_path: Path) -> None:
        pipe = Pipe()
        signatures = _record(pipe, tmp_path)
        assert signatures.meta.sites == ("first", "shortcut[0]", "shortcut[1]")
        assert signatures.timesteps.tolist() == [99, 74, 49, 24]
        values = _values(signatures)
        assert values.shape == (5, 4, 3, 2, len(STATISTICS))
        for prompt in range(5):
            x = torch.randn(4, 3, 3, generator=seeded(prompt))
            hidden = pipe.net.first(x[None])[0]
            for step, t in enumerate((99, 74, 49, 24)):
                for site, seen in enumerate((x, hidden, x * t)):
                    for half in (0, 1):
                        found = values[prompt, step, site, half].double()
                        expected = torch.tensor(_oracle(seen)).double()
                        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    def test_halves_and_prompts_are_kept_apart(self) -> None:
        recorder = _recorder()
        # unconditional samples of prompts a and b first, then the conditional ones
        x = torch.arange(1.0, 5.0).view(4, 1, 1, 1).expand(4, 4, 3, 3)
        recorder.see("first", x, (x,))
        absmax = recorder.values[:, 0, 0, :, 0]
        assert absmax.tolist() == [[1.0, 3.0], [2.0, 4.0]]

    def test_a_layer_that_runs_for_one_half_leaves_the_other_open(self) -> None:
        recorder = _recorder()
        x = torch.ones(2, 4, 3, 3)
        recorder.see("first", x, (x,))
        assert recorder.values[0, 0, 0, 0, 0] == 1.0
        assert torch.isnan(recorder.values[0, 0, 0, 1]).all()

    def test_a_layer_that_runs_twice_keeps_the_larger(self) -> None:
        recorder = _recorder()
        for scale in (1.0, 3.0, 2.0):
            x = torch.full((4, 4, 3, 3), scale)
            recorder.see("first", x, (x,))
        assert recorder.values[0, 0, 0, 0].tolist() == [3.0, 3.0, 3.0, 3.0]

    def test_the_percentile_of_a_large_input_is_read_from_a_fixed_number_of_values(self) -> None:
        recorder = _recorder()
        x = torch.randn(1, 20 * SAMPLE, generator=seeded(0))
        picked = recorder._pick(x, SAMPLE)
        assert picked.shape == (1, SAMPLE)
        assert torch.equal(picked, recorder._pick(x, SAMPLE))
        # no channel is left out, as one would be by a stride
        assert len(set((recorder._columns[20 * SAMPLE, SAMPLE, x.device] % 16).tolist())) == 16
        found = recorder._statistics(x)[0]
        # |N(0, 1)| has 3.29 there; eight of the values lie above
        assert abs(float(found[1]) - 3.29) < 0.4
        assert float(found[0]) == float(x.abs().max())

    def test_large_finite_values_stay_finite(self) -> None:
        recorder = _recorder()
        x = torch.full((4, 4, 3, 3), 1e30)
        recorder.see("first", x, (x,))
        expected = torch.full((4,), 1e30)
        torch.testing.assert_close(recorder.values[0, 0, 0, 0], expected)

    def test_rows_that_belong_to_no_prompt_are_refused(self) -> None:
        recorder = _recorder()
        x = torch.ones(3, 4, 3, 3)
        with pytest.raises(CalibrationError, match=r"'first' read 3 rows for 2 prompts.*batch=1"):
            recorder.see("first", x, (x,))

    def test_nan_activations_name_layer_step_and_prompt(self, tmp_path: Path) -> None:
        pipe = Pipe()
        pipe.broken = ("sound 3", 2)
        with pytest.raises(NonFiniteError, match=r"'first'.*step 3 \(timestep 49\).*'sound 3'"):
            _record(pipe, tmp_path)
        assert all(not m._forward_pre_hooks for m in pipe.net.modules())

    def test_no_prompt_is_stored(self, tmp_path: Path) -> None:
        _record(Pipe(), tmp_path)
        assert all(b"sound" not in path.read_bytes() for path in tmp_path.iterdir())


def _recorder() -> SignatureRecorder:
    """In the first step of prompts a and b."""
    recorder = SignatureRecorder(Net(), {"shortcut": (6, 4)})
    recorder.start(["a", "b"], _meta(sites=recorder.sites))
    recorder._on_call(Net(), (torch.ones(1), 5), {})
    return recorder


class TestResuming:
    """An interrupted pass goes on with equal results; a foreign set is refused."""

    def test_it_goes_on_where_it_stopped(self, tmp_path: Path) -> None:
        pipe = Pipe()
        pipe.stop_at = "sound 4"
        with pytest.raises(KeyboardInterrupt):
            _record(pipe, tmp_path / "a")
        assert open_signatures(tmp_path / "a").done == 4
        pipe.stop_at = None
        resumed = _record(pipe, tmp_path / "a")
        assert pipe.runs[2:] == [PROMPTS[4:]]
        assert resumed.done == 5
        assert torch.equal(_values(resumed), _values(_record(Pipe(), tmp_path / "b")))
        _record(pipe, tmp_path / "a")
        assert len(pipe.runs) == 3

    def test_an_unfinished_shard_is_none(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(_tensors: object, target: Path, **_: object) -> None:
            target.write_bytes(b"half")
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("ptq4adm.calibration.files.save_file", interrupted)
            with pytest.raises(KeyboardInterrupt):
                _record(Pipe(), tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["signatures.json"]
        assert _record(Pipe(), tmp_path).done == 5

    def test_batches_change_nothing(self, tmp_path: Path) -> None:
        one = RunSettings(steps=4, guidance=2.0, batch=1)
        a, b = _record(Pipe(), tmp_path / "a"), _record(Pipe(), tmp_path / "b", settings=one)
        torch.testing.assert_close(_values(a), _values(b))

    def test_other_weights_are_refused(self, tmp_path: Path) -> None:
        pipe = Pipe()
        _record(pipe, tmp_path)
        with torch.no_grad():
            pipe.net.first.weight[0, 0] += 1
        with pytest.raises(CalibrationMismatchError, match=r"recorded on model .* weights differ"):
            _record(pipe, tmp_path)

    def test_another_scheduler_is_refused_by_the_setting_that_differs(self, tmp_path: Path) -> None:
        pipe = Pipe()
        _record(pipe, tmp_path)
        pipe.scheduler.config["_private"] = "another folder"
        _record(pipe, tmp_path)
        pipe.scheduler.config["beta_start"] = 0.2
        with pytest.raises(CalibrationMismatchError, match=r"beta_start was 0\.1, is 0\.2"):
            _record(pipe, tmp_path)

    @pytest.mark.parametrize(
        "change",
        [
            {"prompts": PROMPTS[:4]},
            {"settings": RunSettings(steps=5, guidance=2.0)},
            {"settings": RunSettings(steps=4, guidance=2.0, seed=1)},
        ],
    )
    def test_another_run_is_refused(self, tmp_path: Path, change: dict[str, Any]) -> None:
        _record(Pipe(), tmp_path)
        with pytest.raises(CalibrationMismatchError, match="other prompts or settings"):
            _record(Pipe(), tmp_path, **change)

    def test_a_damaged_shard_is_named(self, tmp_path: Path) -> None:
        signatures = _record(Pipe(), tmp_path)
        path = shard_path(tmp_path, 2)
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(CalibrationError, match=r"signatures-00002.*delete it"):
            bin_signatures(signatures, STRATA)

    def test_a_missing_shard_is_recorded_again(self, tmp_path: Path) -> None:
        whole = _values(_record(Pipe(), tmp_path))
        shard_path(tmp_path, 2).unlink()
        unfinished = open_signatures(tmp_path)
        assert unfinished.done == 2
        with pytest.raises(CalibrationError, match="2 of 5 prompts are recorded"):
            bin_signatures(unfinished, STRATA)
        assert torch.equal(_values(_record(Pipe(), tmp_path)), whole)

    def test_what_lies_behind_a_gap_is_recorded_again_in_any_batch(self, tmp_path: Path) -> None:
        whole = _values(_record(Pipe(), tmp_path, settings=replace(SETTINGS, batch=1)))
        shard_path(tmp_path, 1).unlink()
        again = _record(Pipe(), tmp_path, settings=replace(SETTINGS, batch=3))
        assert again.starts == (0, 1, 4)
        assert again.done == 5
        torch.testing.assert_close(_values(again), whole)

    def test_shards_without_an_index_count_for_nothing(self, tmp_path: Path) -> None:
        pipe = Pipe()
        _record(pipe, tmp_path)
        (tmp_path / "signatures.json").unlink()
        with torch.no_grad():
            pipe.net.first.weight.mul_(2)
        pipe.stop_at = PROMPTS[2]
        with pytest.raises(KeyboardInterrupt):
            _record(pipe, tmp_path)
        assert open_signatures(tmp_path).done == 2

    def test_an_index_of_another_version_or_kind_is_refused(self, tmp_path: Path) -> None:
        _record(Pipe(), tmp_path)
        index = tmp_path / "signatures.json"
        content = json.loads(index.read_text())
        for text in (json.dumps({**content, "format_version": 9}), "{}", "no JSON"):
            index.write_text(text)
            with pytest.raises(CalibrationError, match="record again"):
                open_signatures(tmp_path)

    def test_a_folder_that_cannot_be_written_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(OutputError, match="cannot write signatures"):
            _record(Pipe(), tmp_path / "file" / "below")


def _meta(**change: Any) -> SignatureMeta:
    content: dict[str, Any] = {
        "fingerprint": "f" * 32,
        "scheduler": "{}",
        "prompts_hash": "p" * 16,
        "prompt_keys": ("k0", "k1"),
        "steps": 4,
        "guidance": 2.0,
        "seed": 0,
        "num_train_timesteps": 100,
        "sites": ("a", "b"),
    }
    return SignatureMeta(**{**content, **change})


def _written(folder: Path, absmax: Tensor, sites: tuple[str, ...]) -> Signatures:
    """Signatures with given absmax [P, S, R, H]."""
    P, S, _, H = absmax.shape
    keys = tuple(f"k{i}" for i in range(P))
    meta = _meta(prompt_keys=keys, steps=S, sites=sites, guidance=float(H))
    recording.write_index(folder, meta)
    for start in range(0, P, 2):
        values = absmax[start : start + 2, ..., None].repeat(1, 1, 1, 1, 4).contiguous()
        timesteps = torch.arange(S - 1, -1, -1, dtype=torch.float64)
        tensors = {"values": values, "timesteps": timesteps, "features": torch.zeros(S, 0)}
        write_shard(folder, start, tensors)
    return open_signatures(folder)


class TestBins:
    """Equation (1) of `ptq4adm.calibration.bins`, and what has no range."""

    def test_bins_by_hand(self) -> None:
        low, high = torch.tensor([1.0]).double(), torch.tensor([16.0]).double()
        ranges = torch.tensor([1.0, 1.9, 2.1, 7.9, 8.1, 16.0, 0.0, math.nan])[:, None]
        # four bins, one an octave
        assert log_bins(ranges, low, high, 4).flatten().tolist() == [0, 0, 1, 2, 3, 3, 0, -1]

    def test_a_stratum_has_bins_of_its_own_or_shares_them(self, tmp_path: Path) -> None:
        absmax = torch.tensor([[1.0, 100.0], [16.0, 200.0]])[:, :, None, None]
        signatures = _written(tmp_path, absmax, ("a",))
        own = bin_signatures(signatures, torch.tensor([1, 0]), bins=4)
        # pairs (0, 0), (0, 1), (1, 0), (1, 1); stratum 1 has bins 4 to 7
        assert own.bins.flatten().tolist() == [4, 0, 7, 3]
        shared = bin_signatures(signatures, torch.tensor([1, 0]), bins=4, by_stratum=False)
        assert shared.bins.flatten().tolist() == [0, 3, 2, 3]

    def test_layers_without_a_range_are_named(self, tmp_path: Path) -> None:
        absmax = torch.rand(3, 2, 4, 2) + 1
        absmax[:, :, 1] = math.nan
        absmax[:, :, 2] = 5.0
        absmax[:, :, 3] = 0.0
        signatures = _written(tmp_path, absmax, ("good", "idle", "constant", "zero"))
        never, constant = bin_signatures(signatures, torch.tensor([1, 0])).warnings
        assert never.startswith("idle never ran")
        assert constant.startswith("constant, zero had one range throughout")

    def test_ranges_that_are_no_statistic_or_bins_that_are_none_are_refused(
        self, tmp_path: Path
    ) -> None:
        signatures = _written(tmp_path, torch.ones(2, 2, 1, 1), ("a",))
        with pytest.raises(ConfigError, match="statistic: got 'median'"):
            bin_signatures(signatures, torch.tensor([1, 0]), statistic="median")
        with pytest.raises(ConfigError, match="bins: got 1, needs 2"):
            bin_signatures(signatures, torch.tensor([1, 0]), bins=1)

    def test_a_model_of_which_nothing_ran_is_refused(self, tmp_path: Path) -> None:
        signatures = _written(tmp_path, torch.full((2, 2, 1, 1), math.nan), ("a",))
        with pytest.raises(CalibrationError, match="no layer ever ran"):
            bin_signatures(signatures, torch.tensor([1, 0]))


class TestMemory:
    """Whatever the number of prompts."""

    def test_a_batch_at_a_time_is_recorded(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made: list[weakref.ref[Tensor]] = []
        make = recording.empty_values

        def counted(count: int, meta: SignatureMeta) -> Tensor:
            assert count <= SETTINGS.batch
            # the last batch's may still be there while the new one's are made, and no other
            assert sum(ref() is not None for ref in made) <= 1
            values = make(count, meta)
            made.append(weakref.ref(values))
            return values

        monkeypatch.setattr(recording, "empty_values", counted)
        _record(Pipe(), tmp_path, prompts=[f"sound {i}" for i in range(12)])
        assert len(made) == 6

    def test_two_shards_at_most_are_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        signatures = _record(Pipe(), tmp_path, prompts=[f"sound {i}" for i in range(12)])
        alive: list[weakref.ref[Tensor]] = []
        read = Signatures._read

        def counted(self: Signatures, start: int) -> dict[str, Tensor]:
            assert sum(ref() is not None for ref in alive) <= 1
            tensors = read(self, start)
            alive.append(weakref.ref(tensors["values"]))
            return tensors

        monkeypatch.setattr(Signatures, "_read", counted)
        table = bin_signatures(signatures, STRATA)
        assert len(alive) >= 12
        # one int16 a pair, site and half
        assert table.bins.numel() * table.bins.element_size() == 12 * 4 * 3 * 2 * 2


class _Idle(Net):
    """With a layer that never runs, and one that reads a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.idle, self.constant = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        self.constant(torch.ones(len(x), 3))
        return super().forward(x, timestep)


def test_a_layer_that_never_fires_and_one_that_never_changes_are_warned_of(tmp_path: Path) -> None:
    pipe = Pipe()
    pipe.net = _Idle().requires_grad_(False)
    warnings = bin_signatures(_record(pipe, tmp_path), STRATA).warnings
    assert [text.split()[0] for text in warnings] == ["idle", "constant"]
