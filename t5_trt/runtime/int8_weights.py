"""The matrices of one model in 8 bits, or in 8 and 4, on disk: rounded once, kept in the engine store, mapped into memory by every process."""

from __future__ import annotations

import hashlib
import logging
import platform
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from t5_trt.engine.cache_key import engine_key
from t5_trt.engine.store import PLAN, EngineStore
from t5_trt.errors import BackendError
from t5_trt.graph.architecture import Architecture
from t5_trt.graph.int4 import MATRIX4, SCALE4, quantize_group_to_4_bits, quantize_to_4_bits
from t5_trt.graph.int8 import MATRIX, SCALE, quantize, quantize_group
from t5_trt.graph.parameters import Weights, parameters
from t5_trt.runtime.mapped_weights import MappedWeights
from t5_trt.runtime.tensor_file import StoredTensors, write_tensors

logger = logging.getLogger("t5_trt")
#: in the manifest: keys of checkpoint files with these matrices, the newest first, and how many are kept
FILES, _FILES_KEPT = "files", 16
#: to open a file that other processes may remove
_ATTEMPTS = 3


def load_int8_weights(
    arch: Architecture, weights: Weights, store: EngineStore, precision: str = "int8"
) -> StoredTensors:
    """The matrices of a model in 8 bits, or the decoder's in 4, from the store; created and stored if they are missing.

    Where the weights are those of checkpoint files that are known from before, they are not read; see `MappedWeights.identity`.

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
    facts: dict[str, Any] = {
        "graph": f"{precision} weights",
        "precision": precision,
        "architecture": asdict(arch),
        "flavor": "onnxruntime",
    }
    if shifted := products_saturate():
        facts["shifted"] = True

    matrices = [key for parameter in parameters(arch).values() if parameter.is_matrix for key in parameter.parts]
    with MappedWeights(weights, matrices) as read:
        identity = read.identity()
        of_files = None if identity is None else engine_key(facts | {"files": identity})
        path = None if of_files is None else _known_file(store, of_files)
        if path is not None and (found := _opened(path)) is not None:
            return found

        def make(folder: Path) -> None:
            logger.info(
                "rounding the matrices of a model for precision %s, once; they are kept in %s", precision, store.root
            )
            made = quantize_to_4_bits(arch, read) if precision == "int4" else quantize(arch, read)
            wanted = ((name, _as_products_want(tensor) if shifted else tensor) for name, tensor in made)
            write_tensors(folder / PLAN, wanted, most=2 * len(matrices))

        facts["weights"] = weights_digest(arch, read)
        key = engine_key(facts)
        for _ in range(_ATTEMPTS):
            found = _opened(store.file_or_build(key, facts, make))
            if found is not None:
                break
        else:
            raise BackendError(
                f"the rounded matrices of a model vanish from {store.root} as soon as they are stored. Use a larger "
                "engine_cache_bytes, or another T5_TRT_CACHE for this model."
            )
        if of_files is not None and read.settled():
            others = [each for each in store.manifest(key).get(FILES, []) if each != of_files]
            store.add_to_manifest(key, {FILES: [of_files, *others][:_FILES_KEPT]})
    return found


def _known_file(store: EngineStore, of_files: str) -> Path | None:
    """The stored matrices that were made of checkpoint files, by the key of the latter; None if they are not known."""
    known = (entry.key for entry in store.entries() if of_files in entry.manifest.get(FILES, []))
    return next((path for key in known if (path := store.file(key)) is not None), None)


def _opened(path: Path) -> StoredTensors | None:
    try:
        return StoredTensors(path)
    except FileNotFoundError:  # another process has pruned it
        return None


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
            for name in {MATRIX4.format(group), SCALE4.format(group)} & quantized.keys():
                del quantized[name]
        rounded = quantize_group_to_4_bits if MATRIX4.format(group) in quantized else quantize_group
        for name, tensor in rounded(group, parameter, weights):
            made = _as_products_want(tensor) if unsigned else tensor
            if own:
                quantized[name] = made
            else:
                quantized[name].copy_(made)
                if isinstance(quantized, StoredTensors):
                    quantized.written_to(name)


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
