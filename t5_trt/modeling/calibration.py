"""The largest activations that some inputs cause, measured on the Hugging Face model in float32."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from t5_trt.checkpoint.tokenizing import Batch
from t5_trt.graph.fp16_scaling import Ranges
from t5_trt.graph.parameters import LM_HEAD

_BATCH_SIZE, _NEW_TOKENS = 8, 32


def observe(model: Any, batches: Iterable[Batch], max_new_tokens: int = _NEW_TOKENS) -> Ranges:
    """Generate for some batches and record how large activations become.

    Args:
        model: a Hugging Face T5, MT5 or UMT5, float32.
        batches: of ``input_ids`` and ``attention_mask``, int64 [B, S].
        max_new_tokens: greedy tokens for each source.
    """
    with _watched(model) as seen, torch.no_grad():
        for batch in batches:
            if model.can_generate():
                model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
            else:
                model(**batch)
    return seen


def random_batches(vocab_size: int) -> Iterator[Batch]:
    """Random tokens, used where there are no calibration texts."""
    generator = torch.Generator().manual_seed(0)
    for length in (8, 48):
        ids = torch.randint(2, vocab_size, (_BATCH_SIZE, length), generator=generator)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@contextmanager
def _watched(model: Any) -> Iterator[Ranges]:
    branches: dict[str, float] = {}
    inner: dict[str, float] = {}

    def watch(name: str) -> Any:
        layer = name.removesuffix(".DenseReluDense.wo")

        def hook(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            branches[name] = max(float(output.abs().max()), branches.get(name, 0.0))
            if layer != name:
                inner[layer] = max(float(inputs[0].abs().max()), inner.get(layer, 0.0))

        return hook

    handles = [
        module.register_forward_hook(watch(name))
        for name, module in model.named_modules()
        if name.endswith((".o", ".wo")) or name == LM_HEAD
    ]
    try:
        yield Ranges(branches, inner)
    finally:
        for handle in handles:
            handle.remove()
