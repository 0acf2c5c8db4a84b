"""What a page shows; nothing here knows HTML, and nothing runs a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ptq4adm.calibration import Calibration
from ptq4adm.evaluation.result import Evaluation
from ptq4adm.prompts import Coverage
from ptq4adm.sensitivity import Sensitivity


@dataclass(frozen=True)
class SizeRow:
    """What the denoiser weighs in one form.

    Attributes:
        name: of the form, such as "W4A8".
        bytes: of all its tensors.
        layers: scheme to number of layers; empty for a float model.
    """

    name: str
    bytes: int
    layers: Mapping[str, int]


@dataclass(frozen=True)
class Take:
    """One clip of one form of the model.

    Attributes:
        name: of the form.
        wave: float32 [S], full scale is 1.
        sqnr_db: of its latents against the float model's, dB; None for the float model.
    """

    name: str
    wave: Tensor
    sqnr_db: float | None


@dataclass(frozen=True)
class Sample:
    """One prompt from one noise, in every form of the model.

    Attributes:
        prompt: what was asked for.
        seed: of the noise.
        takes: the float model's first, what the page is about last.
    """

    prompt: str
    seed: int
    takes: tuple[Take, ...]


@dataclass(frozen=True)
class Report:
    """Everything on the page.

    Attributes:
        title: of the page.
        settings: label and value, in the order of the page.
        sizes: the float16 form first.
        samples: clips to listen to.
        sampling_rate: of the clips, Hz.
        calibration: what was recorded of the activations.
        coverage: of the calibration prompts; None if their domain is not known.
        domain: that their coverage is of.
        sensitivity: of the layers; None if it was not measured.
        evaluations: of sets of clips; empty if none was made.
    """

    title: str
    settings: tuple[tuple[str, str], ...]
    sizes: tuple[SizeRow, ...]
    samples: tuple[Sample, ...]
    sampling_rate: int
    calibration: Calibration
    coverage: Coverage | None
    domain: str
    sensitivity: Sensitivity | None
    evaluations: tuple[Evaluation, ...]
