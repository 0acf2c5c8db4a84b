"""Silent clips: they score well on distances between sets, so they are counted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ptq4adm.errors import ShapeError

THRESHOLD_DBFS = -60.0
HIGH_SHARE = 0.05


def level_dbfs(clips: Sequence[Tensor]) -> Tensor:
    """Root mean square level of clips.

        L = 10 log10( mean of x^2 )  dBFS                                                (1)

    A square wave at full scale has 0 dBFS, a sine at full scale -3 dBFS.

    Args:
        clips: floating [S] each, full scale is 1.

    Returns:
        float64 [N]; -inf for digital silence.

    Raises:
        ShapeError: if there is no clip, or an empty one.
    """
    if not len(clips) or any(clip.dim() != 1 or not len(clip) for clip in clips):
        raise ShapeError(f"clips: got {len(clips)}; one or more [S] that are not empty are needed")
    powers = [clip.double().square().mean() for clip in clips]
    return 10.0 * torch.log10(torch.stack(powers))


def silent_share(clips: Sequence[Tensor], threshold_dbfs: float = THRESHOLD_DBFS) -> float:
    """Share of clips whose level is below a threshold, in [0, 1].

    Args:
        clips: floating [S] each.
        threshold_dbfs: clips below it are silent.

    Raises:
        ShapeError: if there is no clip, or an empty one.
    """
    return float((level_dbfs(clips) < threshold_dbfs).double().mean())


def silence_warning(side: str, share: float, threshold_dbfs: float = THRESHOLD_DBFS) -> str | None:
    """A sentence if too many clips of a set are silent, else None.

    Args:
        side: what the set is called.
        share: of silent clips, in [0, 1].
        threshold_dbfs: they lie below it.
    """
    if share <= HIGH_SHARE:
        return None
    return (
        f"{share:.0%} of the {side} clips are silent (below {threshold_dbfs:g} dBFS): silence "
        "scores well on distances between sets, so listen before trusting them"
    )
