"""The ONNX graphs: valid, as declared in signature.py, with initializers named after the checkpoint's tensors."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch

from t5_trt.engine.profiles import Shapes, fixed_axes
from t5_trt.graph.build_graph import build_device_graph, build_host_graph
from t5_trt.graph.parameters import materialize, parameters
from t5_trt.graph.precision import REAL_TYPES, mask_value, real_type
from t5_trt.graph.signature import GRAPHS, INDEX, REAL, SINGLE, signature
from tests.conftest import ROOT, pair_of


def dims(value: Any) -> tuple[Any, ...]:
    return tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("precision", list(REAL_TYPES))
def test_graph_is_valid_and_as_declared(pair: tuple[Any, Any], graph: str, precision: str, tmp_path: Path) -> None:
    hugging_face, ours = pair
    weights, real = hugging_face.state_dict(), real_type(precision)
    model = build_host_graph(graph, ours.architecture, weights, real)
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
    assert (tmp_path / "model.onnx.data").stat().st_size > 10_000
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)

    proto = onnx.load(str(tmp_path / "model.onnx"))
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", 17)]
    declared = signature(graph, ours.architecture)
    types = {INDEX: onnx.TensorProto.INT64, REAL: int(real), SINGLE: onnx.TensorProto.FLOAT}
    for values, tensors in ((proto.graph.input, declared.inputs), (proto.graph.output, declared.outputs)):
        assert [v.name for v in values] == [t.name for t in tensors]
        for value, tensor in zip(values, tensors, strict=True):
            assert dims(value) == tensor.axes and value.type.tensor_type.elem_type == types[tensor.kind]
    for initializer in proto.graph.initializer:
        if not initializer.name.startswith("const_"):
            assert tuple(initializer.dims) == tuple(weights[initializer.name].shape)
        else:
            assert len(initializer.raw_data) < 4096


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("precision", list(REAL_TYPES))
def test_device_graph_is_flat_and_takes_the_weights(pair: tuple[Any, Any], graph: str, precision: str) -> None:
    _, ours = pair
    arch, fixed = ours.architecture, fixed_axes(Shapes(B=2, N=3, S=32, T=128, Q=8).for_graph(graph))
    model = ir.to_proto(build_device_graph(graph, arch, real_type(precision), fixed=fixed))
    onnx.checker.check_model(model, full_check=True)
    groups, declared = parameters(arch), signature(graph, arch, packed=True)
    names = [value.name for value in model.graph.input]
    assert names[: len(declared.inputs)] == [tensor.name for tensor in declared.inputs]
    assert [value.name for value in model.graph.output] == [tensor.name for tensor in declared.outputs]
    for value in (*model.graph.input, *model.graph.output):
        assert len(dims(value)) <= 2 and all(isinstance(size, int) for size in dims(value))
    weights = model.graph.input[len(declared.inputs) :]
    assert weights and all(dims(value) == groups[value.name].shape for value in weights)
    assert sum(len(i.raw_data) for i in model.graph.initializer) < 20_000


def test_every_tensor_of_the_checkpoint_is_in_one_group(pair: tuple[Any, Any]) -> None:
    hugging_face, ours = pair
    made = parameters(ours.architecture)
    used = {key for group in made.values() for key in (*group.parts, *filter(None, [group.norm]))}
    tensors = {tensor.data_ptr(): key for key, tensor in hugging_face.state_dict().items()}
    assert {hugging_face.state_dict()[key].data_ptr() for key in used} == set(tensors)


def test_materialized_group(v11: tuple[Any, Any]) -> None:
    hugging_face, ours = v11
    weights, name = hugging_face.state_dict(), "decoder.block.1.layer.0.SelfAttention.qkv"
    made = materialize(parameters(ours.architecture)[name], weights, torch.float32, torch.device("cpu"))
    stream = torch.randn(5, ours.architecture.d_model)
    norm = weights["decoder.block.1.layer.0.layer_norm.weight"]
    parts = [weights[f"decoder.block.1.layer.0.SelfAttention.{part}.weight"] for part in "qkv"]
    expected = torch.cat([(stream * norm) @ part.T for part in parts], dim=1)
    assert made.is_contiguous()
    torch.testing.assert_close(stream @ made, expected, atol=1e-4, rtol=1e-5)


def test_external_data_holds_the_weights(v11: tuple[Any, Any], tmp_path: Path) -> None:
    hugging_face, ours = v11
    model = build_host_graph("encoder", ours.architecture, hugging_face.state_dict(), ir.DataType.FLOAT)
    ir.save(model, tmp_path / "encoder.onnx", external_data="encoder.onnx.data")
    loaded = {i.name: i for i in onnx.load(str(tmp_path / "encoder.onnx")).graph.initializer}
    key = "encoder.block.1.layer.1.DenseReluDense.wi_0.weight"
    assert torch.equal(torch.from_numpy(onnx.numpy_helper.to_array(loaded[key])), hugging_face.state_dict()[key])


def test_same_bytes_in_every_process(v10: tuple[Any, Any]) -> None:
    """Names must not depend on Python's hash seed: engines are found again by what the graph says."""
    code = "from tests.graph.test_graphs import digests; print(*digests())"
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    environment = {"PYTHONHASHSEED": seed, "PATH": "", "PYTHONPATH": ":".join(filter(None, sys.path))}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == digests()


def digests() -> list[str]:
    """Of a graph of each form."""
    hugging_face, ours = pair_of("t5-v1.0")
    host = build_host_graph("decoder_queries", ours.architecture, hugging_face.state_dict(), ir.DataType.FLOAT)
    device = build_device_graph("decoder_queries", ours.architecture, ir.DataType.FLOAT)
    texts = [ir.to_proto(graph).SerializeToString(deterministic=True) for graph in (host, device)]
    return [hashlib.sha256(text).hexdigest() for text in texts]


def test_mask_values_survive_an_addition() -> None:
    for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)):
        hidden = torch.tensor(mask_value(real_type(name)), dtype=dtype) + torch.tensor(-300.0, dtype=dtype)
        assert hidden.isfinite() and (hidden * 1.4426950).isfinite()
