"""What this processor can do at most, and which vector instructions run: for benchmarks.

The compiled module measures both; `csrc/cpu/roofline.h` and `sampler.h` say how.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ptq4adm.errors import BackendUnavailableError, ConfigError
from ptq4adm.ops import compiled
from ptq4adm.ops.compiled import unavailable_reason

# below these shares of the vector samples, an instruction is a helper's, not the kernel's
_WIDE_SHARE = 0.2
_DOT_SHARE = 0.02
# of all samples: waiting threads and the interpreter run scalar code beside every kernel
_VECTOR_SHARE = 0.05
_FEWEST_SAMPLES = 10


@dataclass(frozen=True)
class InstructionCounts:
    """Samples by the instruction that was running.

    Attributes:
        total: all samples.
        sse: legacy vector instructions of 128 bits.
        bits128: VEX or EVEX vector instructions of 128 bits (scalar ones as well).
        bits256: of 256 bits.
        bits512: of 512 bits.
        evex: AVX-512 encodings of any length.
        dpbusd: vpdpbusd and vpdpbusds.
    """

    total: int
    sse: int
    bits128: int
    bits256: int
    bits512: int
    evex: int
    dpbusd: int

    def isa(self) -> str:
        """Name of the instruction set.

        ``avx512_vnni``, ``avx512``, ``avx_vnni``, ``avx2``, ``sse`` or ``scalar``; ``-256`` follows
        where AVX-512 instructions work on 256 bits, and ``?`` means too few samples to tell.
        """
        vector = self.bits128 + self.bits256 + self.bits512
        if self.total < _FEWEST_SAMPLES:
            return "?"
        if vector + self.sse < _VECTOR_SHARE * self.total:
            return "scalar"
        if self.sse > vector:
            return "sse"
        has_dot = self.dpbusd > _DOT_SHARE * vector
        if self.bits512 > _WIDE_SHARE * vector:
            return "avx512_vnni" if has_dot else "avx512"
        if self.evex > _WIDE_SHARE * vector:
            return "avx512_vnni-256" if has_dot else "avx512-256"
        if has_dot:
            return "avx_vnni"
        return "avx2" if self.bits256 > _WIDE_SHARE * vector else "scalar"


def peak_kinds() -> dict[str, str]:
    """Every ceiling that can be measured, with why it cannot be here, or an empty string."""
    _check_module()
    return {kind: compiled.module.peak_missing(kind) for kind in compiled.module.peak_kinds()}


def measure_peak(kind: str, *, milliseconds: float = 100.0, threads: int = 1) -> float:
    """Measure one ceiling of this machine.

    Args:
        kind: ``fma_avx2``, ``fma_avx512`` (float32), ``maddubs_avx2``, ``maddubs_avx512``,
            ``dpbusd_256``, ``dpbusd_512`` (int8), or ``copy`` (memory).
        milliseconds: how long.
        threads: how many work at once.

    Returns:
        10^9 operations a second (a multiply and an add are two), or 10^9 bytes a second read and
        written.

    Raises:
        BackendUnavailableError: if the module is not built or the processor lacks the instructions.
        ConfigError: if the kind is unknown, or a number is not positive.
    """
    missing = peak_kinds()
    if kind not in missing:
        raise ConfigError(f"peak {kind!r} is unknown: expected one of {', '.join(missing)}")
    if missing[kind]:
        raise BackendUnavailableError(f"peak {kind!r} cannot be measured here: it {missing[kind]}")
    if threads < 1 or milliseconds <= 0:
        raise ConfigError(
            f"threads = {threads}, milliseconds = {milliseconds}: both must be positive"
        )
    return compiled.module.measure_peak(kind, milliseconds, threads)


def sampler_missing() -> str:
    """Why instructions cannot be sampled here, or an empty string."""
    return unavailable_reason() or compiled.module.sampler_missing()


def sample_instructions(work: Callable[[], object]) -> InstructionCounts:
    """Run something and look, a thousand times a second of CPU time, which instruction runs.

    Args:
        work: what to run; some tenths of a second give enough samples.

    Raises:
        BackendUnavailableError: if the module is not built or the system is another.
    """
    missing = sampler_missing()
    if missing:
        raise BackendUnavailableError(f"instructions cannot be sampled here: {missing}")
    compiled.module.sampler_start()
    try:
        work()
    finally:
        counts = compiled.module.sampler_stop()
    return InstructionCounts(**counts)


def _check_module() -> None:
    reason = unavailable_reason()
    if reason is not None:
        raise BackendUnavailableError(reason)
