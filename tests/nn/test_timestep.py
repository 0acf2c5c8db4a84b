"""The shared step index and the hook that sets it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from ptq4adm.errors import MixedTimestepError, ShapeError, UncalibratedStepError
from ptq4adm.nn import StepIndex, W4A8Linear, attach_step_hook, find_step
from ptq4adm.quant.buckets import TimestepBuckets


class Denoiser(nn.Module):
    """A model called as UNets are, of one quantized layer."""

    def __init__(self, step: StepIndex) -> None:
        super().__init__()
        scale = torch.tensor([[0.01, 0.02, 0.04, 0.08]])
        self.layer = W4A8Linear.from_float(nn.Linear(64, 8), x_scale=scale, step=step)

    def forward(
        self,
        sample: Tensor,
        timestep: object,  # noqa: ARG002 - read by the hook
    ) -> Tensor:
        return self.layer(sample)


@pytest.fixture
def step() -> StepIndex:
    return StepIndex(TimestepBuckets(1000, (True, True, False, True)))


@pytest.fixture
def denoiser(step: StepIndex) -> Denoiser:
    model = Denoiser(step)
    attach_step_hook(model, step)
    return model


@pytest.mark.parametrize(
    "timestep",
    [300, 300.0, torch.tensor(300), torch.tensor([300, 300]), torch.tensor(300.5)],
    ids=["int", "float", "0-dim", "batch", "float tensor"],
)
def test_every_form_of_the_timestep_selects_its_bucket(
    denoiser: Denoiser, step: StepIndex, timestep: object
) -> None:
    x = torch.randn(2, 64)
    denoiser(x, timestep)
    assert int(step.index) == 1
    denoiser(x, timestep=999)
    assert int(step.index) == 3


def test_the_hook_changes_the_result_through_the_table(denoiser: Denoiser) -> None:
    x = torch.randn(2, 64)
    assert not torch.equal(denoiser(x, 0), denoiser(x, 999))
    assert torch.equal(denoiser(x, 0), denoiser(x, 1))


@pytest.mark.parametrize("timestep", [-1, 1000, torch.tensor(1000), 600])
def test_steps_outside_the_calibrated_range_are_refused(
    denoiser: Denoiser, timestep: object
) -> None:
    with pytest.raises(UncalibratedStepError):
        denoiser(torch.randn(2, 64), timestep)


def test_a_batch_of_mixed_timesteps_is_refused(denoiser: Denoiser) -> None:
    with pytest.raises(MixedTimestepError, match="differ within one batch"):
        denoiser(torch.randn(2, 64), torch.tensor([1, 2]))


def test_a_call_without_a_timestep_is_refused(denoiser: Denoiser) -> None:
    with pytest.raises(ShapeError, match="without a timestep"):
        denoiser(torch.randn(2, 64), None)


def test_a_tensor_elsewhere_is_not_waited_for(step: StepIndex) -> None:
    """Without a GPU, a meta tensor stands for one that cannot be read on the host."""
    step.index = step.index.to("meta")
    step.set_timestep(torch.tensor([5, 6], device="meta"))
    assert step.index.is_meta


def test_it_works_across_inference_mode(step: StepIndex) -> None:
    with torch.inference_mode():
        made_inside = StepIndex(step.buckets)
        made_inside.set_timestep(999)
    made_inside.set_timestep(0)
    assert int(made_inside.index) == 0


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copied_denoiser_sets_its_own_step(denoiser: Denoiser, duplicate: object) -> None:
    twin = duplicate(denoiser)  # type: ignore[operator]
    assert find_step(twin) is twin.layer.step
    assert find_step(twin) is not find_step(denoiser)
    twin(torch.randn(2, 64), 999)
    assert int(twin.layer.step.index) == 3
    assert int(denoiser.layer.step.index) == 0  # type: ignore[union-attr]


def test_a_model_without_the_hook_has_no_step() -> None:
    assert find_step(nn.Linear(2, 2)) is None


def test_dtype_changes_leave_the_index_alone(denoiser: Denoiser, step: StepIndex) -> None:
    denoiser.half()
    assert step.index.dtype == torch.int64
    denoiser(torch.randn(2, 64).half(), 999)
    assert int(step.index) == 3
