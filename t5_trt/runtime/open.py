"""Choosing a backend and opening its session: the one place that decides what "auto" means."""

from __future__ import annotations

from t5_trt.architecture import Architecture
from t5_trt.config import RuntimeConfig, check_choice
from t5_trt.errors import BackendError, InputError
from t5_trt.graph.ops import Weights
from t5_trt.runtime.ort_session import OrtSession, import_onnxruntime
from t5_trt.runtime.session import Session


def resolve_backend(config: RuntimeConfig) -> str:
    """The backend that `config` stands for on this machine: "onnxruntime".

    Raises:
        BackendError: the backend that was asked for cannot run here.
        InputError: the device or precision does not go with it.
    """
    check_choice("backend", config.backend, ("auto", "tensorrt", "onnxruntime"))
    if config.backend == "tensorrt":
        raise BackendError(
            "backend='tensorrt' needs TensorRT and an NVIDIA GPU, and this release runs its graphs with ONNX Runtime "
            "only. Use backend='auto' or 'onnxruntime'."
        )
    import_onnxruntime()
    if config.device is not None and not config.device.startswith("cpu"):
        raise InputError(
            f"device got {config.device!r}; the backend 'onnxruntime' runs on the CPU. Leave device out or use 'cpu'."
        )
    if config.precision not in ("auto", "fp32"):
        raise InputError(
            f"precision got {config.precision!r}; the backend 'onnxruntime' computes in 'fp32' on the CPU. Use 'fp32' or "
            "'auto'."
        )
    return "onnxruntime"


def open_session(arch: Architecture, weights: Weights, config: RuntimeConfig) -> Session:
    """Open the session of a model on this machine.

    Args:
        arch: of the model.
        weights: state-dict key -> CPU tensor; kept by the session.
        config: what the user asked for.

    Raises:
        BackendError, InputError: see `resolve_backend`.
    """
    resolve_backend(config)
    return OrtSession(arch, weights, num_threads=config.num_threads, prepack_weights=config.prepack_weights)
