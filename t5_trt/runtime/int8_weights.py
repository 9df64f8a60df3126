"""The matrices of one model in 8 bits, or in 8 and 4, on disk: rounded once, kept in the engine store, mapped into memory by every process."""

from __future__ import annotations

import hashlib
import logging
import platform
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load, load_file, save_file

from t5_trt.engine.cache_key import engine_key
from t5_trt.engine.store import PLAN, EngineStore
from t5_trt.graph.architecture import Architecture
from t5_trt.graph.int4 import MATRIX4, SCALE4, quantize_group_to_4_bits, quantize_to_4_bits
from t5_trt.graph.int8 import MATRIX, SCALE, quantize, quantize_group
from t5_trt.graph.parameters import Weights, parameters

logger = logging.getLogger("t5_trt")


def load_int8_weights(
    arch: Architecture, weights: Weights, store: EngineStore, precision: str = "int8"
) -> dict[str, torch.Tensor]:
    """The matrices of a model in 8 bits, or the decoder's in 4, from the store; created and stored if they are missing.

    Args:
        arch: of the model.
        weights: state-dict key -> tensor.
        store: of engines.
        precision: "int8" or "int4".

    Returns:
        See `t5_trt.graph.int8.quantize` and `t5_trt.graph.int4.quantize_to_4_bits`; on processors whose 8-bit products saturate the
        matrices in 8 bits are uint8, shifted by 128.

    Raises:
        BackendError: the store cannot be written, or others may write to it.
    """
    facts = {
        "graph": f"{precision} weights",
        "precision": precision,
        "architecture": asdict(arch),
        "weights": weights_digest(arch, weights),
        "flavor": "onnxruntime",
    }
    key = engine_key(facts)

    def make(folder: Path) -> None:
        logger.info(
            "rounding the matrices of a model for precision %s, once; they are kept in %s", precision, store.root
        )
        made = quantize_to_4_bits(arch, weights) if precision == "int4" else quantize(arch, weights)
        save_file(dict(made), folder / PLAN)

    stored = store.get_or_build(key, facts, make)
    try:
        made: dict[str, torch.Tensor] = load_file(store.root / key / PLAN)  # mapped: processes share the pages
    except OSError:  # another process has pruned it
        made = load(stored)
    return {name: _as_products_want(tensor) for name, tensor in made.items()} if products_saturate() else made


def rounded_names(arch: Architecture, quantized: Weights, keys: Collection[str]) -> set[str]:
    """Names in `quantized` of the groups that some checkpoint tensors belong to.

    Args:
        arch: of the model.
        quantized: what `load_int8_weights` gave.
        keys: of the state dict.
    """
    groups = [name for name, parameter in parameters(arch).items() if not set(keys).isdisjoint(parameter.parts)]
    names = {kind.format(group) for group in groups for kind in (MATRIX, SCALE, MATRIX4, SCALE4)}
    return names & quantized.keys()


def round_anew(
    arch: Architecture,
    weights: Weights,
    quantized: dict[str, torch.Tensor],
    keys: Collection[str],
    *,
    own: bool = False,
) -> None:
    """Round again the groups of matrices that have changed.

    Args:
        arch: of the model.
        weights: state-dict key -> tensor.
        quantized: what `load_int8_weights` gave; changed.
        keys: of the matrices.
        own: replace the tensors instead of writing into them, those in 4 bits by some in 8: ONNX Runtime would expand changing
            matrices in 4 bits to float32 in every product.
    """
    unsigned = any(name.endswith(MATRIX.format("")) and made.dtype == torch.uint8 for name, made in quantized.items())
    for group, parameter in parameters(arch).items():
        stored = {MATRIX.format(group), MATRIX4.format(group)} & quantized.keys()
        if not stored or set(keys).isdisjoint(parameter.parts):
            continue
        if own:
            for kind in (MATRIX4, SCALE4):
                quantized.pop(kind.format(group), None)
        rounded = quantize_group_to_4_bits if MATRIX4.format(group) in quantized else quantize_group
        for name, tensor in rounded(group, parameter, weights):
            made = _as_products_want(tensor) if unsigned else tensor
            if own:
                quantized[name] = made
            else:
                quantized[name].copy_(made)


def _as_products_want(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.short() + 128).to(torch.uint8) if tensor.dtype == torch.int8 else tensor


def weights_digest(arch: Architecture, weights: Weights) -> str:
    """SHA-256 of the matrices before rounding."""
    digest = hashlib.sha256()
    for parameter in parameters(arch).values():
        for key in parameter.parts if parameter.is_matrix else ():
            tensor = weights[key].detach().contiguous()
            digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def products_saturate(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether 8-bit products of mixed sign may saturate here: x86 without the VNNI instructions.

    There ONNX Runtime multiplies unsigned by signed bytes with VPMADDUBSW, which adds pairs in 16 bits
    (onnxruntime.ai/docs/performance/model-optimizations/quantization.html, "When and why do I need to try U8U8?").
    """
    if platform.machine().lower() not in ("x86_64", "amd64", "i686"):
        return False
    try:
        flags = cpuinfo.read_text().split()
    except OSError:
        return True
    return not {"avx512_vnni", "avx_vnni"} & set(flags)
