"""Queries as the products hand them to attention (``put_query`` in ``common.cuh``) where that is ``tile_attention.cuh``'s."""

from __future__ import annotations

import math

import torch

LARGEST = {torch.float16: 65504.0, torch.bfloat16: math.inf}


def pack_query(query: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 [..., D]: of every eight columns, log2(e) times the query rounded to `dtype`, and behind that the rest likewise."""
    most, own = LARGEST[dtype], query * math.log2(math.e)
    rounded = own.clamp(-most, most).to(dtype)
    rest = (own - rounded.float()).clamp(-most, most).to(dtype)
    parts = torch.stack((rounded.unflatten(-1, (-1, 8)), rest.unflatten(-1, (-1, 8))), -2)
    return parts.flatten(-3).view(torch.float32)


def unpack_query(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `pack_query` was given, float64, less what two numbers of `dtype` cannot hold."""
    parts = packed.contiguous().view(dtype).double().unflatten(-1, (-1, 2, 8))
    return parts.sum(-2).flatten(-2) / math.log2(math.e)
