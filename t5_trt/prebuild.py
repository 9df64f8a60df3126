"""`build_engines`: TensorRT engines of a model ahead of its first request, also for GPUs that are not here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from t5_trt.config import PRECISIONS, BuildConfig, check_choice, default_engine_cache_dir
from t5_trt.engine.profiles import Shapes, bucket
from t5_trt.engine.provider import EngineProvider
from t5_trt.engine.store import EngineStore
from t5_trt.engine.tensorrt_api import load_tensorrt
from t5_trt.errors import BackendError, InputError
from t5_trt.modeling import TRTT5ForConditionalGeneration
from t5_trt.runtime.open import eight_bits, gpu_facts
from t5_trt.signature import ENCODER, QUERIES, STEP


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
    calibration: Iterable[str] | None = None,
    batch: int = 1,
    beams: int = 1,
    source_tokens: int = 128,
    target_tokens: int = 128,
    cache_dir: Path | None = None,
) -> list[BuiltEngine]:
    """Build encoder, decoder step, and decoder with several query positions, where the store does not have them yet.

    Args:
        model: hub id or folder of a checkpoint.
        flavor: "tensorrt" or "rtx"; None takes the one that is installed.
        compute_capabilities: of GPUs to build for without one here, such as "8.6"; TensorRT for RTX only.
        precision: "fp32", "tf32", "fp16", "bf16" or "int8".
        calibration: texts whose largest activations set the range of half precision.
        batch: largest number of rows.
        beams: of each row.
        source_tokens: largest number in a source.
        target_tokens: largest number that is generated.
        cache_dir: folder of engines; None is the default one.

    Raises:
        InputError: an argument has no meaning.
        BackendError: TensorRT or the GPU to build for is missing, or the build failed.
        CheckpointError: there is no such model.
    """
    check_choice("precision", precision, tuple(name for name in PRECISIONS if name != "auto"))
    sizes = {"batch": batch, "beams": beams, "source_tokens": source_tokens, "target_tokens": target_tokens}
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise InputError(f"{name} got {size!r}; expected an integer of at least 1.")
    api = load_tensorrt(flavor)
    gpu = _gpu(api.flavor, tuple(compute_capabilities))
    loaded = TRTT5ForConditionalGeneration.from_pretrained(model, backend="onnxruntime", calibration=calibration)
    folding = loaded.folding(precision)
    provider = EngineProvider(
        folding.architecture(loaded.architecture),
        EngineStore(cache_dir or default_engine_cache_dir()),
        BuildConfig(),
        precision=precision,
        flavor=api.flavor,
        gpu=gpu,
        compute_capabilities=tuple(compute_capabilities),
        **eight_bits(loaded.architecture, loaded.state_dict(), folding, precision),
    )
    shapes = Shapes(
        B=bucket("B", batch), N=beams, S=bucket("S", source_tokens), T=bucket("T", target_tokens), Q=bucket("Q", 1)
    )
    wanted = [(graph, shapes) for graph in (ENCODER, STEP, QUERIES)]
    plans = provider.plans(wanted)
    labels = [provider.request(graph, shapes).label for graph, shapes in wanted]
    return [BuiltEngine(label, len(plan)) for label, plan in zip(labels, plans, strict=True)]


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
