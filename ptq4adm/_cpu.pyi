"""Types of the compiled module; csrc/bindings/cpu_module.cpp is its source."""

class Conv2dShape:
    def __init__(
        self,
        *,
        size: tuple[int, int, int],
        channels: tuple[int, int],
        out_channels: int,
        kernel_size: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        upsample: tuple[int, int],
        out_size: tuple[int, int],
    ) -> None: ...

def matmul(
    shape: Conv2dShape,
    bits: int,
    x_q: int,
    x2_q: int,
    qweight: int,
    w_mult: int,
    w_scale: int,
    x_scale: int,
    is_x_scale_per_row: bool,
    x2_scale: int,
    is_x2_scale_per_row: bool,
    bias: int,
    temb: int,
    temb_rows: int,
    residual: int,
    is_geglu: bool,
    out_scale: int,
    out: int,
    out2: int,
    out_dtype: str,
    isa: str,
    threads: int,
    /,
) -> bool: ...

# Quantization of activations (csrc/bindings/activation.cpp): 0, NON_FINITE, or another status for
# a step outside the table. table_size is 0 and table null for a measured scale.
NON_FINITE: int

def quantize_int8(
    x: int,
    rows: int,
    columns: int,
    row_stride: int,
    is_per_row: bool,
    table: int,
    table_size: int,
    step: int,
    scale: int,
    x_q: int,
    isa: str,
    threads: int,
    /,
) -> int: ...
def groupnorm_silu_quantize(
    x: int,
    batch: int,
    pixels: int,
    channels: int,
    batch_stride: int,
    pixel_stride: int,
    groups: int,
    weight: int,
    bias: int,
    eps: float,
    is_silu: bool,
    table: int,
    table_size: int,
    step: int,
    scale: int,
    x_q: int,
    isa: str,
    threads: int,
    /,
) -> int: ...
def layernorm_quantize(
    x: int,
    rows: int,
    columns: int,
    row_stride: int,
    weight: int,
    bias: int,
    eps: float,
    table: int,
    table_size: int,
    step: int,
    scale: int,
    x_q: int,
    isa: str,
    threads: int,
    /,
) -> int: ...
def geglu_quantize(
    x: int,
    rows: int,
    columns: int,
    row_stride: int,
    table: int,
    table_size: int,
    step: int,
    scale: int,
    x_q: int,
    isa: str,
    threads: int,
    /,
) -> int: ...
def activate(function: str, x: int, count: int, y: int, isa: str, /) -> None: ...
def activation_isa(isa: str, /) -> str: ...
def best_isa() -> str: ...
def check_isa(isa: str) -> None: ...
def is_compiled(isa: str) -> bool: ...
def set_auto_isa(isa: str) -> None: ...
def threading() -> str: ...
def attention(
    *,
    q: int,
    k: int,
    v: int,
    bias: int,
    out: int,
    q_strides: tuple[int, int, int],
    k_strides: tuple[int, int, int],
    v_strides: tuple[int, int, int],
    out_strides: tuple[int, int, int],
    sizes: tuple[int, int, int, int, int],
    scale: float,
    isa: str,
    threads: int,
) -> None: ...
def peak_kinds() -> list[str]: ...
def peak_missing(kind: str) -> str: ...
def measure_peak(kind: str, milliseconds: float, threads: int) -> float: ...
def sampler_missing() -> str: ...
def sampler_start() -> None: ...
def sampler_stop() -> dict[str, int]: ...
