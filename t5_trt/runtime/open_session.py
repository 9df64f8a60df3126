"""Opening the session of a model on the backend that `t5_trt.runtime.select` chose."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch

from t5_trt.config import BuildConfig, RuntimeConfig
from t5_trt.engine.provider import EngineProvider
from t5_trt.engine.store import EngineStore
from t5_trt.engine.tensorrt_api import load_tensorrt
from t5_trt.errors import BackendError, InputError
from t5_trt.graph.architecture import Architecture
from t5_trt.graph.fp16_scaling import Fp16Scaling, Ranges, find_scaling
from t5_trt.graph.int8 import quantize_for_device
from t5_trt.graph.parameters import Weights
from t5_trt.kernels.cpu_compile import load_library
from t5_trt.kernels.encoder import refusal
from t5_trt.kernels.step_weights import StepWeightsMaker
from t5_trt.runtime.cuda_session import CudaSession
from t5_trt.runtime.device_weights import WeightsOn
from t5_trt.runtime.forks import check_cuda_after_fork
from t5_trt.runtime.int8_weights import load_int8_weights, round_anew, weights_digest
from t5_trt.runtime.kernel_decoder import KernelDecoder
from t5_trt.runtime.kernel_encoder import open_encoder
from t5_trt.runtime.onnxruntime_session import OrtSession
from t5_trt.runtime.select import CPU_PRECISIONS, Placement, engine_precision
from t5_trt.runtime.session import Session
from t5_trt.runtime.tensorrt_session import TrtSession

logger = logging.getLogger("t5_trt")


def gpu_facts(device: torch.device) -> dict[str, Any]:
    """The GPU's name and compute capability, which a plan is bound to."""
    properties = torch.cuda.get_device_properties(device)
    return {"name": properties.name, "compute_capability": f"{properties.major}.{properties.minor}"}


def choose_fp16_scaling(
    arch: Architecture, weights: Weights, precision: str, seen: Callable[[], Ranges], *, calibrated: bool = False
) -> Fp16Scaling:
    """The factors that keep half precision in range; none for other precisions. Arguments as of `open_session`."""
    if precision not in ("fp16", "int8"):
        return Fp16Scaling()
    scaling = find_scaling(arch, weights, seen() if calibrated else None)
    if not scaling.certain:
        logger.info("the weights alone set no useful bound to half precision: a few inputs are tried in float32")
        scaling = find_scaling(arch, weights, seen())
    if scaling != Fp16Scaling():
        inner, branches = (
            ", ".join(f"{factor:g}" for factor in sorted(set(factors.values()))) or "1"
            for factors in (scaling.inner, scaling.branches)
        )
        stream = "float32" if scaling.wide_stream else "half precision too"
        logger.info(
            "half precision: feed-forward layers are kept at %s of their value, what layers add to the stream at %s, the "
            "embedding at %g; streams are %s",
            inner,
            branches,
            scaling.embedding,
            stream,
        )
    return scaling


def int8_provider_options(arch: Architecture, weights: Weights, scaling: Fp16Scaling, precision: str) -> dict[str, Any]:
    """Options of an `EngineProvider` for 8-bit weights; empty unless the precision is "int8"."""
    if precision != "int8":
        return {}
    digest = f"{weights_digest(arch, weights)} {sorted(scaling.branches.items())} {sorted(scaling.inner.items())}"
    return {"quantized": lambda: dict(quantize_for_device(arch, weights, scaling)), "weights": digest}


def open_session(
    arch: Architecture,
    weights: Weights,
    config: RuntimeConfig,
    placement: Placement,
    build: BuildConfig,
    seen: Callable[[], Ranges],
    *,
    calibrated: bool = False,
    changing: Collection[str] = (),
    base: Weights | None = None,
) -> Session:
    """Open the session of a model on this machine.

    Args:
        arch: of the model.
        weights: state-dict key -> CPU tensor; kept by the session.
        config: the user's settings.
        placement: what `t5_trt.runtime.select.resolve` made of it.
        build: settings of the engine builder.
        seen: measures the largest activations, where half precision needs them.
        calibrated: `seen` measures the user's texts, which take precedence over bounds from the weights.
        changing: keys of weights that `Session.update_weights` will change.
        base: `weights` without adapters, whose 8-bit matrices are stored.

    Raises:
        BackendError: this process was forked from one that had used the GPU.
    """
    store = EngineStore(config.cache_dir, config.engine_cache_bytes)
    if placement.backend == "onnxruntime":
        quantized = None
        if placement.precision in ("int4", "bf16") and not arch.decoder_layers:
            instead = "'int8'" if placement.precision == "int4" else "'fp32' or 'int8'"
            raise InputError(
                f"precision got {placement.precision!r}; on a CPU it is for the decoder's matrices, and this model has no decoder. "
                f"Use {instead}."
            )
        if placement.precision in ("int8", "int4"):
            quantized = load_int8_weights(arch, weights if base is None else base, store, placement.precision)
            round_anew(arch, weights, quantized, changing, own=True)
        return OrtSession(
            arch,
            weights,
            num_threads=config.num_threads,
            thread_spinning=config.thread_spinning,
            prepack_weights=config.prepack_weights,
            quantized=quantized,
            changing=changing,
            library=_cpu_library(arch, config, store, placement),
            matrices=torch.bfloat16 if placement.precision == "bf16" else None,
        )
    check_cuda_after_fork()
    choose = partial(choose_fp16_scaling, arch, precision=placement.precision, seen=seen, calibrated=calibrated)
    with torch.cuda.device(placement.device):
        if placement.backend == "cuda":
            if placement.precision == "int8" and not arch.decoder_layers:
                raise InputError(
                    "precision got 'int8'; the backend 'cuda' has the decoder's matrices in 8 bits, and this model has no decoder. Use 'fp16'."
                )
            scaling = choose(weights=WeightsOn(weights, placement.device))  # bounds of a large model take a host long
            return CudaSession(arch, weights, placement.device, placement.precision, scaling, store)
        scaling = choose(weights=weights)  # on the host: the engines' keys hold it, and a last bit may change a factor
        return _open_tensorrt(arch, weights, config, placement, build, scaling, store)


def _cpu_library(
    arch: Architecture, config: RuntimeConfig, store: EngineStore, placement: Placement
) -> ctypes.CDLL | None:
    """The C code; None without a decoder or where ONNX Runtime decodes, and with a warning where ``decode="auto"`` can do without what does not compile.

    Raises:
        BackendError: it does not compile, and was asked for, or ONNX Runtime does not have the precision.
    """
    if placement.decode != "kernels" or not arch.decoder_layers:
        return None
    try:
        return load_library(store)
    except BackendError as error:
        if config.decode == "kernels" or placement.precision not in CPU_PRECISIONS["engine"]:
            raise
        logger.warning("the decoder is run by ONNX Runtime, as the library's own C code cannot be used: %s", error)
        return None


def _open_tensorrt(
    arch: Architecture,
    weights: Weights,
    config: RuntimeConfig,
    placement: Placement,
    build: BuildConfig,
    scaling: Fp16Scaling,
    store: EngineStore,
) -> TrtSession:
    assert placement.flavor is not None
    precision, dtype, device = placement.precision, placement.dtype, placement.device
    if arch.decoder_layers:
        precision = engine_precision(precision, placement.decode)
    elif precision == "int8":  # the engine of an encoder alone has its matrices in 8 bits
        load_tensorrt(placement.flavor).check_precision(precision)
    background = config.building == "background"
    provider = EngineProvider(
        scaling.architecture(arch),
        store,
        build,
        precision=precision,
        flavor=placement.flavor,
        gpu=gpu_facts(device),
        bundle=config.bundled_engines,
        show_progress=False if background and config.show_progress is None else config.show_progress,
        **int8_provider_options(arch, weights, scaling, precision),
    )
    kernels = None
    if placement.decode == "kernels" and arch.decoder_layers:
        int8 = placement.precision == "int8"
        kernels = KernelDecoder(
            StepWeightsMaker(arch, weights, dtype, device, scaling, int8=int8), placement.precision, store
        )
    # "auto" uses the faster encoder; backend="tensorrt" always uses engines
    compares = config.backend == "auto" and placement.decode == "kernels" and not refusal(arch, dtype)
    own = partial(open_encoder, arch, scaling=scaling, precision=precision, dtype=dtype, store=store)
    return TrtSession(
        provider,
        weights,
        load_tensorrt(placement.flavor),
        device,
        strict=config.strict,
        reference=OrtSession(arch, weights, num_threads=config.num_threads) if config.check_engines else None,
        precision=placement.precision,
        scaling=scaling,
        kernels=kernels,
        own_encoder=own if background or compares else None,
        background=background,
    )
