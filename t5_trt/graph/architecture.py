"""The architecture of a T5-family model: sizes, activation, bias and head variants. `t5_trt.checkpoint.families` reads it from a config.

This module does not import torch, because build processes import it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

ACTIVATIONS = ("relu", "gelu_new", "gelu", "silu")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Every size and switch that the graphs depend on.

    Attributes:
        vocab_size: V, the rows of the embedding (not of the tokenizer).
        d_model: E. d_kv: D, which need not be d_model / num_heads. num_heads: H. d_ff: inner feed-forward size.
        encoder_layers, decoder_layers: may differ; an encoder-only model has 0 decoder layers.
        num_buckets, max_distance: of the relative position bias.
        activation: one of `ACTIVATIONS`. gated: whether the feed-forward has two input matrices.
        epsilon: of every RMSNorm.
        tied_head: the output matrix is the embedding. output_scale: factor on the decoder's output before it.
        bias_per_layer: every layer has its own relative bias table (UMT5) instead of sharing the first layer's.
        wide_stream: residual streams are float32 whatever the compute type (`t5_trt.graph.fp16_scaling`).
        stream_factor: factor on the embedding, and so on both residual streams, that keeps half precision in range.
            It changes no result: every stream goes through an RMSNorm, whose epsilon is multiplied by its square.
        branch_factors: module name of an ``o``, a ``wo`` or the head ("lm_head") -> factor in its matrix that keeps half
            precision in range; 1 if not named. Graphs divide by it (and multiply by `stream_factor`) in float32, except for the
            head: their logits are multiplied by its factor.
    """

    vocab_size: int
    d_model: int
    d_kv: int
    num_heads: int
    d_ff: int
    encoder_layers: int
    decoder_layers: int
    num_buckets: int
    max_distance: int
    activation: str
    gated: bool
    epsilon: float
    tied_head: bool
    output_scale: float
    bias_per_layer: bool
    wide_stream: bool = False
    stream_factor: float = 1.0
    branch_factors: Mapping[str, float] = field(default_factory=dict, hash=False)

    @property
    def head_weight(self) -> str:
        """State-dict key of the output matrix [V, E]."""
        return "shared.weight" if self.tied_head else "lm_head.weight"

    @property
    def longest_source(self) -> int | None:
        """The largest number of source tokens that the relative bias is defined for; None for no limit."""
        return self._longest(bidirectional=True)

    @property
    def longest_target(self) -> int | None:
        """The largest number of decoder tokens that the relative bias is defined for; None for no limit."""
        return self._longest(bidirectional=False)

    def _longest(self, *, bidirectional: bool) -> int | None:
        from t5_trt.graph.relative_positions import (
            longest_sequence,
        )  # imported here because it needs torch, which build processes do not load

        return longest_sequence(self.num_buckets, self.max_distance, bidirectional=bidirectional)

    def bias_weight(self, stack: str, layer: int) -> str:
        """State-dict key of the relative bias table [buckets, H] that a layer of "encoder" or "decoder" uses."""
        owner = layer if self.bias_per_layer else 0
        return f"{stack}.block.{owner}.layer.0.SelfAttention.relative_attention_bias.weight"
