"""T5 on TensorRT and ONNX Runtime behind Hugging Face's own class."""

from t5_trt.config import RuntimeConfig
from t5_trt.errors import (
    BackendError,
    CheckpointError,
    InputError,
    StrictModeError,
    T5TRTError,
    UnsupportedModelError,
)
from t5_trt.modeling import TRTT5ForConditionalGeneration

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "CheckpointError",
    "InputError",
    "RuntimeConfig",
    "StrictModeError",
    "T5TRTError",
    "TRTT5ForConditionalGeneration",
    "UnsupportedModelError",
    "__version__",
]
