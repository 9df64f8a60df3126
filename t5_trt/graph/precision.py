"""The ONNX types of each precision, and values that depend on them."""

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
    "int8": ir.DataType.FLOAT16,  # int8 is for matrices only; this is the type of everything else
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
    """The value added to (or put in place of) a hidden attention score.

    It must absorb any score, so that a row whose keys are all hidden gives equal weights, as with the type's lowest
    number in Transformers; and it must survive a softmax that multiplies by log2(e) first, which the lowest number does
    not: a row of -inf becomes NaN. float16 cannot satisfy both exactly and uses a margin instead.
    """
    return -30000.0 if dtype == ir.DataType.FLOAT16 else -1e30


def empty_slot_value(dtype: ir.DataType) -> float:
    """The value that hides places without a key, beside hidden keys.

    It is so far below `mask_value` that a query whose keys are all hidden gives equal weights to those, and none to these.
    """
    return 2 * mask_value(dtype)
