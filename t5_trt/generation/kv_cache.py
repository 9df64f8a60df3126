"""The engines' K/V cache behind Hugging Face's cache interface, and the bridge to and from its cache classes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import Cache, DynamicCache, EncoderDecoderCache

from t5_trt.compat import CACHE
from t5_trt.errors import InputError
from t5_trt.runtime.kv_buffers import CrossStates, DecoderState

#: attributes that hold the contents of a Hugging Face cache
_CONTENTS = ("self_attention_cache", "cross_attention_cache", "is_updated")


class EngineCache(EncoderDecoderCache):
    """The cache while an engine decodes: a view on one request's `DecoderState`.

    The first forward call fills it. Reordering, cropping and selecting rows work as in the Hugging Face class. Code that reads the
    contents (a Hugging Face model, iteration, pickling) converts it into an ordinary `EncoderDecoderCache` in place: everyone who
    holds it, this library included, sees later writes.

    Args:
        layers: L, decoder layers.
        capacity_tokens: expected final length; the buffer grows if it is exceeded.
    """

    def __init__(self, layers: int, capacity_tokens: int = 0) -> None:
        self.layers_count = layers
        self.capacity_tokens = capacity_tokens
        self.state: DecoderState | None = None
        #: dtype of K/V that are handed out; None for the state's
        self.dtype: torch.dtype | None = None
        #: the mask tensor, and its version, that the state's cross bias was made from
        self.mask_source: tuple[torch.Tensor | None, int] | None = None

    def __getattr__(self, name: str) -> Any:
        if name not in _CONTENTS:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        contents = self.as_hugging_face()
        for own in ("layers_count", "capacity_tokens", "state", "dtype", "mask_source"):
            self.__dict__.pop(own, None)
        self.__class__ = EncoderDecoderCache  # type: ignore[assignment]
        self.__dict__.update({each: getattr(contents, each) for each in _CONTENTS})
        return self.__dict__[name]

    def __deepcopy__(self, memo: dict[int, Any]) -> EngineCache:
        """An independent copy that engines decode with."""
        other = EngineCache(self.layers_count)
        other.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled as an ordinary cache."""
        return EncoderDecoderCache, (self.self_attention_cache, self.cross_attention_cache)

    def as_hugging_face(self) -> EncoderDecoderCache:
        """An ordinary `EncoderDecoderCache` of `DynamicCache`s with copies of the K/V, R rows each."""
        own, cross = DynamicCache(), DynamicCache()
        if self.state is not None:
            state = self.state
            state.materialize()
            for layer in range(self.layers_count):
                key, value = state.kv[layer, :, : state.rows, :, : state.length].to(self.dtype, copy=True)
                own.update(key, value, layer)
                cross.update(*_cross_rows(state, layer).to(self.dtype), layer)
        return EncoderDecoderCache(own, cross)

    def __len__(self) -> int:
        return self.layers_count

    def __repr__(self) -> str:
        if self.state is None:
            return f"EngineCache(layers={self.layers_count}, empty)"
        return f"EngineCache(layers={self.layers_count}, rows={self.state.rows}, tokens={self.state.length})"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens in the cache."""
        return 0 if self.state is None else self.state.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: the cache grows."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Keys that a query attends to, and their offset."""
        return self.get_seq_length() + query_length, 0

    def reset(self) -> None:
        """Drop all contents."""
        self.state, self.mask_source = None, None

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i continues row ``beam_idx[i]``."""
        if self.state is not None:
            cross = self.state.cross
            self.state.reorder(beam_idx)
            if self.state.cross is not cross:  # rows now have other sources
                self.mask_source = None

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens from the end (a negative count), or keep that many (a positive one), as Hugging Face's cache does."""
        if self.state is None or tokens_to_remove == 0:
            return
        length = self.state.length
        kept = length + tokens_to_remove if tokens_to_remove < 0 else min(tokens_to_remove, length)
        self.state.crop(max(kept, 0))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self.state is not None:
            self._select(torch.arange(self.state.rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows that `indices` names, in its order."""
        if self.state is not None:
            self._select(torch.arange(self.state.rows)[indices.cpu() if isinstance(indices, torch.Tensor) else indices])

    def _select(self, rows: torch.Tensor) -> None:
        assert self.state is not None
        self.state, self.mask_source = self.state.select(rows), None

    @property
    def is_sliding(self) -> list[bool]:
        """No layer slides."""
        return [False] * self.layers_count

    @property
    def is_linear(self) -> list[bool]:
        """No layer has linear attention."""
        return [False] * self.layers_count

    @property
    def is_dummy(self) -> list[bool]:
        """Every layer has keys and values."""
        return [False] * self.layers_count

    @property
    def is_compileable(self) -> bool:
        """False: the forward pass is an engine; torch.compile has nothing to compile."""
        return False

    @property
    def is_croppable(self) -> bool:
        """True: assisted generation may remove tokens."""
        return True

    def activate_past_recording(self) -> None:
        """Do nothing: the past is always kept."""


def read_hugging_face(
    cache: Cache, layers: int, dtype: torch.dtype, device: torch.device
) -> tuple[Any, CrossStates | None]:
    """Copy the contents of a Hugging Face cache.

    Args:
        cache: an `EncoderDecoderCache`, or a plain self-attention cache.
        layers: L of the decoder.
        dtype: of the result.
        device: of the result.

    Returns:
        Self-attention K/V [L, 2, R, H, length, D] (None if the cache is empty), and cross-attention K/V (None if the
        cache has none).

    Raises:
        InputError: the cache has another number of layers than the decoder.
    """
    both = isinstance(cache, EncoderDecoderCache)
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    length = int(own.get_seq_length())
    states = _stack(own, layers, length, dtype, device) if length else None
    cross = None
    if both and len(cache.is_updated) and all(cache.is_updated.values()):
        across = cache.cross_attention_cache
        cross = CrossStates(_stack(across, layers, int(across.get_seq_length()), dtype, device))
    return states, cross


def append_to_hugging_face(cache: Cache, source: EngineCache, tokens: int) -> None:
    """Append the last tokens of an engine's cache to a Hugging Face one, and the cross-attention K/V where it has none yet."""
    state, dtype = source.state, source.dtype
    assert state is not None
    state.materialize()
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    for layer in range(len(state.kv)):
        key, value = state.kv[layer, :, : state.rows, :, state.length - tokens : state.length].to(dtype, copy=True)
        own.update(key, value, layer)
        if isinstance(cache, EncoderDecoderCache) and not cache.is_updated.get(layer):
            cache.cross_attention_cache.update(*_cross_rows(state, layer).to(dtype), layer)
            cache.is_updated[layer] = True


def _cross_rows(state: DecoderState, layer: int) -> torch.Tensor:
    """K and V [2, R, H, S, D] of one layer's sources, once per decoder row and without padding."""
    cross = state.cross
    return cross.kv[layer, :, : cross.batch, :, : cross.source_length].repeat_interleave(cross.beams, dim=1)


def _stack(cache: Cache, layers: int, length: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if len(cache.layers) != layers:
        raise InputError(
            f"{CACHE} holds {len(cache.layers)} layers; the decoder has {layers}. Pass {CACHE}=None and use "
            "the cache that forward() returns."
        )
    pairs = [torch.stack((entry.keys[:, :, :length], entry.values[:, :, :length])) for entry in cache.layers]
    return torch.stack(pairs).to(device=device, dtype=dtype)
