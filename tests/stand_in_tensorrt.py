"""A stand-in for TensorRT on the CPU: the same calls, by address and shape, with ONNX Runtime computing.

It lets the TensorRT session's own logic (buckets, padding, slots, growth, masks) be tested where there is no GPU. What
TensorRT itself computes is not tested by it; tests/gpu does that.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch

from t5_trt.config import BuildConfig
from t5_trt.engine.profiles import Shapes, fixed_axes
from t5_trt.graph import build_graph
from t5_trt.runtime import trt_session
from t5_trt.runtime.trt_session import TrtSession

_TYPES = {"tensor(float)": np.float32, "tensor(int32)": np.int32, "tensor(int64)": np.int64}


class StandInEngine:
    """An ONNX graph with fixed shapes, loaded."""

    def __init__(self, plan: bytes) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(plan, options)
        self.io = [
            *((node, True) for node in self.session.get_inputs()),
            *((n, False) for n in self.session.get_outputs()),
        ]
        self.num_io_tensors = len(self.io)

    def get_tensor_name(self, index: int) -> str:
        return str(self.io[index][0].name)

    def get_tensor_mode(self, name: str) -> str:
        return "INPUT" if any(node.name == name and is_input for node, is_input in self.io) else "OUTPUT"


class StandInContext:
    """Addresses and a run."""

    def __init__(self, engine: StandInEngine) -> None:
        self.engine = engine
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        node = next(node for node, _ in self.engine.io if node.name == name)
        return tuple(node.shape) == shape

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def run(self) -> None:
        views = {}
        for node, _ in self.engine.io:
            dtype = np.dtype(_TYPES[node.type])
            count = int(np.prod(node.shape))
            memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(self.addresses[node.name])
            views[node.name] = np.frombuffer(memory, dtype=dtype).reshape(node.shape)
        names = [node.name for node, is_input in self.engine.io if not is_input]
        inputs = {node.name: views[node.name] for node, is_input in self.engine.io if is_input}
        for name, value in zip(names, self.engine.session.run(names, inputs), strict=True):
            views[name][...] = value


class StandInProvider:
    """Writes graphs as the real provider would, and remembers which were asked for."""

    precision = "fp32"

    def __init__(self, model: Any, settings: BuildConfig) -> None:
        self.arch = model.architecture
        self.settings = settings
        self.asked: list[tuple[str, Shapes]] = []
        self._weights = model.state_dict()

    def plan(self, graph: str, shapes: Shapes) -> bytes:
        self.asked.append((graph, shapes.for_graph(graph)))
        fixed = fixed_axes(shapes.for_graph(graph))
        model = build_graph(graph, self.arch, self._weights, ir.DataType.FLOAT, ir.DataType.INT32, fixed)
        return ir.to_proto(model).SerializeToString()

    def plans(self, wanted: Any) -> list[bytes]:
        return [self.plan(graph, shapes) for graph, shapes in wanted]


class _Graph:
    def __init__(self, work: Any) -> None:
        self.replay = work


def stand_in_session(model: Any, monkeypatch: Any, settings: BuildConfig | None = None, *, strict: bool = False) -> Any:
    """A `TrtSession` on the CPU for a model."""

    def record(work: Any, device: torch.device) -> _Graph:
        for _ in range(3):
            work()
        return _Graph(work)

    monkeypatch.setattr(trt_session, "record", record)
    api = SimpleNamespace(
        trt=SimpleNamespace(TensorIOMode=SimpleNamespace(INPUT="INPUT")),
        load_engine=StandInEngine,
        new_context=StandInContext,
        errors=lambda: "no reason",
    )
    provider: Any = StandInProvider(model, settings or BuildConfig())
    session: Any = TrtSession(provider, api, torch.device("cpu"), strict=strict)  # type: ignore[arg-type]
    session._enqueue = lambda context: context.run()
    return session
