"""What an augmentation gives: the prompts, how they were found, and the file that keeps both."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ptq4adm.errors import ConfigError, OutputError, PromptError
from ptq4adm.prompts.coverage import Coverage

FORMAT = "ptq4adm-prompts"
FORMAT_VERSION = 1
_MOST_POWER = 6


@dataclass(frozen=True)
class AugmentSettings:
    """How candidates are made and chosen.

    Args:
        seed: of the candidates.
        pool: how many candidates.
        grid_weight: of the grid against the space, 0 to 1; without an encoder the grid is all.
        power: of distances; 1 lowers their mean, more looks more at the far ones.
        target: stop when this share of cells and pairs is covered; None for the whole budget.
        eps: a gain not above it is small; a gain is the share of all that the seeds left missing.
        patience: stop after so many small gains.

    Raises:
        ConfigError: if a value is out of range.
    """

    seed: int = 0
    pool: int = 1024
    grid_weight: float = 0.5
    power: int = 2
    target: float | None = None
    eps: float = 0.0
    patience: int = 3

    def __post_init__(self) -> None:
        _check_whole("seed", self.seed, 0, 2**63 - 1)
        _check_whole("pool", self.pool, 1, 16384)
        _check_whole("power", self.power, 1, _MOST_POWER)
        _check_whole("patience", self.patience, 1, 2**31)
        _check_share("grid_weight", self.grid_weight)
        _check_share("eps", self.eps)
        if self.target is not None:
            _check_share("target", self.target)


@dataclass(frozen=True)
class CurvePoint:
    """The set after one more prompt.

    Attributes:
        gain: of that prompt, as a share of what the seeds left missing; 0 for the seeds.
        coverage: of the set.
    """

    gain: float
    coverage: Coverage


@dataclass(frozen=True)
class Augmentation:
    """Prompts that cover more than the seeds they begin with.

    Attributes:
        prompts: the seeds, then what was added, in the order of choice.
        seeds: how many of them are seeds.
        curve: coverage of the seeds alone, and after each added prompt.
        settings: how they were chosen.
        domain: name of the domain.
        encoder: name of the encoder; None if only the grid was measured.
        generator: name of what wrote the candidates.
        candidates: how many there were.
        stop: why no more was added.
        warnings: what was left out or looks wrong.
    """

    prompts: tuple[str, ...]
    seeds: int
    curve: tuple[CurvePoint, ...]
    settings: AugmentSettings
    domain: str
    encoder: str | None
    generator: str
    candidates: int
    stop: str
    warnings: tuple[str, ...] = ()

    @property
    def before(self) -> Coverage:
        """Coverage of the seeds alone."""
        return self.curve[0].coverage

    @property
    def after(self) -> Coverage:
        """Coverage of all prompts."""
        return self.curve[-1].coverage

    @property
    def added(self) -> tuple[str, ...]:
        """The prompts that are not seeds."""
        return self.prompts[self.seeds :]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON holds it."""
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}

    def save(self, path: str | Path) -> None:
        """Write a JSON file.

        Raises:
            OutputError: if it cannot be written.
        """
        write_text(Path(path), json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")

    def save_prompts(self, path: str | Path) -> None:
        """Write the prompts alone, one a line: what `--prompts` reads.

        Raises:
            OutputError: if it cannot be written.
        """
        write_text(Path(path), "".join(f"{prompt}\n" for prompt in self.prompts))

    @classmethod
    def load(cls, path: str | Path) -> Augmentation:
        """Read what `save` wrote.

        Raises:
            PromptError: if the file is no augmentation, or of a version this package does not know.
        """
        try:
            entries = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PromptError(f"{path}: cannot be read as an augmentation ({error})") from error
        if not isinstance(entries, dict) or entries.pop("format", None) != FORMAT:
            raise PromptError(f"{path}: is no augmentation; make one with `ptq4adm prompts`")
        version = entries.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise PromptError(
                f"{path}: format version {version!r}, this package knows {FORMAT_VERSION}; upgrade "
                "ptq4adm, or make it again"
            )
        try:
            return _from_entries(entries)
        except (KeyError, TypeError) as error:
            raise PromptError(f"{path}: has missing or unknown entries ({error})") from error


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file.

    Raises:
        OutputError: if it cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error}); choose a writable folder"
        ) from error


def _from_entries(entries: dict[str, Any]) -> Augmentation:
    curve = tuple(
        CurvePoint(point["gain"], Coverage(**point["coverage"])) for point in entries.pop("curve")
    )
    return Augmentation(
        curve=curve,
        settings=AugmentSettings(**entries.pop("settings")),
        prompts=tuple(entries.pop("prompts")),
        warnings=tuple(entries.pop("warnings")),
        **entries,
    )


def _check_whole(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(f"{name}: got {value!r}, needs a whole number of {low} to {high}")


def _check_share(name: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
        raise ConfigError(f"{name}: got {value!r}, needs a number of 0 to 1")
