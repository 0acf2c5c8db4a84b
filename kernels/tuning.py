"""Which tile a matrix product runs with: measured if there is a file for it, planned otherwise.

Owns the tile's type, the rules of what is legal, the plan for a shape that nobody measured, and the
files of measured tiles in ``configs/`` (written by ``tuner.py``). Nothing is read before the first
product of a shape.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from ptq4adm.errors import ConfigError

CONFIGS = Path(__file__).parent / "configs"
_log = logging.getLogger(__name__)
_FARTHEST = 4.0

BLOCK_K = 64  # k of a block of the canonical weight
GATHER, TMA = "gather", "tma"
# bytes of shared memory that one program may have, by compute capability; a multiprocessor has
# 1024 more, and each of its programs takes 1024 besides its own
_SHARED_BYTES = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448}
_SYSTEM_SHARED_BYTES = 1024
# int8 multiply-adds a clock and multiprocessor, from the vendors' peak rates and clocks
_PEAK_MACS = {80: 2048, 86: 1024, 89: 1024, 90: 4096}


@dataclass(frozen=True)
class TileConfig:
    """How a product is cut into programs.

    Attributes:
        block_m: rows (pixels) of a tile.
        block_n: output channels of a tile.
        block_k: k of one step, 64 or 128.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
        split_k: programs that share the k of one tile.
        form: ``gather`` computes addresses of pixels; ``tma`` (compute capability 9.0, some
            convolutions) lets the hardware cut boxes out of the image.
    """

    block_m: int
    block_n: int
    block_k: int = BLOCK_K
    num_warps: int = 4
    num_stages: int = 4
    split_k: int = 1
    form: str = GATHER


@dataclass(frozen=True)
class Problem:
    """What a tile is chosen by.

    Attributes:
        kernel: ``w4a8_gemm``, ``w8a8_gemm``, ``w4a8_conv2d`` or ``w8a8_conv2d``.
        M: rows of the product; pixels of a convolution's output.
        N: output channels, before gating.
        channels: input channels of each K segment, padded to whole blocks of 64.
        taps: pixels of the kernel.
        is_gated: whether gating follows.
        is_grouped: whether groups of 64 weights have multipliers.
        box: (H, W) of the image if the TMA form can be used, else None.
        capability: 10 * major + minor of the GPU; 0 for the interpreter.
        multiprocessors: of the GPU.
        device: the GPU's name in names of files.
    """

    kernel: str
    M: int
    N: int
    channels: tuple[int, ...]
    taps: int = 1
    is_gated: bool = False
    is_grouped: bool = False
    box: tuple[int, int] | None = None
    capability: int = 0
    multiprocessors: int = 4
    device: str = "interpreter"

    @property
    def bits(self) -> int:
        """Bits of a weight."""
        return 4 if self.kernel.startswith("w4") else 8

    @property
    def K(self) -> int:  # noqa: N802 - the literature's name
        """Length of the sums, padding included."""
        return self.taps * sum(self.channels)


def illegal_reason(config: TileConfig, problem: Problem) -> str | None:
    """Return why a tile cannot run a problem, or None if it can: the only such rules."""
    powers = (config.block_m, config.block_n, config.block_k, config.num_warps)
    if any(value < 1 or value & (value - 1) for value in powers):
        return f"{config}: sizes and warps must be powers of two"
    if config.block_k not in (BLOCK_K, 2 * BLOCK_K):
        return f"block_k = {config.block_k}: expected 64 or 128, one or two blocks of the weight"
    if config.block_m < 16 or config.block_n < 16:
        return f"tile {config.block_m} x {config.block_n}: the tensor core needs 16 x 16 at least"
    # a product masks the last step of its rows, a convolution does not mask that of a tap
    is_conv2d = problem.kernel.endswith("conv2d")
    if is_conv2d and any(c % config.block_k for c in problem.channels):
        return f"block_k = {config.block_k}: a tap of {problem.channels} channels ends within it"
    if config.split_k < 1 or 1 < config.split_k < len(problem.channels):
        return f"split_k = {config.split_k}: expected 1, or at least one a segment"
    steps = problem.taps * sum(-(-c // config.block_k) for c in problem.channels)
    if config.split_k > steps:
        return f"split_k = {config.split_k}: there are {steps} steps of {config.block_k} k"
    if config.num_stages < 1:
        return f"num_stages = {config.num_stages}: expected at least 1"
    limit = _SHARED_BYTES.get(problem.capability)
    needed = shared_bytes(config, problem.bits, problem.capability)
    if limit is not None and needed > limit:
        return f"{config}: {needed} bytes of shared memory, a program may have {limit}"
    return _illegal_form(config, problem)


def _illegal_form(config: TileConfig, problem: Problem) -> str | None:
    if config.form == GATHER:
        return None
    if config.form != TMA:
        return f"form {config.form!r}: expected 'gather' or 'tma'"
    if problem.capability not in (0, 90):
        return f"form 'tma': needs compute capability 9.0, got {problem.capability / 10}"
    if problem.box is None:
        return "form 'tma': needs stride 1, one image row of a power of two, and no upsampling"
    if problem.box[1] > config.block_m:
        return f"form 'tma': rows of {problem.box[1]} pixels do not fit block_m {config.block_m}"
    if len(problem.channels) > 1:
        return "form 'tma': takes one K segment"
    return None


def shared_bytes(config: TileConfig, bits: int, capability: int) -> int:
    """Return the bytes of shared memory of a tile's pipeline.

    Triton keeps a buffer less than there are stages, but one more of what the tensor core itself
    reads from shared memory: on compute capability 9.0 activations and 8-bit weights.

    Args:
        config: the tile.
        bits: 4 or 8, of a weight.
        capability: 10 * major + minor; the size of the epilogue's exchanges, which reuse the
            pipeline's memory, is not counted.
    """
    x_bytes = config.block_m * config.block_k
    w_bytes = config.block_n * config.block_k * bits // 8
    x_buffers = max(config.num_stages - (capability < 90), 1)
    w_buffers = max(config.num_stages - (capability < 90 or bits == 4), 1)
    return x_bytes * x_buffers + w_bytes * w_buffers


@cache
def find_config(problem: Problem) -> TileConfig:
    """Return the tile of a problem: of the nearest measured M, else the planned one."""
    measured = load_configs(config_file(problem))
    legal = {m: c for m, c in measured.items() if illegal_reason(c, problem) is None}
    nearest = nearest_m(legal, problem.M)
    if nearest is not None:
        return legal[nearest]
    if problem.capability and not measured:
        _tell_untuned(problem.device)
    return plan_config(problem)


def nearest_m(measured: Iterable[int], M: int) -> int | None:
    """Return the M next to one among those that were measured; None if there is none near.

    An M that is more than ``_FARTHEST`` times another says little about it and is left out.
    """
    near = [m for m in measured if _ratio(m, M) <= _FARTHEST]
    return min(near, key=lambda m: _ratio(m, M), default=None)


def _ratio(m: int, other: int) -> float:
    """How many times the larger is the smaller: 128 is as far from 64 as from 256."""
    return max(m, other) / max(min(m, other), 1)


@cache
def _tell_untuned(device: str) -> None:
    _log.warning(
        "no measured tiles for %s in %s: planned ones are used; `ptq4adm tune` measures them",
        device,
        CONFIGS.name,
    )


def config_file(problem: Problem) -> Path:
    """Return the file of a problem's measured tiles, which may not exist."""
    return CONFIGS / f"{class_name(problem)}-{problem.device}.json"


def class_name(problem: Problem) -> str:
    """Return the name of the problems that differ in M and GPU only."""
    variant = "-geglu" if problem.is_gated else ""
    variant += "-grouped" if problem.is_grouped else ""
    return f"{problem.kernel}{variant}-n{problem.N}-k{problem.K}"


@cache
def load_configs(path: Path) -> dict[int, TileConfig]:
    """Read measured tiles by M; none if there is no file.

    Raises:
        ConfigError: if the file does not hold tiles.
    """
    if not path.exists():
        return {}
    try:
        return {int(m): _read_tile(fields) for m, fields in json.loads(path.read_text()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path}: expected an object of tiles by M ({error}); delete it or run `ptq4adm tune`"
        ) from error


def _read_tile(fields: dict[str, object]) -> TileConfig:
    """Build a tile of fields whose types are a tile's."""
    for name, value in fields.items():
        expected = str if name == "form" else int
        if type(value) is not expected:
            raise TypeError(f"{name} = {value!r}: expected {expected.__name__}")
    return TileConfig(**fields)  # type: ignore[arg-type]


def save_configs(path: Path, configs: dict[int, TileConfig]) -> None:
    """Write measured tiles by M, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({str(m): asdict(configs[m]) for m in sorted(configs)}, indent=1)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text + "\n")
    temporary.replace(path)
    load_configs.cache_clear()
    find_config.cache_clear()


# --- the plan for a shape that nobody measured -------------------------------------------------

# (channels, rows, warps) of a tile, and how many programs of it the registers of a multiprocessor
# hold: a thread of 8 warps may use 128, one of 4 warps 256 or 128
_SHAPES = {
    (128, 128, 8): 2,
    (128, 64, 4): 2,
    (64, 128, 4): 2,
    (64, 64, 4): 4,
    (64, 32, 4): 4,
    (64, 16, 4): 4,
}
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
_WARP_COPY_BYTES = 512  # of activations a step at least, so that a thread copies 16 at once
_L2_BYTES = 32  # a clock and multiprocessor
_STEP_CLOCKS = 80  # barriers and address arithmetic of a step that nothing hides
_START_CLOCKS = 1500  # first loads and the epilogue of a program


@cache
def plan_config(problem: Problem) -> TileConfig:
    """Return the legal tile with the least estimated time.

    The estimate counts waves of programs over the multiprocessors; a step takes as long as its
    multiply-adds or its bytes from L2, whichever is more. It ranks tiles, it predicts no times.
    """
    if problem.capability == 0:
        # few programs: the interpreter pays for each
        return TileConfig(64, 64, BLOCK_K, 4, 1)
    legal = [c for c in _candidates(problem) if illegal_reason(c, problem) is None]
    assert legal, f"no legal tile for {problem}"
    return min(legal, key=lambda config: _estimated_clocks(config, problem))


def planned_programs(config: TileConfig, problem: Problem) -> int:
    """Return how many programs of a planned tile a multiprocessor is meant to hold."""
    own = shared_bytes(config, problem.bits, problem.capability) + _SYSTEM_SHARED_BYTES
    capacity = _SHARED_BYTES.get(problem.capability, own) + _SYSTEM_SHARED_BYTES
    most = _SHAPES.get((config.block_n, config.block_m, config.num_warps), 1)
    if problem.is_grouped and problem.capability < 90:
        most = min(most, 3)  # multipliers beside decoded weights: up to 160 registers
    return max(min(most, capacity // own), 1)


def _candidates(problem: Problem) -> list[TileConfig]:
    """Tiles worth a try."""
    box_width = 0 if problem.box is None or problem.capability != 90 else problem.box[1]
    found = []
    for n, m, warps in _SHAPES:
        form = TMA if 0 < box_width <= m else GATHER
        block_k = _block_k(n * m, form, problem)
        if m * block_k < _WARP_COPY_BYTES * warps:
            continue
        if problem.is_grouped and n >= 32 * warps:
            continue  # a thread would load multipliers for others, through shared memory
        stages = 4 if block_k == BLOCK_K else 3
        found += [
            TileConfig(m, n, block_k, warps, stages, split, form)
            for split in _SPLITS
            if n * m <= _largest_tile(problem, split)
        ]
    return found


def _largest_tile(problem: Problem, split_k: int) -> int:
    """Elements of a tile that 128 registers a thread are enough for, with 8 warps.

    Gating, a second segment's accumulators and partial sums that are added up need the registers of
    half a tile; so do, where mma.sync takes the decoded weights, multipliers of groups and
    addresses of pixels.
    """
    is_heavy = problem.is_gated or len(problem.channels) > 1 or split_k > 1
    if problem.capability < 90 and problem.bits == 4:
        is_heavy |= problem.is_grouped or problem.taps > 1
    return 128 * 128 // (2 if is_heavy else 1)


def _block_k(tile: int, form: str, problem: Problem) -> int:
    """K of a step: two blocks of the weight save barriers, where they fit registers."""
    is_even = all(c % (2 * BLOCK_K) == 0 for c in problem.channels)
    # fragments of 128 k for mma.sync, and addresses of pixels, take 10 to 60 registers more;
    # multipliers of two groups a step would be exchanged through shared memory
    has_registers = problem.capability >= 90 and (problem.taps == 1 or form == TMA)
    fits = not problem.is_grouped and (has_registers or tile <= 64 * 32)
    return 2 * BLOCK_K if is_even and fits else BLOCK_K


def _estimated_clocks(config: TileConfig, problem: Problem) -> float:
    tiles = -(-problem.M // config.block_m) * -(-problem.N // config.block_n)
    programs = tiles * config.split_k
    steps = -(-problem.K // config.block_k // config.split_k)
    macs = config.block_m * config.block_n * config.block_k
    loaded = config.block_k * (config.block_m + config.block_n * problem.bits / 8)
    step = max(macs / _PEAK_MACS.get(problem.capability, 1024), loaded / _L2_BYTES)
    at_once = min(planned_programs(config, problem), -(-programs // problem.multiprocessors))
    waves = -(-programs // (problem.multiprocessors * at_once))
    # programs beside each other hide each other's barriers
    program = steps * max(step * at_once, step + _STEP_CLOCKS) + _START_CLOCKS
    if config.split_k > 1:
        # every program writes its partial sums through L2, and the last one reads all of them
        slab = 4 * config.block_m * config.block_n
        program += slab * (at_once + config.split_k) / _L2_BYTES + _START_CLOCKS
    return waves * program
