"""A stand-in for TensorRT on the CPU: the same calls, by address and shape, with ONNX Runtime computing.

It lets the TensorRT session's own logic (buckets, padding, slots, growth, masks) be tested where there is no GPU. What
TensorRT itself computes is not tested by it; tests/gpu does that.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch

from t5_trt.config import BuildConfig
from t5_trt.engine.profiles import Shapes, fixed_axes
from t5_trt.graph.architecture import Architecture
from t5_trt.graph.build_graph import build_device_graph
from t5_trt.graph.fp16_scaling import Fp16Scaling
from t5_trt.graph.int8 import quantize_for_device
from t5_trt.graph.precision import real_type
from t5_trt.runtime import captured_encoder, engine_step, tensorrt_encoder, weight_updates
from t5_trt.runtime.tensorrt_session import TrtSession
from tests.torch_graph import TorchGraph

_TYPES = {"tensor(float)": np.float32, "tensor(int32)": np.int32, "tensor(int64)": np.int64}


class StandInEngine:
    """An ONNX graph, loaded."""

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

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        node = next(node for node, _ in self.io if node.name == name)
        return tuple(-1 if isinstance(size, str) else size for size in node.shape)

    def get_tensor_mode(self, name: str) -> str:
        return "INPUT" if any(node.name == name and is_input for node, is_input in self.io) else "OUTPUT"


class StandInContext:
    """Addresses and a run."""

    def __init__(self, engine: StandInEngine) -> None:
        self.engine = engine
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        declared = self.engine.get_tensor_shape(name)
        self.shapes[name] = shape
        return len(shape) == len(declared) and all(a in (b, -1) for b, a in zip(shape, declared, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def run(self) -> None:
        inputs = {
            node.name: self.memory(node, self.shapes.get(node.name) or tuple(node.shape))
            for node, is_input in self.engine.io
            if is_input
        }
        outputs = [node for node, is_input in self.engine.io if not is_input]
        for node, value in zip(outputs, self.engine.session.run([n.name for n in outputs], inputs), strict=True):
            self.memory(node, value.shape)[...] = value

    def memory(self, node: Any, shape: tuple[int, ...]) -> Any:
        dtype = np.dtype(_TYPES[node.type])
        memory = (ctypes.c_char * (int(np.prod(shape)) * dtype.itemsize)).from_address(self.addresses[node.name])
        return np.frombuffer(memory, dtype=dtype).reshape(shape)


class HalfEngine:
    """A graph in half precision, computed by torch node by node."""

    def __init__(self, plan: bytes) -> None:
        self.graph = TorchGraph(ir.from_proto(onnx.ModelProto.FromString(plan)))
        self._names = [*self.graph.inputs, *self.graph.outputs]
        self.num_io_tensors = len(self._names)

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self.graph.inputs | self.graph.outputs)[name][1]

    def get_tensor_mode(self, name: str) -> str:
        return "INPUT" if name in self.graph.inputs else "OUTPUT"


class HalfContext:
    """Addresses and a run of a `HalfEngine`."""

    def __init__(self, engine: HalfEngine) -> None:
        self.engine = engine
        self.addresses: dict[str, int] = {}

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def run(self) -> None:
        graph = self.engine.graph
        results = graph.run({name: self.memory(name, *kind) for name, kind in graph.inputs.items()})
        for name, kind in graph.outputs.items():
            self.memory(name, *kind).copy_(results[name])

    def memory(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        size = int(np.prod(shape)) * dtype.itemsize
        return torch.frombuffer((ctypes.c_char * size).from_address(self.addresses[name]), dtype=dtype).reshape(shape)


class StandInProvider:
    """Writes graphs as the real provider would, and remembers which were asked for."""

    def __init__(self, arch: Architecture, settings: BuildConfig, precision: str, quantized: Any = None) -> None:
        self.arch = arch
        self.quantized = quantized
        self.precision = precision
        self.settings = settings
        self.asked: list[tuple[str, Shapes]] = []
        self.discarded: list[tuple[str, Shapes]] = []
        self.kept: dict[tuple[str, Shapes], dict[str, float]] = {}

    def plan(self, graph: str, shapes: Shapes) -> bytes:
        self.asked.append((graph, shapes.for_graph(graph)))
        fixed = fixed_axes(shapes.for_graph(graph))
        model = build_device_graph(graph, self.arch, real_type(self.precision), fixed=fixed, quantized=self.quantized)
        return ir.to_proto(model).SerializeToString()

    def debug_plan(self, graph: str, shapes: Shapes) -> bytes:
        fixed = fixed_axes(shapes.for_graph(graph))
        return ir.to_proto(
            build_device_graph(graph, self.arch, real_type(self.precision), fixed=fixed, debug_outputs=True)
        ).SerializeToString()

    def has(self, graph: str, shapes: Shapes) -> bool:
        return (graph, shapes) in self.asked

    def pop_unchecked(self, graph: str, shapes: Shapes) -> bool:
        return True

    def discard(self, graph: str, shapes: Shapes) -> None:
        self.discarded.append((graph, shapes))

    def times(self, graph: str, shapes: Shapes) -> dict[str, float] | None:
        return self.kept.get((graph, shapes))

    def keep_times(self, graph: str, shapes: Shapes, times: dict[str, float]) -> None:
        self.kept[graph, shapes] = times

    def plans(self, wanted: Any) -> list[bytes]:
        return [self.plan(graph, shapes) for graph, shapes in wanted]


class _Graph:
    def __init__(self, work: Any) -> None:
        self.replay = work


def stand_in_session(
    model: Any,
    monkeypatch: Any,
    settings: BuildConfig | None = None,
    *,
    strict: bool = False,
    reference: Any = None,
    precision: str = "fp32",
    scaling: Fp16Scaling | None = None,
    kernels: Any = None,
    own_encoder: Any = None,
    background: bool = False,
) -> Any:
    """A `TrtSession` on the CPU for a model; arguments as of that class."""

    def capture(work: Any, device: torch.device, memory: Any = None, *, draws: bool = True) -> _Graph:
        with torch.random.fork_rng([]):
            for _ in range(3):
                work()
        return _Graph(work)

    for module in (captured_encoder, engine_step, tensorrt_encoder, weight_updates):
        monkeypatch.setattr(module, "capture", capture)
    api = SimpleNamespace(
        trt=SimpleNamespace(TensorIOMode=SimpleNamespace(INPUT="INPUT")),
        load_engine=StandInEngine if precision == "fp32" else HalfEngine,
        new_context=StandInContext if precision == "fp32" else HalfContext,
        errors=lambda: "no reason",
        version="0.0",
    )
    arch = model.architecture
    arch = (scaling or Fp16Scaling()).architecture(arch)
    folded = scaling or Fp16Scaling()
    weights = model._runner._adapted or model.state_dict()
    quantized = dict(quantize_for_device(arch, weights, folded)) if precision == "int8" else None
    provider: Any = StandInProvider(arch, settings or BuildConfig(), precision, quantized)
    device: Any = torch.device("cpu")
    session: Any = TrtSession(
        provider,
        weights,
        api,  # type: ignore[arg-type]
        device,
        strict=strict,
        reference=reference,
        scaling=scaling,
        kernels=kernels,
        own_encoder=own_encoder,
        background=background,
    )
    session.engines.enqueue = lambda context: context.run()
    session.stand_in = provider  # for tests that look at what was asked for
    return session
