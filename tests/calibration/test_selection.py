"""A choice of pairs: buckets, its file, recording what was chosen, inputs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_model import PROMPTS, Adapter, Pipe, seeded

from ptq4adm.calibration import (
    STRATEGIES,
    Calibration,
    ChosenInputs,
    InputRecorder,
    RunSettings,
    Selection,
    SelectionSettings,
    Signatures,
    prompts_hash,
    record,
    record_signatures,
    select_pairs,
)
from ptq4adm.calibration.bins import PairTable
from ptq4adm.calibration.merge import merge_calibrations
from ptq4adm.errors import CalibrationError, CalibrationMismatchError, ConfigError

SETTINGS = RunSettings(steps=4, guidance=2.0, buckets=4, batch=2)
TIMESTEPS = (99, 74, 49, 24)


@pytest.fixture
def signatures(tmp_path: Path) -> Signatures:
    folder = tmp_path / "signatures"
    return record_signatures(Adapter(), Pipe(), PROMPTS, SETTINGS, folder, progress=False)


def _choose(*pairs: int) -> SelectionSettings:
    """Settings that choose given pairs."""

    def given(table: PairTable, size: int, seed: int) -> list[int]:
        del table, size, seed
        return list(pairs)

    return SelectionSettings(given, len(pairs))


def _record(pipe: Any, selection: Selection | None, **arguments: Any) -> Calibration:
    settings = arguments.pop("settings", SETTINGS)
    return record(
        Adapter(), pipe, PROMPTS, settings, progress=False, selection=selection, **arguments
    )


class TestSelection:
    """`select_pairs`, whatever the strategy."""

    @pytest.mark.parametrize("name", STRATEGIES)
    def test_every_bucket_has_a_pair_and_the_size_is_kept(
        self, signatures: Signatures, name: str
    ) -> None:
        found = select_pairs(signatures, 4, SelectionSettings(name, 4))
        assert {step for _, step in found.pairs} == {0, 1, 2, 3}
        assert len(set(found.pairs)) == len(found.curve) == 4
        assert found.strategy == name
        assert list(found.curve) == sorted(found.curve)
        assert 0 < found.coverage == found.curve[-1] < 1

    def test_a_bucket_without_a_pair_takes_the_last_of_the_fullest(
        self, signatures: Signatures
    ) -> None:
        # steps 0, 0, 0, 1, 2: none of step 3
        found = select_pairs(signatures, 4, _choose(0, 4, 8, 1, 2))
        assert found.pairs[:2] == ((0, 0), (1, 0))
        assert found.pairs[2][1] == 3
        assert found.pairs[3:] == ((0, 1), (0, 2))
        (warning,) = found.warnings
        assert "1 of 5 pairs were exchanged" in warning

    def test_a_size_that_does_not_fit_is_refused(self, signatures: Signatures) -> None:
        for size in (3, 21):
            with pytest.raises(ConfigError, match=rf"got {size} pairs, needs 4 .* to 20"):
                select_pairs(signatures, 4, SelectionSettings("random", size))
        assert len(select_pairs(signatures, 4, SelectionSettings("random")).pairs) == 20
        with pytest.raises(ConfigError, match="size: got 0"):
            SelectionSettings("random", 0)
        with pytest.raises(ConfigError, match="'nobody'"):
            SelectionSettings("nobody")

    @pytest.mark.parametrize("pairs", [(0, 0, 1, 2, 3), (0, 1, 2, 3, 20), (0, 1, 2, 3, -1)])
    def test_a_strategy_that_breaks_its_promise_is_named(
        self, signatures: Signatures, pairs: tuple[int, ...]
    ) -> None:
        with pytest.raises(CalibrationError, match=r"strategy 'given' chose"):
            select_pairs(signatures, 4, _choose(*pairs))

    def test_a_file_gives_back_what_was_saved(self, signatures: Signatures, tmp_path: Path) -> None:
        found = select_pairs(signatures, 4, SelectionSettings(size=6))
        path = tmp_path / "selection.json"
        found.save(path)
        assert Selection.load(path) == found
        assert "sound" not in path.read_text()
        content = json.loads(path.read_text())
        for text in (json.dumps({**content, "format_version": 2}), "{}", "nothing"):
            path.write_text(text)
            with pytest.raises(CalibrationError, match="not a selection"):
                Selection.load(path)

    def test_the_digest_is_of_the_pairs_and_not_of_their_order(
        self, signatures: Signatures
    ) -> None:
        a, b, c = (
            select_pairs(signatures, 4, _choose(*pairs)).digest()
            for pairs in ((0, 1, 2, 3), (3, 2, 1, 0), (0, 1, 2, 7))
        )
        assert a == b != c


class TestRecording:
    """Histograms of the chosen pairs alone."""

    def test_all_pairs_give_what_no_selection_gives(self, signatures: Signatures) -> None:
        everything = select_pairs(signatures, 4, SelectionSettings("random", 20))
        chosen, plain = _record(Pipe(), everything), _record(Pipe(), None)
        for name in plain.records:
            for a, b in zip(chosen.records[name], plain.records[name], strict=True):
                assert torch.equal(a.counts, b.counts)
                assert torch.equal(a.maximum, b.maximum)

    def test_only_the_chosen_samples_are_counted(self, signatures: Signatures) -> None:
        # pair 5 is prompt 1, step 1; pairs 13, 14 are prompt 3, steps 1 and 2
        pairs = (0, 5, 13, 14, 3)
        calibration = _record(Pipe(), select_pairs(signatures, 4, _choose(*pairs)))
        (seen,) = calibration.records["first"]
        # both halves, 9 positions, 4 channels; the steps fall into buckets 3, 2, 2, 1, 0
        assert seen.counts.sum(dim=1).tolist() == [72, 72, 144, 72]
        for bucket, prompts in ((3, [0]), (2, [1, 3]), (1, [3]), (0, [0])):
            noise = [torch.randn(4, 3, 3, generator=seeded(p)) for p in prompts]
            assert float(seen.maximum[bucket]) == float(torch.stack(noise).max())
            assert float(seen.minimum[bucket]) == float(torch.stack(noise).min())

    def test_prompts_without_a_chosen_pair_do_not_run(self, signatures: Signatures) -> None:
        pipe = Pipe()
        selection = select_pairs(signatures, 4, _choose(4, 5, 18, 15))  # prompts 1, 3, 4
        calibration = _record(pipe, selection)
        assert pipe.runs == [[PROMPTS[1]], [PROMPTS[3], PROMPTS[4]]]
        assert calibration.meta.prompt_count == 5
        batches = _record(Pipe(), selection, settings=replace(SETTINGS, batch=1))
        assert batches.digest() == calibration.digest()

    def test_it_goes_on_where_it_stopped(self, signatures: Signatures, tmp_path: Path) -> None:
        selection = select_pairs(signatures, 4, _choose(0, 1, 10, 15))  # prompts 0, 2, 3
        pipe = Pipe()
        pipe.stop_at = PROMPTS[3]
        with pytest.raises(KeyboardInterrupt):
            _record(pipe, selection, cache=tmp_path)
        pipe.stop_at = None
        resumed = _record(pipe, selection, cache=tmp_path)
        assert pipe.runs == [[PROMPTS[0]], [PROMPTS[2], PROMPTS[3]]]
        assert resumed.digest() == _record(Pipe(), selection).digest()
        # another choice has a file of its own
        other = select_pairs(signatures, 4, _choose(0, 1, 10, 19))
        assert _record(Pipe(), other, cache=tmp_path).digest() != resumed.digest()

    def test_the_same_pairs_of_another_strategy_keep_their_own_name_and_curve(
        self, signatures: Signatures, tmp_path: Path
    ) -> None:
        for name in ("random", "activation-aware"):
            every = select_pairs(signatures, 4, SelectionSettings(name, 20))
            assert _record(Pipe(), every, cache=tmp_path).selection == every

    def test_a_selection_of_another_model_scheduler_or_run_is_refused(
        self, signatures: Signatures
    ) -> None:
        selection = select_pairs(signatures, 4, SelectionSettings(size=6))
        pipe = Pipe()
        with torch.no_grad():
            pipe.net.first.weight[0, 0] += 1
        with pytest.raises(CalibrationMismatchError, match="recorded on model"):
            _record(pipe, selection)
        pipe = Pipe()
        pipe.scheduler.config["beta_start"] = 0.3
        with pytest.raises(CalibrationMismatchError, match="another scheduler"):
            _record(pipe, selection)
        with pytest.raises(CalibrationMismatchError, match="made with seed 0, this run has 7"):
            _record(Pipe(), selection, settings=replace(SETTINGS, seed=7))

    def test_the_file_of_a_calibration_keeps_the_choice(
        self, signatures: Signatures, tmp_path: Path
    ) -> None:
        selection = select_pairs(signatures, 4, SelectionSettings(size=6))
        calibration = _record(Pipe(), selection)
        calibration.save(tmp_path / "c.safetensors")
        back = Calibration.load(tmp_path / "c.safetensors")
        assert back.selection == selection
        assert back.digest() == calibration.digest()
        assert replace(back, selection=None).digest() != calibration.digest()

    def test_rows_of_a_step_are_counted_by_pairs(self, signatures: Signatures) -> None:
        layer = Pipe().net.first
        selection = select_pairs(signatures, 4, SelectionSettings(size=7))
        plain, chosen = _record(Pipe(), None), _record(Pipe(), selection)
        assert plain.rows_per_step("first", layer) == 18
        assert chosen.rows_per_step("first", layer) == 18

    def test_calibrations_of_chosen_pairs_are_not_merged(self, signatures: Signatures) -> None:
        calibration = _record(Pipe(), select_pairs(signatures, 4, SelectionSettings(size=6)))
        with pytest.raises(CalibrationMismatchError, match="chosen pairs cannot be merged"):
            merge_calibrations([calibration], prompts_hash=prompts_hash(PROMPTS), seed=0)


class TestInputs:
    """What the denoiser was given at the chosen pairs."""

    def test_they_are_the_chosen_ones(self, signatures: Signatures, tmp_path: Path) -> None:
        selection = select_pairs(signatures, 4, _choose(0, 5, 14, 3))
        kept = InputRecorder(4)
        calibration = _record(Pipe(), selection, inputs=kept, cache=tmp_path)
        found = kept.result(calibration.meta.fingerprint)
        assert {tuple(pair) for pair in found.pairs.tolist()} == set(selection.pairs)
        assert found.sample.shape == (4, 2, 4, 3, 3)
        for i, (prompt, step) in enumerate(found.pairs.tolist()):
            noise = torch.randn(4, 3, 3, generator=seeded(prompt))
            assert torch.equal(found.sample[i, 0], noise)
            assert torch.equal(found.sample[i, 1], noise)
            assert found.timesteps[i] == TIMESTEPS[step]
        found.check(Pipe().net)
        # a finished calibration in the cache holds no inputs: they are recorded all the same
        again = InputRecorder(4)
        _record(Pipe(), selection, inputs=again, cache=tmp_path)
        assert torch.equal(again.result("f").sample, found.sample)

    def test_a_file_gives_back_what_was_saved(self, tmp_path: Path) -> None:
        found = _inputs()
        path = tmp_path / "inputs.safetensors"
        found.save(path)
        back = ChosenInputs.load(path)
        assert back.fingerprint == "f" * 32
        assert torch.equal(back.sample, found.sample)
        assert torch.equal(back.pairs, found.pairs)
        assert torch.equal(back.timesteps, found.timesteps)
        assert torch.equal(back.arguments["class_labels"], found.arguments["class_labels"])
        assert back.constants == found.constants == {"scale": 2.0, "encoder_hidden_states": None}
        with pytest.raises(CalibrationMismatchError, match="recorded on model"):
            back.check(Pipe().net)
        path.write_bytes(path.read_bytes()[:90])
        with pytest.raises(CalibrationError, match="truncated"):
            ChosenInputs.load(path)

    def test_only_rows_of_the_batch_are_kept(self) -> None:
        found = _inputs()
        # the mask of all positions, the timestep and the number are not of a batch
        assert set(found.arguments) == {"class_labels"}
        assert found.sample[0].tolist() == [[[1.0]], [[3.0]]]

    def test_arguments_that_would_be_lost_are_refused(self, signatures: Signatures) -> None:
        selection = select_pairs(signatures, 4, SelectionSettings(size=6))
        pipe = Pipe()
        forward = pipe.net.forward
        pipe.net.forward = lambda x, t, _extra=None: forward(x, t)  # type: ignore[assignment]
        pipe.net.register_forward_pre_hook(lambda _, args: (*args, args[0]))
        with pytest.raises(CalibrationError, match=r"3 arguments by position and none by name"):
            _record(pipe, selection, inputs=InputRecorder(6))

    def test_more_than_the_limit_is_refused_at_the_first_pair(self) -> None:
        kept = InputRecorder(1000, max_bytes=1000)
        with pytest.raises(CalibrationError, match="inputs of 1000 pairs take"):
            kept.add((0, 0), 5.0, torch.tensor([0]), {"sample": torch.ones(2, 1)})


def _inputs() -> ChosenInputs:
    """One pair: prompt 1 of two, in a batch of two halves."""
    kept = InputRecorder(1)
    sample = torch.arange(4.0).view(4, 1, 1)
    arguments = {
        "sample": sample,
        "timestep": torch.tensor([5, 5, 5, 5]),
        "class_labels": torch.randn(4, 7),
        "mask": torch.ones(9),
        "scale": 2.0,
        "encoder_hidden_states": None,
    }
    kept.add((1, 0), 5.0, torch.tensor([1, 3]), arguments)
    return kept.result("f" * 32)
