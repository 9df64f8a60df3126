"""Write T5's encoder and decoder as ONNX graphs (opset 17), straight from config and weights.

The results are `onnx_ir.Model` objects, which sessions load or engines are built from.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx_ir as ir

from t5_trt.graph.architecture import Architecture
from t5_trt.graph.builders import DeviceGraphBuilder, HostGraphBuilder, T5GraphBuilder
from t5_trt.graph.decoder import build_decoder
from t5_trt.graph.encoder import build_cross, build_encoder
from t5_trt.graph.fused_step import build_fused_step
from t5_trt.graph.int4 import Int4HostGraphBuilder, has_4_bits
from t5_trt.graph.int8 import Int8DeviceGraphBuilder, Int8HostGraphBuilder
from t5_trt.graph.parameters import Weights
from t5_trt.graph.signature import CROSS, ENCODER, ENCODER_EMBEDS, QUERIES, STEP

__all__ = ["build_device_graph", "build_host_graph"]


def build_host_graph(
    graph: str,
    arch: Architecture,
    weights: Weights,
    real: ir.DataType,
    index: ir.DataType = ir.DataType.INT64,
    fixed: Mapping[str, int] | None = None,
    *,
    quantized: Weights | None = None,
    inputs: Collection[str] = (),
    debug_outputs: bool = False,
    fused: bool = False,
) -> ir.Model:
    """Write one of `t5_trt.graph.signature.GRAPHS` with the weights as initializers.

    Args:
        graph: its name.
        arch: of the model.
        weights: state-dict key -> CPU tensor, read only when the model is saved or bound.
        real: compute type of weights and activations.
        index: type of ids, positions and masks.
        fixed: axis letter of `t5_trt.graph.signature` -> size, for axes of fixed size.
        quantized: matrices in 8 bits or fewer, see `t5_trt.graph.int8.quantize` and `t5_trt.graph.int4.quantize_to_4_bits`; the compute type of everything else is then float32.
        inputs: names of weights that are inputs instead of initializers.
        debug_outputs: also output the residual stream after every block, named "encoder.block.0" and so on.
        fused: write the decoder step in operators of ONNX Runtime's own; see `t5_trt.graph.fused_step`. It has no debug outputs.
    """
    if quantized is None:
        form = HostGraphBuilder(graph, arch, weights, real, index, fixed, inputs)
    else:
        rounded = Int4HostGraphBuilder if has_4_bits(quantized) else Int8HostGraphBuilder
        form = rounded(graph, arch, weights, quantized, inputs)
    if fused:
        assert graph == STEP
        return build_fused_step(form)
    return _build(graph, form, debug_outputs)


def build_device_graph(
    graph: str,
    arch: Architecture,
    real: ir.DataType,
    index: ir.DataType = ir.DataType.INT32,
    fixed: Mapping[str, int] | None = None,
    *,
    quantized: Weights | None = None,
    debug_outputs: bool = False,
) -> ir.Model:
    """Write one of `t5_trt.graph.signature.GRAPHS` with the weights as inputs, named as in `t5_trt.graph.parameters`.

    Arguments as for `build_host_graph`, except `quantized`: matrices of `t5_trt.graph.int8.quantize_for_device`, stored in the graph.
    """
    if quantized is not None:
        return _build(graph, Int8DeviceGraphBuilder(graph, arch, real, quantized, fixed), debug_outputs)
    return _build(graph, DeviceGraphBuilder(graph, arch, real, index, fixed), debug_outputs)


def _build(graph: str, form: T5GraphBuilder, debug_outputs: bool) -> ir.Model:
    if debug_outputs:
        form.add_debug_outputs()
    if graph in (ENCODER, ENCODER_EMBEDS):
        return build_encoder(form, embeds=graph == ENCODER_EMBEDS)
    if graph == CROSS:
        return build_cross(form)
    if graph in (STEP, QUERIES):
        return build_decoder(form, queries=graph == QUERIES)
    raise KeyError(graph)
