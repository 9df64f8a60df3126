"""T5's relative position bias as graph nodes: distance -> bucket -> row of the checkpoint's table.

Beyond some distance the bucket is constant, so a table up to that distance with clipped distances serves sequences of any
length.
"""

from __future__ import annotations

import onnx_ir as ir

from t5_trt.graph.builders import T5GraphBuilder
from t5_trt.graph.relative_positions import distance_buckets


class RelativeBias:
    """Gathers bias values in a graph.

    Args:
        graph: to add nodes to.
        bidirectional: the encoder's buckets instead of the decoder's.

    Attributes:
        limit: the longest distance in the bucket list.
    """

    def __init__(self, graph: T5GraphBuilder, *, bidirectional: bool) -> None:
        self._graph, arch = graph, graph.arch
        buckets = distance_buckets(arch.num_buckets, arch.max_distance, bidirectional=bidirectional)
        self.limit = len(buckets) // 2 if bidirectional else len(buckets) - 1
        self._buckets = graph.constant(buckets.numpy(), ir.DataType.INT64)
        self._bucketed: dict[ir.Value, ir.Value] = {}

    def rows(self, table: str, index: ir.Value) -> ir.Value:
        """Bias of each entry of `index` [...] (clipped positions in the bucket list): [..., H]."""
        if index not in self._bucketed:
            self._bucketed[index] = self._graph.op("Gather", self._buckets, index, axis=0)
        return self._graph.op("Gather", self._graph.parameter(table), self._bucketed[index], axis=0)
