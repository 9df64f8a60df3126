"""Choosing a backend and opening its session: the one place that decides what "auto" means."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from t5_trt.architecture import Architecture
from t5_trt.config import BuildConfig, RuntimeConfig
from t5_trt.engine.provider import EngineProvider
from t5_trt.engine.store import EngineStore
from t5_trt.engine.tensorrt_api import load_tensorrt
from t5_trt.errors import BackendError, InputError
from t5_trt.graph.int8 import quantize_for_device
from t5_trt.graph.parameters import Weights
from t5_trt.graph.precision import TORCH_TYPES, real_type
from t5_trt.graph.ranges import Folding, Ranges, fold
from t5_trt.installation import gpu_is_here, install_command, why_no_cuda
from t5_trt.kernels.compile import LEAST_CAPABILITY, missing_bindings
from t5_trt.runtime.cuda_session import CudaSession
from t5_trt.runtime.forks import check_cuda_after_fork
from t5_trt.runtime.int8_weights import load_int8_weights, weights_digest
from t5_trt.runtime.ort_session import OrtSession, import_onnxruntime
from t5_trt.runtime.session import Session
from t5_trt.runtime.trt_session import TrtSession

logger = logging.getLogger("t5_trt")


@dataclass(frozen=True)
class Placement:
    """What a `RuntimeConfig` stands for on this machine.

    Attributes:
        backend: "tensorrt", "cuda" or "onnxruntime".
        precision: "fp32", "tf32", "fp16", "bf16" or "int8".
        device: where engines run.
        dtype: of hidden states and K/V.
        flavor: of TensorRT, or None.
        reason: why "auto" chose the backend.
        idle_gpu: what to tell a user whose GPU is not used although nobody asked for the CPU; None in all other cases.
    """

    backend: str
    precision: str
    device: torch.device
    dtype: torch.dtype
    flavor: str | None
    reason: str
    idle_gpu: str | None = None


def why_not_tensorrt(device: str | None = None, flavor: str | None = None) -> str | None:
    """Why TensorRT cannot run here, or None if it can."""
    no_gpu = None
    if not torch.cuda.is_available():
        no_gpu = why_no_cuda()
        if flavor is None:  # answered before TensorRT is imported, which takes 100 MB
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


def resolve(config: RuntimeConfig) -> Placement:
    """`choose`, with one warning in a process where a GPU is left idle because something is missing."""
    placement = choose(config)
    if placement.idle_gpu is not None:
        _warn_once(placement.idle_gpu)
    return placement


@cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


def choose(config: RuntimeConfig) -> Placement:
    """Decide backend, precision and device.

    Raises:
        BackendError: the backend that was asked for cannot run here.
        InputError: the device or precision does not go with it.
    """
    if config.backend == "cuda":
        return _on_cuda(config)
    wants_cpu = config.device is not None and not config.device.startswith("cuda")
    problem = None
    if config.backend == "tensorrt" or (config.backend == "auto" and not wants_cpu):
        problem = why_not_tensorrt(config.device, config.flavor)
        if problem is None:
            return _on_gpu(config)
        if config.backend == "tensorrt":
            raise BackendError(f"backend='tensorrt' cannot run here: {problem}. Or use backend='onnxruntime'.")
    import_onnxruntime()
    because = f" (TensorRT, which runs on GPUs, cannot: {problem})" if problem else ""
    if config.device is not None and not wants_cpu:
        raise InputError(
            f"device got {config.device!r}; the backend 'onnxruntime' runs on the CPU{because}. Leave device out or use 'cpu'."
        )
    if config.precision not in ("auto", "fp32", "int8"):
        raise InputError(
            f"precision got {config.precision!r}; the backend 'onnxruntime' computes in 'fp32' or 'int8' on the CPU{because}. "
            "Use one of them, or 'auto' (fp32)."
        )
    reason = f"TensorRT cannot run here: {problem}" if problem else "it was asked for"
    precision = "int8" if config.precision == "int8" else "fp32"
    idle_gpu = _idle_gpu(problem) if problem else None
    return Placement("onnxruntime", precision, torch.device("cpu"), torch.float32, None, reason, idle_gpu)


def _idle_gpu(problem: str) -> str | None:
    if torch.version.hip is not None or not (torch.cuda.is_available() or gpu_is_here()):
        return None
    without = "backend='cuda' uses the GPU without TensorRT. " if torch.cuda.is_available() else ""
    return (
        f"models run on the CPU and the GPU is idle: {problem}. {without}If the CPU is what you want, backend='onnxruntime' or "
        "T5_TRT_BACKEND=onnxruntime chooses it without this warning."
    )


def refusal_of_device(device: torch.device, placement: Placement, flavor: str | None) -> str:
    """Why a model that was loaded for one place cannot be moved to another, and what to do.

    Args:
        device: where it was to go.
        placement: where it runs.
        flavor: of TensorRT, as the user asked for it.
    """
    to_gpu = device.type == "cuda" and placement.device.type == "cpu"
    problem = why_not_tensorrt(str(device), flavor) if to_gpu else None
    missing = f" (TensorRT, which runs on GPUs, cannot: {problem})" if problem else ""
    return (
        f".to({str(device)!r}): this model runs on {placement.device} with the backend {placement.backend!r}{missing}. "
        "Choose the device when loading: from_pretrained(..., device=...)."
    )


def _on_gpu(config: RuntimeConfig) -> Placement:
    api = load_tensorrt(config.flavor)
    precision = "fp16" if config.precision == "auto" else config.precision
    api.check_precision(precision)
    device = _gpu_of(config.device)
    reason = f"TensorRT {api.version} and a GPU are there"
    return Placement("tensorrt", precision, device, TORCH_TYPES[real_type(precision)], api.flavor, reason)


def _gpu_of(device: str | None) -> torch.device:
    """The GPU that a device names, with its number."""
    asked = torch.device(device or "cuda")
    return torch.device("cuda", torch.cuda.current_device() if asked.index is None else asked.index)


def _on_cuda(config: RuntimeConfig) -> Placement:
    if config.device is not None and not config.device.startswith("cuda"):
        raise InputError(
            f"device got {config.device!r}; the backend 'cuda' runs on CUDA devices. Leave device out or use 'cuda:0'."
        )
    if config.precision not in ("auto", "fp32", "fp16", "bf16"):
        raise InputError(
            f"precision got {config.precision!r}; the backend 'cuda' computes in 'fp32', 'fp16' or 'bf16'. Use one of them, or 'auto' "
            "(fp16)."
        )
    problem = why_no_cuda() if not torch.cuda.is_available() else why_no_kernels(config.device)
    if problem is not None:
        raise BackendError(f"backend='cuda' cannot run here: {problem}. Or use backend='onnxruntime'.")
    precision = "fp16" if config.precision == "auto" else config.precision
    return Placement(
        "cuda", precision, _gpu_of(config.device), TORCH_TYPES[real_type(precision)], None, "it was asked for"
    )


def why_no_kernels(device: str | None = None) -> str | None:
    """Why the library's own kernels cannot run on a GPU that is there, or None if they can."""
    major, minor = torch.cuda.get_device_capability(device or "cuda")
    if (major, minor) < LEAST_CAPABILITY:
        return "the kernels need compute capability {}.{}; this GPU has {}.{}".format(*LEAST_CAPABILITY, major, minor)
    missing = missing_bindings()
    return None if missing is None else f"{missing}. Install what the kernels need with `{install_command('kernels')}`"


def best_precision(config: RuntimeConfig, trained_in: torch.dtype | None) -> str:
    """What "auto" stands for with a checkpoint: bf16 on a GPU if it was trained in that and TensorRT has it, else "auto".

    Args:
        config: what the user asked for.
        trained_in: dtype that the checkpoint's config names.
    """
    placement = resolve(config) if config.precision == "auto" and trained_in == torch.bfloat16 else None
    if placement is None or placement.backend == "onnxruntime":
        return config.precision
    if placement.backend == "cuda":
        return "bf16"
    try:
        load_tensorrt(placement.flavor).check_precision("bf16")
    except InputError:
        return config.precision
    return "bf16"


def gpu_facts(device: torch.device) -> dict[str, Any]:
    """What a plan is bound to: the GPU's name and compute capability."""
    properties = torch.cuda.get_device_properties(device)
    return {"name": properties.name, "compute_capability": f"{properties.major}.{properties.minor}"}


def choose_folding(
    arch: Architecture, weights: Weights, precision: str, seen: Callable[[], Ranges], *, calibrated: bool = False
) -> Folding:
    """The factors that keep engines of a precision in range; none but in half precision. Arguments as of `open_session`."""
    if precision not in ("fp16", "int8"):
        return Folding()
    folding = fold(arch, weights, seen() if calibrated else None)
    if not folding.certain:
        logger.info("the weights alone set no useful bound to half precision: a few inputs are tried in float32")
        folding = fold(arch, weights, seen())
    if folding != Folding():
        inner, branches = (
            ", ".join(f"{factor:g}" for factor in sorted(set(factors.values()))) or "1"
            for factors in (folding.inner, folding.branches)
        )
        stream = "float32" if folding.wide_stream else "half precision too"
        logger.info(
            "half precision: feed-forward layers are kept at %s of their value, what layers add to the stream at %s, the "
            "embedding at %g; streams are %s",
            inner,
            branches,
            folding.embedding,
            stream,
        )
    return folding


def eight_bits(arch: Architecture, weights: Weights, folding: Folding, precision: str) -> dict[str, Any]:
    """What an `EngineProvider` of a precision needs to know of 8-bit weights; empty but for "int8"."""
    if precision != "int8":
        return {}
    digest = f"{weights_digest(arch, weights)} {sorted(folding.branches.items())} {sorted(folding.inner.items())}"
    return {"quantized": lambda: dict(quantize_for_device(arch, weights, folding)), "weights": digest}


def open_session(
    arch: Architecture,
    weights: Weights,
    config: RuntimeConfig,
    placement: Placement,
    build: BuildConfig,
    seen: Callable[[], Ranges],
    *,
    calibrated: bool = False,
) -> Session:
    """Open the session of a model on this machine.

    Args:
        arch: of the model.
        weights: state-dict key -> CPU tensor; kept by the session.
        config: what the user asked for.
        placement: what `resolve` made of it.
        build: settings of the engine builder.
        seen: measures the largest activations, where half precision needs them.
        calibrated: `seen` measures texts of the user's, which go before bounds from the weights.

    Raises:
        BackendError: this process was forked from one that had used the GPU.
    """
    store = EngineStore(config.cache_dir, config.engine_cache_bytes)
    if placement.backend == "onnxruntime":
        quantized = load_int8_weights(arch, weights, store) if placement.precision == "int8" else None
        threads, prepack = config.num_threads, config.prepack_weights
        return OrtSession(arch, weights, num_threads=threads, prepack_weights=prepack, quantized=quantized)
    check_cuda_after_fork()
    folding = choose_folding(arch, weights, placement.precision, seen, calibrated=calibrated)
    if placement.backend == "cuda":
        with torch.cuda.device(placement.device):
            return CudaSession(arch, weights, placement.device, placement.precision, folding, store)
    assert placement.flavor is not None
    provider = EngineProvider(
        folding.architecture(arch),
        store,
        build,
        precision=placement.precision,
        flavor=placement.flavor,
        gpu=gpu_facts(placement.device),
        bundle=config.bundled_engines,
        show_progress=config.show_progress,
        **eight_bits(arch, weights, folding, placement.precision),
    )
    with torch.cuda.device(placement.device):
        return TrtSession(
            provider,
            weights,
            load_tensorrt(placement.flavor),
            placement.device,
            strict=config.strict,
            reference=OrtSession(arch, weights, num_threads=config.num_threads) if config.check_engines else None,
            folding=folding,
        )
