"""Second moments of layers' inputs, streamed over a replay: what GPTQ needs of the data.

    H = Z Z^T,   C = X Z^T   over positions                                                 (1)

Z are the quantized inputs of the packed layer after the layers before it were rounded, X those of
the float layer at the same place. One layer takes K * K * 4 bytes for each of the two, so layers
are done in groups that fit a budget, and the replay is repeated for every group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ptq4adm.rounding.activations import columns, fake_quantize, packed_positions
from ptq4adm.rounding.replay import Replay
from ptq4adm.rounding.task import LayerTask
from ptq4adm.rounding.twin import Twin, Watch


@dataclass(frozen=True)
class Moments:
    """Of one layer's inputs, in the packed order of K.

    Attributes:
        hessian: H / M, float32 [Kp, Kp].
        cross: C / M, float32 [Kp, Kp]; None if the float inputs were not looked at.
        mean: mean of Z over positions, float32 [Kp].
        given_mean: mean of X; that of Z if the float inputs were not looked at.
        count: M, positions seen; 0 for a layer that no call reached.
    """

    hessian: Tensor
    cross: Tensor | None
    mean: Tensor
    given_mean: Tensor
    count: int

    def centred(self) -> Moments:
        """The moments about the means: what is left to the weights of a layer with a free bias."""
        hessian = self.hessian - self.mean[:, None] * self.mean
        # rounding of the difference must not revive an input that is always zero
        hessian.diagonal().clamp_min_(0)
        cross = self.cross
        if cross is not None:
            cross = cross - self.given_mean[:, None] * self.mean
        return Moments(hessian, cross, self.mean, self.given_mean, self.count)


class MomentSum:
    """Sums the moments of one layer.

    Args:
        task: the layer.
        has_cross: whether C is summed too.
        most: positions kept of every sample.
    """

    def __init__(self, task: LayerTask, *, has_cross: bool, most: int) -> None:
        K, device = task.layout.k, task.layer.weight.device
        self.task, self.most = task, most
        self.hessian = torch.zeros(K, K, device=device)
        self.cross = torch.zeros(K, K, device=device) if has_cross else None
        self.sums = torch.zeros(2, K, device=device)
        self.count = 0

    def add(self, quantized: Tensor, given: Tensor | None, seed: int) -> None:
        """Add one call.

        Args:
            quantized: input of the packed layer, with the quantization.
            given: input of the float layer; None without C.
            seed: of the positions kept.
        """
        Z = columns(self.task, quantized.float(), self.most, seed)  # [M, K]
        self.hessian.addmm_(Z.T, Z)
        self.sums[0] += Z.sum(dim=0)
        if self.cross is not None and given is not None:
            X = columns(self.task, given.float(), self.most, seed)
            self.cross.addmm_(X.T, Z)
            self.sums[1] += X.sum(dim=0)
        else:
            self.sums[1] += Z.sum(dim=0)
        self.count += Z.shape[0]

    def result(self) -> Moments:
        """The moments in packed order; zero where K is padding."""
        index = packed_positions(self.task).to(self.hessian.device)
        factor = 1.0 / max(1, self.count)
        cross = None if self.cross is None else _spread(self.cross, index, factor)
        means = self.sums[:, index.clamp_min(0)] * (factor * (index >= 0))
        hessian = _spread(self.hessian, index, factor)
        return Moments(hessian, cross, means[0], means[1], self.count)


def groups_within(
    tasks: Sequence[LayerTask], budget: int, *, per_layer: int
) -> list[list[LayerTask]]:
    """Neighbouring tasks whose moments fit a budget together; at least one each.

    Args:
        tasks: in the order of their calls.
        budget: bytes.
        per_layer: matrices of [K, K] a layer has.
    """
    groups: list[list[LayerTask]] = []
    taken = 0
    for task in tasks:
        size = 4 * per_layer * task.layout.k**2
        if not groups or taken + size > budget:
            groups.append([])
            taken = 0
        groups[-1].append(task)
        taken += size
    return groups


def collect(
    tasks: Sequence[LayerTask],
    denoiser: nn.Module,
    twin: Twin | None,
    replay: Replay,
    *,
    most: int,
) -> dict[str, MomentSum]:
    """Moments of some layers over one replay.

    Args:
        tasks: the layers.
        denoiser: the float model.
        twin: quantized as far as it is done, for Z; None takes Z from the float model, and no C.
        replay: the model's inputs.
        most: positions kept of every sample.
    """
    device = next(denoiser.parameters()).device
    sums = {t.name: MomentSum(t, has_cross=twin is not None, most=most) for t in tasks}
    floats = Watch({t.name: denoiser.get_submodule(t.name) for t in tasks})
    with torch.no_grad(), floats:
        for seed, batch in enumerate(replay.batches(device)):
            given = floats.call(partial(replay.call, denoiser, batch))
            quantized = given
            if twin is not None:
                with Watch({t.name: twin.layers[t.name] for t in tasks}) as watch:
                    quantized = watch.call(partial(twin.call, replay, batch))
            for task in tasks:
                if task.name not in given:
                    continue
                z = quantized[task.name]
                if twin is None:
                    z = fake_quantize(task, z, batch.timestep)
                sums[task.name].add(z, given[task.name], seed)
    return sums


def _spread(moments: Tensor, index: Tensor, factor: float) -> Tensor:
    """[K, K] in the order of `weight.flatten(1)` to packed order, [Kp, Kp]."""
    known = torch.nonzero(index >= 0).flatten()
    if len(known) == len(index):
        return moments[index[:, None], index].mul_(factor)
    spread = torch.zeros(len(index), len(index), device=moments.device)
    source = index[known]
    spread[known[:, None], known] = moments[source[:, None], source].mul_(factor)
    return spread
