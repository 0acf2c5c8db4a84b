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
    *,
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
    out_scale: int,
    out: int,
    out2: int,
    out_dtype: str,
    isa: str,
    threads: int,
) -> bool: ...
def quantize_int8(
    *,
    x: int,
    rows: int,
    columns: int,
    scale: int,
    is_static: bool,
    x_q: int,
    isa: str,
    threads: int,
) -> bool: ...
def best_isa() -> str: ...
def check_isa(isa: str) -> None: ...
def threading() -> str: ...
