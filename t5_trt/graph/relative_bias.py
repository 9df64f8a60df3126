"""T5's relative position bias as graph nodes: distance -> bucket -> row of the checkpoint's table.

The bucket of a distance (Raffel et al. 2020, section 2.1; Mesh TensorFlow's transformer_layers.py) no longer changes
from max_distance on. A table over 0..max_distance with clipped distances therefore serves sequences of any length.
"""

from __future__ import annotations

import math

import onnx_ir as ir
import torch

from t5_trt.graph.forms import Form


def distance_buckets(num_buckets: int, max_distance: int, *, bidirectional: bool) -> torch.Tensor:
    """The bucket of every clipped distance.

    Args:
        num_buckets: rows of the bias table.
        max_distance: distance from which all positions share a bucket.
        bidirectional: the encoder's form, where keys after the query have buckets of their own.

    Returns:
        int64. Bidirectional: [2 * max_distance + 1], the bucket of key - query = index - max_distance.
        Otherwise: [max_distance + 1], the bucket of query - key = index.
    """
    if bidirectional:
        relative = torch.arange(-max_distance, max_distance + 1)
        num_buckets //= 2
        offset, distance = (relative > 0).long() * num_buckets, relative.abs()
    else:
        distance = torch.arange(max_distance + 1)
        offset = torch.zeros_like(distance)
    exact = num_buckets // 2
    # float32 and the same order of operations as Transformers: a bucket's edge must fall on the same distance
    growth = torch.log(distance.float() / exact) / math.log(max_distance / exact) * (num_buckets - exact)
    far = (exact + growth.clamp(min=0).long()).clamp(max=num_buckets - 1)
    return offset + torch.where(distance < exact, distance, far)


class RelativeBias:
    """Gathers bias values in a graph.

    Args:
        graph: to add nodes to.
        buckets: what `distance_buckets` returned.
    """

    def __init__(self, graph: Form, buckets: torch.Tensor) -> None:
        self._graph = graph
        self._buckets = graph.constant(buckets.numpy(), ir.DataType.INT64)
        self._bucketed: dict[ir.Value, ir.Value] = {}

    def rows(self, table: str, index: ir.Value) -> ir.Value:
        """Bias of each entry of `index` [...] (clipped positions in the bucket list): [..., H]."""
        if index not in self._bucketed:
            self._bucketed[index] = self._graph.op("Gather", self._buckets, index, axis=0)
        return self._graph.op("Gather", self._graph.parameter(table), self._bucketed[index], axis=0)
