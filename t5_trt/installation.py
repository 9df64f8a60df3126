"""The packages that are needed to run models on a GPU, and the commands that install them: the one place that names the GPU extras.

The extras exist for CUDA 12 and CUDA 13, as TensorRT, cuda.bindings and NVRTC do; the CUDA version of the installed
PyTorch decides which of them fit. PyTorch is imported only when needed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

#: extra of pyproject.toml for what is missing, before the major version of CUDA
_EXTRAS = {"tensorrt": "cu", "rtx": "rtx-cu", "kernels": "kernels-cu"}
_CUDA_VERSIONS = (12, 13)


def cuda_version() -> int:
    """Major version of CUDA that packages must match: of the installed PyTorch, else of the one on the package index."""
    built_for = _torch_cuda()
    if built_for is None:
        return _CUDA_VERSIONS[-1]
    return max(_CUDA_VERSIONS[0], min(int(built_for.split(".")[0]), _CUDA_VERSIONS[-1]))


def install_command(part: str) -> str:
    """The command that installs a part; pip keeps what is already installed.

    Args:
        part: "tensorrt", "rtx" (TensorRT for RTX), or "kernels": what the library's own CUDA kernels are compiled with.
    """
    return f'pip install "t5-trt[{_EXTRAS[part]}{cuda_version()}]"'


def why_no_cuda() -> str:
    """Why PyTorch cannot use a GPU if ``torch.cuda.is_available()`` is False, and what to do."""
    import torch

    if not gpu_is_here():
        return (
            "there is no NVIDIA GPU, or its driver does not work with this PyTorch (torch.cuda.is_available() is False)"
        )
    if torch.version.cuda is None:
        return (
            f"there is an NVIDIA GPU, but PyTorch {torch.__version__} is built without CUDA. Install the build with CUDA with "
            f"`pip install --force-reinstall torch`, and TensorRT with `{install_command('tensorrt')}`"
        )
    return (
        f"there is an NVIDIA GPU, but PyTorch {torch.__version__}, which is built for CUDA {torch.version.cuda}, cannot use it: "
        f"{_words_of_cuda(torch)} Look at the driver with `nvidia-smi` and update it, or install a PyTorch for an older CUDA "
        "with `pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu126`. A container needs "
        "`docker run --gpus all`"
    )


@cache
def gpu_is_here() -> bool:
    """Whether the machine has an NVIDIA GPU, even if PyTorch cannot use it; False if CUDA_VISIBLE_DEVICES hides all of them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1", "NoDevFiles", "none"):
        return False
    if any(Path("/dev").glob("nvidia[0-9]*")) or any(Path("/proc/driver/nvidia/gpus").glob("*")):
        return True
    command = shutil.which("nvidia-smi")  # WSL has no such files
    if command is None:
        return False
    try:
        listed = subprocess.run([command, "-L"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return False
    return listed.returncode == 0 and "GPU" in listed.stdout


def _torch_cuda() -> str | None:
    try:
        import torch
    except ImportError:
        return None
    return torch.version.cuda


def _words_of_cuda(torch: Any) -> str:
    try:
        torch.cuda.init()
    except Exception as error:  # RuntimeError and AssertionError, with what the driver said
        return str(error).strip().splitlines()[0].rstrip(".") + "."
    return "torch.cuda.is_available() is False."
