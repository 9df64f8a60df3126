"""Opening ONNX Runtime's session of a graph over weights in memory or in a file."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from t5_trt.runtime.tensor_file import StoredTensors

#: smaller tensors are embedded in the ONNX model, where graph optimizers can read their values
SHARED_FROM_BYTES = 1 << 16


def open_graph(
    ort: Any,
    build: Callable[[], ir.Model],
    options: Any,
    shared: dict[str, Any],
    stored: Mapping[str, torch.Tensor] | None = None,
) -> tuple[Any, list[str]]:
    """Open a session.

    Args:
        ort: the module onnxruntime.
        build: makes the graph.
        options: of the session; changed.
        shared: name -> OrtValue over the memory of an initializer, for all sessions of a model; filled up.
        stored: if it is a `StoredTensors`, ONNX Runtime reads its initializers from the file and packs them one after the
            other, so that they are not in memory twice.

    Returns:
        The session, and the names of the graph's inputs.
    """
    # The model only names what lies in memory, but ONNX Runtime wants the named file to exist.
    with tempfile.TemporaryDirectory(prefix="t5_trt-") as temporary:
        file = Path(temporary) / "weights"
        places: Mapping[str, tuple[int, int]] = {}
        file.write_bytes(bytes(16))
        if isinstance(stored, StoredTensors) and stored.places():
            file, places = stored.path, stored.places()

        def name_weights(model: ir.Model) -> None:
            for value in model.graph.initializers.values():
                tensor, name = value.const_value, value.name
                assert name is not None and tensor is not None
                if tensor.nbytes < SHARED_FROM_BYTES:
                    continue
                if name not in places:
                    if name not in shared:
                        shared[name] = ort.OrtValue.ortvalue_from_numpy(tensor.numpy())
                    options.add_initializer(name, shared[name])
                offset, length = places.get(name, (0, None))
                shape = ir.Shape(tensor.shape.numpy())
                value.const_value = ir.ExternalTensor(file.name, offset, length, tensor.dtype, shape=shape, name=name)
            if places:
                _largest_first(model.graph, places)

        with _young_garbage():
            model, inputs = _serialized(build, name_weights)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(file.parent))
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]), inputs


def _serialized(build: Callable[[], ir.Model], name_weights: Callable[[ir.Model], None]) -> tuple[bytes, list[str]]:
    model = build()
    try:
        name_weights(model)
        return ir.to_proto(model).SerializeToString(), [value.name or "" for value in model.graph.inputs]
    finally:  # nodes and values refer to each other, and would keep the weights until a garbage collection
        for value in model.graph.initializers.values():
            value.const_value = None


def _largest_first(graph: ir.Graph, places: Mapping[str, tuple[int, int]]) -> None:
    """Put the node with the largest matrix of a file in front of all others: ONNX Runtime packs matrices in this order, but runs nodes in theirs.

    While it packs the largest one, which is then in memory twice, the others take no memory yet.
    """
    sizes = {name: size for name, (_, size) in places.items()}
    largest = max(
        graph, key=lambda node: max((sizes.get(each.name or "", 0) for each in node.inputs if each), default=0)
    )
    first = graph[0]
    if largest is not first:
        graph.remove(largest)
        graph.insert_before(first, largest)


@contextmanager
def _young_garbage() -> Iterator[None]:
    """Collect the garbage of this block at its end, and no older objects: a graph's many objects would else cause a collection of all
    objects, which takes 0.3 s after imports of torch and Transformers.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.collect(0)
        if enabled:
            gc.enable()
