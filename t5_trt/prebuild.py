"""`build_engines`: builds TensorRT engines of a model before its first request, also for GPUs of other machines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from t5_trt.config import DECODE, ENGINE_PRECISIONS, BuildConfig, check_choice, default_engine_cache_dir
from t5_trt.engine.profiles import Shapes, bucket
from t5_trt.engine.provider import EngineProvider
from t5_trt.engine.store import EngineStore
from t5_trt.engine.tensorrt_api import load_tensorrt
from t5_trt.errors import BackendError, InputError, T5TRTError
from t5_trt.graph.architecture import Architecture
from t5_trt.graph.signature import ENCODER, QUERIES, STEP
from t5_trt.kernels.compile import LEAST_CAPABILITY
from t5_trt.modeling import TRTT5ForConditionalGeneration
from t5_trt.modeling.adapted_model import engine_weights
from t5_trt.runtime.open_session import gpu_facts, int8_provider_options
from t5_trt.runtime.select import engine_precision, why_kernels_refuse, why_no_kernels


@dataclass(frozen=True)
class BuiltEngine:
    """An engine in a store.

    Attributes:
        label: graph, shapes and precision.
        size_bytes: of its plan.
    """

    label: str
    size_bytes: int


def build_engines(
    model: str,
    *,
    flavor: str | None = None,
    compute_capabilities: Sequence[str] = (),
    precision: str = "fp16",
    decode: str = "auto",
    calibration: Iterable[str] | None = None,
    batch: int = 1,
    beams: int = 1,
    source_tokens: int = 128,
    target_tokens: int = 128,
    cache_dir: Path | None = None,
) -> list[BuiltEngine]:
    """Build the encoder, the one-token step, and the decoder with several query positions, unless the store has them.

    Both decoder engines are omitted if the library's own kernels would decode on that GPU.

    Args:
        model: hub id or folder of a checkpoint.
        flavor: "tensorrt" or "rtx"; None takes the one that is installed.
        compute_capabilities: of GPUs to build for on a machine without one, such as "8.6"; TensorRT for RTX only.
        precision: "fp32", "tf32", "fp16", "bf16" or "int8".
        decode: what will run the decoder: "engine", "kernels", or "auto" as models with ``decode="auto"`` choose.
        calibration: texts whose largest activations set the range of half precision.
        batch: largest number of rows.
        beams: number of beams of each row.
        source_tokens: largest number of tokens in a source.
        target_tokens: largest number of generated tokens.
        cache_dir: folder of engines; None is the default one.

    Raises:
        InputError: an argument has a wrong type or value.
        BackendError: TensorRT or the GPU to build for is missing, the requested kernels cannot run there, or the build failed.
        UnsupportedModelError: the requested kernels do not support the model.
        CheckpointError: there is no such model.
    """
    check_choice("precision", precision, ENGINE_PRECISIONS)
    check_choice("decode", decode, DECODE)
    _check_sizes(batch=batch, beams=beams, source_tokens=source_tokens, target_tokens=target_tokens)
    api = load_tensorrt(flavor)
    gpu = _gpu(api.flavor, tuple(compute_capabilities))
    loaded = TRTT5ForConditionalGeneration.from_pretrained(model, backend="onnxruntime", calibration=calibration)
    scaling = loaded.fp16_scaling(precision)
    by_engine = _decodes_by_engine(decode, compute_capabilities, precision, loaded.architecture)
    precision = engine_precision(precision, "engine" if by_engine else "kernels")
    provider = EngineProvider(
        scaling.architecture(loaded.architecture),
        EngineStore(cache_dir or default_engine_cache_dir()),
        BuildConfig(),
        precision=precision,
        flavor=api.flavor,
        gpu=gpu,
        compute_capabilities=tuple(compute_capabilities),
        **int8_provider_options(loaded.architecture, engine_weights(loaded), scaling, precision),
    )
    shapes = Shapes(
        B=bucket("B", batch), N=beams, S=bucket("S", source_tokens), T=bucket("T", target_tokens), Q=bucket("Q", 1)
    )
    wanted = [(graph, shapes) for graph in (ENCODER, *((STEP, QUERIES) if by_engine else ()))]
    plans = provider.plans(wanted)
    labels = [provider.request(graph, shapes).label for graph, shapes in wanted]
    return [BuiltEngine(label, len(plan)) for label, plan in zip(labels, plans, strict=True)]


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise InputError(f"{name} got {size!r}; expected an integer of at least 1.")


def _decodes_by_engine(decode: str, capabilities: Sequence[str], precision: str, arch: Architecture) -> bool:
    """Whether engines decode on the GPUs to build for."""
    if decode == "engine":
        return True
    problem: T5TRTError | None = why_kernels_refuse(precision, arch)
    if problem is None and capabilities:
        old = [each for each in capabilities if tuple(map(int, each.split("."))) < LEAST_CAPABILITY]
        problem = BackendError(f"the kernels need compute capability 8.0; got {', '.join(old)}") if old else None
    elif problem is None:
        missing = why_no_kernels()
        problem = BackendError(missing) if missing else None
    if problem is not None and decode == "kernels":
        raise type(problem)(
            f"decode='kernels' cannot be had: {str(problem).rstrip('.')}. Use decode='auto' or 'engine'."
        )
    return problem is not None


def _gpu(flavor: str, capabilities: tuple[str, ...]) -> dict[str, Any]:
    if capabilities:
        if flavor != "rtx":
            raise InputError(
                f"compute capabilities go with the flavour 'rtx'; got {flavor!r}, which builds for the GPU here. Use --flavor rtx."
            )
        return {"compute_capabilities": list(capabilities)}
    if not torch.cuda.is_available():
        raise BackendError(
            "there is no GPU here to build for. Use --flavor rtx --compute-capability 8.6 (and others) to build without one."
        )
    return gpu_facts(torch.device("cuda", 0))
