"""Chooses the backend and what runs its decoder step: the one place that resolves "auto"."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from t5_trt.config import RuntimeConfig
from t5_trt.engine.tensorrt_api import load_tensorrt
from t5_trt.errors import BackendError, InputError, T5TRTError, UnsupportedModelError
from t5_trt.graph.precision import TORCH_TYPES, real_type
from t5_trt.installation import gpu_is_here, install_command, why_no_cuda
from t5_trt.kernels.compile import LEAST_CAPABILITY, missing_bindings
from t5_trt.kernels.cpu_compile import why_not_compiled
from t5_trt.kernels.decode_step import refusal
from t5_trt.runtime.onnxruntime_session import import_onnxruntime

logger = logging.getLogger("t5_trt")

#: precisions of the library's own CUDA kernels; in "int8" the encoder's compute in half precision
KERNEL_PRECISIONS = ("fp32", "fp16", "bf16", "int8")
#: what runs the decoder step on a CPU -> its precisions; "auto" takes the first that can run. Encoders are ONNX Runtime's
CPU_PRECISIONS = {"kernels": ("fp32", "bf16", "int8"), "engine": ("fp32", "int8", "int4")}
_ON_CPU = {"kernels": "the library's own C code", "engine": "ONNX Runtime"}


@dataclass(frozen=True)
class Placement:
    """A `RuntimeConfig` resolved for this machine.

    Attributes:
        backend: "tensorrt", "cuda" or "onnxruntime".
        precision: "fp32", "tf32", "fp16", "bf16", "int8" or "int4".
        device: where engines run.
        dtype: of hidden states and K/V.
        flavor: of TensorRT, or None.
        reason: why "auto" chose the backend.
        idle_gpu: a message if a GPU is not used although the user did not ask for the CPU; else None.
        decode: what runs the decoder: "kernels" (the library's CUDA kernels, or its C code on a CPU) or "engine" (the backend's).
        no_kernels: why ``decode="auto"`` chose the engine of TensorRT or ONNX Runtime; else None.
        no_tensorrt: why ``backend="auto"`` chose "cuda"; else None.
    """

    backend: str
    precision: str
    device: torch.device
    dtype: torch.dtype
    flavor: str | None
    reason: str
    idle_gpu: str | None = None
    decode: str = "engine"
    no_kernels: str | None = None
    no_tensorrt: str | None = None


def why_not_tensorrt(device: str | None = None, flavor: str | None = None) -> str | None:
    """Why TensorRT cannot run here, or None if it can."""
    no_gpu = None
    if not torch.cuda.is_available():
        no_gpu = why_no_cuda()
        if flavor is None:  # checked before TensorRT is imported, which takes 100 MB
            return no_gpu
    try:
        api = load_tensorrt(flavor)
    except BackendError as error:
        return str(error).rstrip(".")
    if no_gpu:
        return no_gpu
    if device is not None and not device.startswith("cuda"):
        return f"device is {device!r}; TensorRT runs on CUDA devices"
    major, minor = torch.cuda.get_device_capability(device or "cuda")
    if api.flavor == "rtx" and major not in (7, 8, 12):
        return (
            f"TensorRT for RTX runs on compute capability 7.5, 8.x and 12.x; this GPU has {major}.{minor}. Install TensorRT "
            f"instead with `{install_command('tensorrt')}`"
        )
    return None


def why_no_kernels(device: str | None = None) -> str | None:
    """Why the library's own CUDA kernels cannot run here, or None if they can."""
    if not torch.cuda.is_available():
        return why_no_cuda()
    if torch.version.hip is not None:
        return f"the kernels are for CUDA, and PyTorch {torch.__version__} is built for ROCm"
    major, minor = torch.cuda.get_device_capability(device or "cuda")
    if (major, minor) < LEAST_CAPABILITY:
        return "the kernels need compute capability {}.{}; this GPU has {}.{}".format(*LEAST_CAPABILITY, major, minor)
    missing = missing_bindings()
    return None if missing is None else f"{missing}. Install what the kernels need with `{install_command('kernels')}`"


def why_kernels_refuse(precision: str, model: Any) -> T5TRTError | None:
    """An error if the kernels do not support a model in a precision on any GPU, else None.

    Args:
        precision: resolved.
        model: its config or `Architecture`; None if it is not known yet, or has no decoder.
    """
    if precision not in KERNEL_PRECISIONS:
        return InputError(f"precision is {precision!r}; the kernels compute in 'fp32', 'fp16', 'bf16' or 'int8'")
    problem = None if model is None else refusal(model, TORCH_TYPES[real_type(precision)])
    return None if problem is None else UnsupportedModelError(f"the kernels do not take this model: {problem}")


def resolve(config: RuntimeConfig, model: Any = None) -> Placement:
    """`choose`, with one message per process if a missing part leaves the GPU, the kernels or TensorRT unused."""
    placement = choose(config, model)
    if placement.idle_gpu is not None:
        _log_once(logging.WARNING, placement.idle_gpu)
    if placement.no_kernels is not None and model is not None and placement.backend == "onnxruntime":
        _log_once(
            logging.INFO,
            f"decoder steps are run by ONNX Runtime and not by the library's own C code: {placement.no_kernels}.",
        )
    elif placement.no_kernels is not None and model is not None:
        _log_once(
            logging.WARNING,
            f"decoder steps are run by a TensorRT engine and not by the library's own kernels: {placement.no_kernels}. "
            "decode='engine' chooses that without this warning.",
        )
    if placement.no_tensorrt is not None:
        _log_once(
            logging.INFO,
            f"models run on the GPU without TensorRT, by our own kernels and PyTorch: {placement.no_tensorrt}.",
        )
    return placement


@cache
def _log_once(level: int, message: str) -> None:
    logger.log(level, "%s", message)


def choose(config: RuntimeConfig, model: Any = None) -> Placement:
    """Choose backend, precision, device, and what runs the decoder step.

    "auto" is TensorRT if it can run, else the backend "cuda" if it can run the model as requested, else ONNX Runtime.

    Args:
        config: the user's settings.
        model: the config of a model with a decoder; None if it is not known yet.

    Raises:
        BackendError: the backend, or the kernels, that were asked for cannot run here.
        InputError: the device, the precision or `decode` does not go with the backend.
        UnsupportedModelError: the kernels that were asked for do not take the model.
    """
    if config.backend == "cuda":
        return _on_cuda(config, model)
    wants_cpu = config.device is not None and not config.device.startswith("cuda")
    if config.backend == "onnxruntime" or (config.backend == "auto" and wants_cpu):
        return _on_cpu(config, None)
    problem = why_not_tensorrt(config.device, config.flavor)
    if problem is None:
        return _on_tensorrt(config, model)
    if config.backend == "tensorrt":
        raise BackendError(f"backend='tensorrt' cannot run here: {problem}. Or use backend='onnxruntime'.")
    if not torch.cuda.is_available():
        return _on_cpu(config, problem)
    try:
        placement = _on_cuda(replace(config, backend="cuda"), model)
    except T5TRTError as error:
        return _on_cpu(config, f"{problem}. Without TensorRT, {_inside(error)}")
    reason = f"the library's own kernels can run, and TensorRT cannot: {problem}"
    return replace(placement, reason=reason, no_tensorrt=problem)


def _inside(error: T5TRTError) -> str:
    """An error's message as part of a sentence."""
    return str(error).rstrip(".")


def _on_cpu(config: RuntimeConfig, problem: str | None) -> Placement:
    """ONNX Runtime, with the library's own decoder where it can be compiled; `problem` is what keeps "auto" from a GPU."""
    import_onnxruntime()
    because = f" (TensorRT, which runs on GPUs, cannot: {problem})" if problem else ""
    if config.device is not None and config.device.startswith("cuda"):
        raise InputError(
            f"device got {config.device!r}; the backend 'onnxruntime' runs on the CPU{because}. Leave device out or use 'cpu'."
        )
    precisions = tuple(dict.fromkeys(name for names in CPU_PRECISIONS.values() for name in names))
    if config.precision not in ("auto", *precisions):
        raise InputError(
            f"precision got {config.precision!r}; the backend 'onnxruntime' computes in {_one_of(precisions)} on the CPU{because}. "
            "Use one of them, or 'auto' (fp32)."
        )
    precision = "fp32" if config.precision == "auto" else config.precision
    decode, no_kernels = _step_on_cpu(config.decode, precision, because)
    reason = f"TensorRT cannot run here: {problem}" if problem else "it was asked for"
    idle_gpu, cpu = _idle_gpu(problem) if problem else None, torch.device("cpu")
    return Placement("onnxruntime", precision, cpu, torch.float32, None, reason, idle_gpu, decode, no_kernels)


def _step_on_cpu(wanted: str, precision: str, because: str) -> tuple[str, str | None]:
    """What runs the decoder on a CPU, and why "auto" does not take the kernels."""
    refused: list[T5TRTError] = []
    for decode in CPU_PRECISIONS if wanted == "auto" else (wanted,):
        error = _why_not_on_cpu(decode, precision)
        if error is None:
            return decode, _inside(refused[0]) if refused else None
        refused.append(error)
    other = "engine" if wanted == "kernels" else "kernels"
    asked, instead = f"decode={wanted!r}", f"decode='auto' or {other!r}"
    if wanted == "auto":
        asked, instead = f"precision={precision!r}", "precision='fp32'"
    elif precision not in CPU_PRECISIONS[other]:
        instead = "decode='auto' and precision='fp32'"
    raise type(refused[0])(f"{asked} cannot be had here: {_inside(refused[0])}{because}. Or use {instead}.")


def _why_not_on_cpu(decode: str, precision: str) -> T5TRTError | None:
    """An error if a decoder cannot run on this CPU in a precision, else None."""
    if precision not in CPU_PRECISIONS[decode]:
        return InputError(
            f"precision is {precision!r}; {_ON_CPU[decode]} computes in {_one_of(CPU_PRECISIONS[decode])}"
        )
    missing = why_not_compiled() if decode == "kernels" else None
    return None if missing is None else BackendError(missing)


def _one_of(names: Sequence[str]) -> str:
    """Names as part of a sentence: 'a', 'b' or 'c'."""
    *most, last = map(repr, names)
    return f"{', '.join(most)} or {last}" if most else last


def _idle_gpu(problem: str) -> str | None:
    if torch.version.hip is not None or not (torch.cuda.is_available() or gpu_is_here()):
        return None
    return (
        f"models run on the CPU and the GPU is idle: {problem}. If the CPU is what you want, backend='onnxruntime' or "
        "T5_TRT_BACKEND=onnxruntime chooses it without this warning."
    )


def _on_tensorrt(config: RuntimeConfig, model: Any) -> Placement:
    if config.precision == "int4":
        raise InputError(
            "precision got 'int4'; matrices in 4 bits are for a CPU only. Use 'int8', or backend='onnxruntime'."
        )
    api = load_tensorrt(config.flavor)
    precision = "fp16" if config.precision == "auto" else config.precision
    decode, no_kernels = _step_beside_tensorrt(config, precision, model)
    engines = engine_precision(precision, decode)
    api.check_precision(engines)
    if config.building == "background" and engines not in ("fp32", "fp16", "bf16"):
        raise InputError(
            f"building got 'background' with precision {precision!r}; what serves until an engine is built computes in 'fp32', 'fp16' or "
            "'bf16', or in 'int8' where the library's own kernels decode. Use one of them, or 'wait'."
        )
    device, dtype = _gpu_of(config.device), TORCH_TYPES[real_type(precision)]
    reason = f"TensorRT {api.version} and a GPU are there"
    return Placement("tensorrt", precision, device, dtype, api.flavor, reason, decode=decode, no_kernels=no_kernels)


def engine_precision(precision: str, decode: str) -> str:
    """The precision of TensorRT's engines: where kernels decode with 8-bit weights, engines are those of "fp16"."""
    return "fp16" if precision == "int8" and decode == "kernels" else precision


def _step_beside_tensorrt(config: RuntimeConfig, precision: str, model: Any) -> tuple[str, str | None]:
    """What runs the decoder step, and why "auto" does not take the kernels."""
    if config.decode == "engine":
        return "engine", None
    refused = why_kernels_refuse(precision, model)
    missing = why_no_kernels(config.device) if refused is None else None
    if refused is None and missing is None:
        return "kernels", None
    problem = missing if refused is None else _inside(refused)
    if config.decode == "kernels":
        kind = BackendError if refused is None else type(refused)
        raise kind(f"decode='kernels' cannot be had here: {problem}. Or use decode='auto' or 'engine'.")
    return "engine", problem


def _on_cuda(config: RuntimeConfig, model: Any) -> Placement:
    if config.device is not None and not config.device.startswith("cuda"):
        raise InputError(
            f"device got {config.device!r}; the backend 'cuda' runs on CUDA devices. Leave device out or use 'cuda:0'."
        )
    if config.decode == "engine":
        raise InputError(
            "decode got 'engine'; the backend 'cuda' has no engines, its decoder step is always the kernels'. Use 'auto', or "
            "backend='tensorrt'."
        )
    precision = "fp16" if config.precision == "auto" else config.precision
    refused = why_kernels_refuse(precision, model)
    if isinstance(refused, InputError):
        raise InputError(
            f"precision got {config.precision!r}; the backend 'cuda' computes in 'fp32', 'fp16', 'bf16' or 'int8'. Use one of them, or "
            "'auto' (fp16)."
        )
    problem = why_no_kernels(config.device)
    if problem is not None:
        raise BackendError(f"backend='cuda' cannot run here: {problem}. Or use backend='onnxruntime'.")
    if refused is not None:
        raise UnsupportedModelError(
            f"backend='cuda' cannot run here: {_inside(refused)}. Use backend='tensorrt' or 'onnxruntime'."
        )
    dtype = TORCH_TYPES[real_type(precision)]
    return Placement("cuda", precision, _gpu_of(config.device), dtype, None, "it was asked for", decode="kernels")


def _gpu_of(device: str | None) -> torch.device:
    """The GPU that a device names, with its number."""
    asked = torch.device(device or "cuda")
    return torch.device("cuda", torch.cuda.current_device() if asked.index is None else asked.index)


def best_precision(config: RuntimeConfig, trained_in: torch.dtype | None, model: Any = None) -> str:
    """The precision for "auto" and a checkpoint: bf16 on a GPU if the checkpoint was trained in it and the backend has it, else "auto".

    Args:
        config: the user's settings.
        trained_in: dtype that the checkpoint's config names.
        model: as of `choose`.
    """
    placement = choose(config, model) if config.precision == "auto" and trained_in == torch.bfloat16 else None
    if placement is None or placement.backend == "onnxruntime":
        return config.precision
    if placement.backend == "cuda":
        return "bf16"
    try:
        load_tensorrt(placement.flavor).check_precision("bf16")
    except InputError:
        return config.precision
    return "bf16"


def refusal_of_device(device: torch.device, placement: Placement, flavor: str | None) -> str:
    """The message for a model that cannot be moved to another device: why, and what to do.

    Args:
        device: where it was to go.
        placement: where it runs.
        flavor: of TensorRT, as the user asked for it.
    """
    to_gpu = device.type == "cuda" and placement.device.type == "cpu"
    problem = why_not_tensorrt(str(device), flavor) if to_gpu else None
    if problem is not None and why_no_kernels(str(device)) is None:
        problem = None  # the backend "cuda" would do
    missing = f" (TensorRT, which runs on GPUs, cannot: {problem})" if problem else ""
    return (
        f".to({str(device)!r}): this model runs on {placement.device} with the backend {placement.backend!r}{missing}. "
        "Choose the device when loading: from_pretrained(..., device=...)."
    )
