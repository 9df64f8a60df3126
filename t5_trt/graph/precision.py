"""Which ONNX types a precision stands for, and the values that depend on them. No weights are changed here."""

from __future__ import annotations

import onnx_ir as ir
import torch

from t5_trt.errors import InputError

#: precision -> the type of weights, activations and K/V ("tf32" differs from "fp32" in a builder flag only)
REAL_TYPES = {
    "fp32": ir.DataType.FLOAT,
    "tf32": ir.DataType.FLOAT,
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
}
TORCH_TYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.INT64: torch.int64,
    ir.DataType.INT32: torch.int32,
}


def real_type(precision: str) -> ir.DataType:
    """The ONNX type of a resolved precision.

    Raises:
        InputError: `precision` is none of `REAL_TYPES`.
    """
    try:
        return REAL_TYPES[precision]
    except KeyError:
        expected = ", ".join(map(repr, REAL_TYPES))
        raise InputError(f"precision got {precision!r}; expected one of {expected}.") from None


def mask_value(dtype: ir.DataType) -> float:
    """What is added to (or put in place of) a hidden attention score.

    The type's lowest number is what Transformers uses: it absorbs any score, so a row whose keys are all hidden gives equal
    weights in both. Half precision keeps a margin because lowest + score would round to -inf, and a row of -inf
    makes softmax return NaN.
    """
    return -30000.0 if dtype == ir.DataType.FLOAT16 else float(torch.finfo(TORCH_TYPES[dtype]).min)
