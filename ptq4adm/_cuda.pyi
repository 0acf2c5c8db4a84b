"""Types of the compiled module; csrc/bindings/cuda_*.cpp are its source.

Addresses are integers, 0 for none. A pair is (rows, columns), or a value a segment of K.
"""

from collections.abc import Sequence

class Scale:
    def __init__(self, values: int = 0, form: str = "none", table_size: int = 0) -> None: ...

class Term:
    def __init__(self, values: int = 0, dtype: str = "float32") -> None: ...

class Window:
    def __init__(
        self,
        *,
        size: tuple[int, int],
        enlarged: tuple[int, int],
        out_size: tuple[int, int],
        kernel_width: int,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
    ) -> None: ...

class Params:
    x: Sequence[int]
    qweight: int
    w_mult: int
    M: int
    N: int
    channels: Sequence[int]
    blocks: Sequence[int]
    is_x_aligned: bool
    window: Window
    splits: int
    first_splits: int
    slabs: int
    counters: int
    x_scale: Sequence[Scale]
    w_scale: int
    step: int
    bias: Term
    temb: Term
    residual: Term
    rows_per_sample: int
    is_gated: bool
    out_scale: Scale
    out: Sequence[int]
    out_dtype: str
    is_wide: bool

class TileInfo:
    @property
    def block_m(self) -> int: ...
    @property
    def block_n(self) -> int: ...
    @property
    def warps(self) -> int: ...
    @property
    def stages(self) -> int: ...
    @property
    def shared_bytes(self) -> list[int]: ...

def matmul_tiles() -> list[TileInfo]: ...
def matmul(
    params: Params,
    bits: int,
    is_convolution: bool,
    block_m: int,
    block_n: int,
    device: int,
    stream: int,
) -> None: ...

class CudaError(RuntimeError): ...

class DeviceInfo:
    @property
    def name(self) -> str: ...
    @property
    def major(self) -> int: ...
    @property
    def minor(self) -> int: ...
    @property
    def multiprocessors(self) -> int: ...
    @property
    def shared_bytes_per_block(self) -> int: ...
    @property
    def shared_bytes_per_multiprocessor(self) -> int: ...
    @property
    def l2_bytes(self) -> int: ...
    @property
    def memory_bytes(self) -> int: ...

def archs() -> str: ...
def device_count() -> int: ...
def device_info(device: int) -> DeviceInfo: ...
def driver_version() -> int: ...
def runtime_version() -> int: ...
def has_code_for(device: int) -> bool: ...
def error_text(code: int) -> str: ...
def is_sticky(code: int) -> bool: ...
def probe(device: int, out: int, count: int, stream: int) -> None: ...
def probe_value(index: int) -> int: ...
