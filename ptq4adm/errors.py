"""Every error the package raises on purpose.

Each class derives from ``Ptq4admError`` and from the builtin a caller would expect, so both
``except Ptq4admError`` and ``except ValueError`` work. A message says what was given, what was
needed and what to do, in that order.
"""

from __future__ import annotations


class Ptq4admError(Exception):
    """Base of every error of this package."""


# --- tensors and arguments --------------------------------------------------------------------


class ShapeError(Ptq4admError, ValueError):
    """A tensor has the wrong number of dimensions or the wrong size."""


class DtypeError(Ptq4admError, TypeError):
    """A tensor has the wrong element type."""


class RangeError(Ptq4admError, ValueError):
    """A value lies outside what the packed format can hold."""


class NonFiniteError(Ptq4admError, ValueError):
    """A weight or an activation holds NaN or infinity."""


class ConfigError(Ptq4admError, ValueError):
    """A configuration value is unknown, or two of them contradict each other."""


class PatternError(Ptq4admError, ValueError):
    """A layer pattern of an override matches no layer of the model."""


class UnsupportedLayerError(Ptq4admError, ValueError):
    """A layer has no quantized form (for one: a grouped convolution)."""


class UnsupportedModelError(Ptq4admError, TypeError):
    """A pipeline or module belongs to no model family the package knows."""


# --- backends -----------------------------------------------------------------------------------


class UnknownBackendError(Ptq4admError, ValueError):
    """The backend's name is not one this package knows."""


class BackendUnavailableError(Ptq4admError, RuntimeError):
    """The named backend exists but cannot run here, or lacks this operation."""


class DispatchTableError(Ptq4admError, ValueError):
    """A table of measured times cannot be read, or is another device's."""


class DependencyError(Ptq4admError, ImportError):
    """An optional package that this needs is not installed."""


class ProcessError(Ptq4admError, RuntimeError):
    """Another process of a group failed, and its part is missing."""


# --- calibration --------------------------------------------------------------------------------


class CalibrationError(Ptq4admError, ValueError):
    """Calibration records are missing, empty or unreadable."""


class CalibrationMismatchError(Ptq4admError, ValueError):
    """The calibration, or its set, was recorded on another model or with another scheduler."""


class UncalibratedStepError(Ptq4admError, ValueError):
    """A denoising step lies outside what was calibrated."""


class MixedTimestepError(Ptq4admError, ValueError):
    """One batch mixes timesteps, while activation scales hold one step for the whole batch."""


class PromptError(Ptq4admError, ValueError):
    """A prompt or a list of prompts is empty or of the wrong type."""


# --- files --------------------------------------------------------------------------------------


class MissingComponentError(Ptq4admError, ValueError):
    """A pipeline folder lacks one of its components."""


class CheckpointError(Ptq4admError, ValueError):
    """A quantized checkpoint cannot be read."""


class TruncatedCheckpointError(CheckpointError):
    """A checkpoint file ends before its header says it should."""


class CheckpointVersionError(CheckpointError):
    """A checkpoint was written in a format version this package does not know."""


class CheckpointShapeError(CheckpointError):
    """A checkpoint's tensors do not have the shapes its configuration asks for."""


class UnsafeCheckpointError(CheckpointError):
    """A pickled checkpoint asks for code to be run; none of it was."""


class OutputError(Ptq4admError, RuntimeError):
    """An output file or folder cannot be written."""


# --- evaluation ---------------------------------------------------------------------------------


class AudioFileError(Ptq4admError, ValueError):
    """An audio file cannot be read, or holds no sample."""


class EvaluationError(Ptq4admError, ValueError):
    """A file of an evaluation, its result or its cache, cannot be read."""


# --- benchmarks ---------------------------------------------------------------------------------


class BenchmarkError(Ptq4admError, RuntimeError):
    """A variant computes the wrong result, or a benchmark's process failed: nothing is timed."""
