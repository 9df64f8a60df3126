"""Opening ONNX Runtime's session of a graph over weights in memory or in a file."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import onnx_ir as ir

from t5_trt.runtime.tensor_file import StoredTensors

#: smaller tensors are embedded in the ONNX model, where graph optimizers can read their values
SHARED_FROM_BYTES = 1 << 16


def open_graph(ort: Any, model: ir.Model, options: Any, shared: dict[str, Any], stored: Any = None) -> Any:
    """Open a session.

    Args:
        ort: the module onnxruntime.
        model: its initializers are replaced by names of where ONNX Runtime finds them.
        options: of the session; changed.
        shared: name -> OrtValue over the memory of an initializer, for all sessions of a model; filled up.
        stored: `StoredTensors` has tensors that ONNX Runtime reads from their file and packs one after the other, so that
            neither the file nor two copies are in memory.
    """
    places = stored.places() if isinstance(stored, StoredTensors) else {}
    with tempfile.TemporaryDirectory(prefix="t5_trt-") as temporary:
        # The model only names what lies in memory, but ONNX Runtime wants the named file to exist.
        dummy = Path(temporary) / "weights"
        dummy.write_bytes(bytes(16))
        file = stored.path if places else dummy
        for value in list(model.graph.initializers.values()):
            assert value.name is not None and value.const_value is not None
            tensor = value.const_value
            if tensor.nbytes < SHARED_FROM_BYTES:
                continue
            offset, length = places.get(value.name, (0, None))
            if length is None:
                if value.name not in shared:
                    shared[value.name] = ort.OrtValue.ortvalue_from_numpy(tensor.numpy())
                options.add_initializer(value.name, shared[value.name])
            shape = ir.Shape(tensor.shape.numpy())
            value.const_value = ir.ExternalTensor(
                file.name, offset, length, tensor.dtype, shape=shape, name=value.name
            )
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(file.parent))
        return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
