"""T5's relative positions: which row of the bias table a distance between two tokens uses.

Raffel et al. 2020, section 2.1; Mesh TensorFlow's transformer_layers.py. Results equal those of Transformers for every
setting, also where max_distance is smaller than the distances that have a bucket of their own.
"""

from __future__ import annotations

import math
from functools import cache

import torch

#: longer distances are not tabulated: attention over so many tokens does not fit into memory
_LONGEST_TABLE = 2**20


def distance_buckets(num_buckets: int, max_distance: int, *, bidirectional: bool) -> torch.Tensor:
    """The bucket of every distance, up to the last one that needs an entry of its own.

    Args:
        num_buckets: rows of the bias table; at least 4, and at least 2 if not bidirectional.
        max_distance: distance from which all positions share a bucket.
        bidirectional: the encoder's form, where keys after the query have buckets of their own.

    Returns:
        int64. Bidirectional: [2 * n + 1], the bucket of key - query = index - n.
        Otherwise: [n + 1], the bucket of query - key = index.
    """
    if not bidirectional:
        return _one_sided(num_buckets, max_distance)
    after = num_buckets // 2
    buckets = _one_sided(after, max_distance)
    return torch.cat([buckets.flip(0), buckets[1:] + after])


@cache
def longest_sequence(num_buckets: int, max_distance: int, *, bidirectional: bool) -> int | None:
    """The largest number of tokens whose distances all have a bucket; None if any number has.

    Transformers fails with an IndexError for longer ones.
    """
    count = num_buckets // 2 if bidirectional else num_buckets
    buckets = _one_sided(count, max_distance)
    return None if buckets[-1] == count - 1 and max_distance > count // 2 else len(buckets)


def _one_sided(num_buckets: int, max_distance: int) -> torch.Tensor:
    """The buckets of distances 0, 1, ..., until they are constant or leave the table."""
    exact = num_buckets // 2
    if max_distance == exact:  # for larger distances the formula divides by log(1)
        return torch.arange(exact)
    distance = torch.arange(1 + (min(max_distance, _LONGEST_TABLE) if max_distance > exact else _LONGEST_TABLE))
    # float32 and the same order of operations as Transformers: a bucket's edge must fall on the same distance
    growth = torch.log(distance.float() / exact) / math.log(max_distance / exact) * (num_buckets - exact)
    far = (exact + growth.long()).clamp(max=num_buckets - 1)
    buckets = torch.where(distance < exact, distance, far)
    return buckets[: int(torch.where(buckets < 0, distance, len(distance)).min())]
