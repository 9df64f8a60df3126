"""Versions and hardware for records of measurements."""

from __future__ import annotations

import platform
import subprocess
from typing import Any

import torch
import transformers

from t5_trt.errors import BackendError
from t5_trt.kernels.cpu_compile import find_compiler


def environment(tensorrt: str | None = None) -> dict[str, Any]:
    """Versions and hardware of this run, for a record; None for missing parts.

    Args:
        tensorrt: version of TensorRT, if it is used.
    """
    import onnxruntime

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "onnxruntime": onnxruntime.__version__,
        "c_compiler": _compiler(),
        "tensorrt": tensorrt,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "gpu_and_driver": _gpu_and_driver(),
        "machine": platform.machine(),
        "processor": _processor(),
    }


def _compiler() -> str | None:
    try:
        return find_compiler().version
    except BackendError:
        return None


def _gpu_and_driver() -> str | None:
    if not torch.cuda.is_available():
        return None
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return torch.cuda.get_device_name()


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
