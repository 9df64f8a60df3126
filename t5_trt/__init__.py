"""T5 on TensorRT and ONNX Runtime behind Hugging Face's own class."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from t5_trt.config import BuildConfig, RuntimeConfig
    from t5_trt.errors import (
        BackendError,
        CheckpointError,
        InputError,
        StrictModeError,
        T5TRTError,
        UnsupportedModelError,
    )
    from t5_trt.generation.many import generate_many
    from t5_trt.modeling import TRTT5EncoderModel, TRTT5ForConditionalGeneration
    from t5_trt.prebuild import build_engines
    from t5_trt.tools.verify import compare

__version__ = "0.2.0"

__all__ = [
    "BackendError",
    "BuildConfig",
    "CheckpointError",
    "InputError",
    "RuntimeConfig",
    "StrictModeError",
    "T5TRTError",
    "TRTT5EncoderModel",
    "TRTT5ForConditionalGeneration",
    "UnsupportedModelError",
    "__version__",
    "build_engines",
    "compare",
    "generate_many",
]

# Names are imported when they are first used: torch and Transformers take seconds, which the command line's --help and
# every build process would otherwise pay.
_HOMES = {
    "t5_trt.config": ("BuildConfig", "RuntimeConfig"),
    "t5_trt.errors": (
        "BackendError",
        "CheckpointError",
        "InputError",
        "StrictModeError",
        "T5TRTError",
        "UnsupportedModelError",
    ),
    "t5_trt.generation.many": ("generate_many",),
    "t5_trt.modeling": ("TRTT5EncoderModel", "TRTT5ForConditionalGeneration"),
    "t5_trt.prebuild": ("build_engines",),
    "t5_trt.tools.verify": ("compare",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
