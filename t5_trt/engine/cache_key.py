"""What an engine depends on, as one key: graph revision, weights, build settings, TensorRT and GPU."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import torch

from t5_trt.architecture import Architecture
from t5_trt.graph import GRAPH_REVISION


def weights_digest(weights: Mapping[str, torch.Tensor], arch: Architecture) -> str:
    """SHA-256 over names, shapes, types and bytes of all tensors, and over the architecture.

    Args:
        weights: state-dict key -> tensor on the CPU.
        arch: of the model: the same tensors with another activation are another model.
    """
    seen: dict[int, str] = {}  # one matrix under two names is read once

    def one(item: tuple[str, torch.Tensor]) -> str:
        name, tensor = item
        raw = memoryview(tensor.detach().contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]  # no copy
        return f"{name} {tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(raw).hexdigest()}"

    unique = []
    for name, tensor in sorted(weights.items()):
        if tensor.data_ptr() not in seen:
            seen[tensor.data_ptr()] = name
            unique.append((name, tensor))
    with ThreadPoolExecutor(4) as pool:  # hashlib releases the interpreter's lock
        lines = list(pool.map(one, unique))
    lines.append(json.dumps(asdict(arch), sort_keys=True))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def engine_key(facts: Mapping[str, Any]) -> str:
    """The key of an engine: a digest of everything that its bytes depend on.

    Args:
        facts: JSON values: graph, weights, shapes, precision, build settings, flavour, version, GPU.
    """
    text = json.dumps({"graph_revision": GRAPH_REVISION, **facts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
