"""Small Hugging Face models of every supported kind, with random weights whose logits are spread out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

VOCAB = 211
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": 64, "d_ff": 96, "d_kv": 16, "num_heads": 4, "num_layers": 2,
    "decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A Hugging Face class, its config and the options that make this kind of T5."""

    model: Callable[[Any], Any]
    config: Callable[..., Any]
    options: dict[str, Any]
    tied: bool = False


KINDS = {
    "t5-v1.0": Kind(T5ForConditionalGeneration, T5Config, {"feed_forward_proj": "relu"}, tied=True),
    "t5-v1.1": Kind(
        T5ForConditionalGeneration, T5Config, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    ),
    # d_kv * num_heads != d_model, as in mT5-small
    "mt5": Kind(
        MT5ForConditionalGeneration, MT5Config, {"feed_forward_proj": "gated-gelu", "d_kv": 24, "num_heads": 3}
    ),
    # an encoder three times as deep as the decoder, as in ByT5
    "byt5": Kind(
        T5ForConditionalGeneration,
        T5Config,
        {"feed_forward_proj": "gated-gelu", "num_layers": 3, "num_decoder_layers": 1, "tie_word_embeddings": False},
    ),
    "umt5": Kind(UMT5ForConditionalGeneration, UMT5Config, {"feed_forward_proj": "gated-gelu"}),
    "ul2": Kind(
        T5ForConditionalGeneration, T5Config, {"feed_forward_proj": "gated-silu", "tie_word_embeddings": False}
    ),
    "few-buckets": Kind(
        T5ForConditionalGeneration,
        T5Config,
        {"feed_forward_proj": "gelu", "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20},
        tied=True,
    ),
}


def make_hugging_face(kind: str, seed: int = 0, attention: str | None = None, **changes: Any) -> Any:
    """A Hugging Face float32 model in evaluation mode.

    UMT5 gets eager attention: the sdpa path of its decoder is not causal in Transformers 5.17 (later versions mend it).
    """
    entry = KINDS[kind]
    torch.manual_seed(seed)
    config = entry.config(**{**SIZES, **entry.options, **changes})
    config._attn_implementation = attention or ("eager" if kind == "umt5" else None)
    model = entry.model(config).eval()
    if not entry.tied:
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:  # smaller where products or the logits follow: they blow up rounding differences
                small = name.endswith((".q.weight", ".k.weight", "wi_1.weight", "lm_head.weight"))
                parameter.normal_(0, 0.12 if small else 0.2)
            else:
                parameter.uniform_(0.5, 1.5)
            if "relative_attention_bias" in name:
                parameter.normal_(0, 1.0)
    if getattr(model.config, "scale_decoder_outputs", False) or kind == "umt5":
        with torch.no_grad():  # the scaled head makes logits small: spread them out
            model.decoder.final_layer_norm.weight.mul_(8.0)
    return model


#: by what the matrices of the feed-forward layers are multiplied, inner and output, until float16 overflows: in the stream, which
#: the Hugging Face class cuts off at 65504, or inside a layer, where it gets NaN
FACTORS = ((30.0, 1e3), (100.0, 1e4), (3e4, 1.0), (3e4, 0.01))


def swollen(hugging_face: Any, inner: float, output: float) -> Any:
    """The same model with feed-forward layers of very large values."""
    with torch.no_grad():
        for name, parameter in hugging_face.named_parameters():
            if name.endswith(".wo.weight"):
                parameter.mul_(output)
            elif name.endswith(("wi_1.weight", ".wi.weight")):
                parameter.mul_(inner)
    return hugging_face


def large_logits(hugging_face: Any, factor: float) -> Any:
    """The same model with an embedding and a head (often one tensor) that are larger by a factor."""
    with torch.no_grad():
        for matrix in {hugging_face.shared.weight, hugging_face.lm_head.weight}:
            matrix.mul_(factor)
    return hugging_face


def batch(rows: int = 3, tokens: int = 11, seed: int = 5, *, padding: str = "both") -> dict[str, torch.Tensor]:
    """Random ids [rows, tokens] with padding on the "right", the "left", on "both" sides or "none"."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCAB, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        if padding in ("right", "both") and row % 2 == 1:
            mask[row, tokens - 2 - row :] = 0
        if padding in ("left", "both") and row % 2 == 0:
            mask[row, : 1 + row] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def tokens(rows: int, count: int, seed: int = 7) -> torch.Tensor:
    return torch.randint(2, VOCAB, (rows, count), generator=torch.Generator().manual_seed(seed))
