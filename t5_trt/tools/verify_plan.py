"""Default searches, sources and limits of `t5-trt verify`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from t5_trt.checkpoint.load import load_tokenizer
from t5_trt.checkpoint.tokenizing import Batch, text_batches
from t5_trt.errors import CheckpointError
from t5_trt.generation.search_settings import length_limit, one_search
from t5_trt.tools.sample_texts import sample_texts
from t5_trt.tools.verify import Comparison

#: beams, for a checkpoint that sets none
_BEAMS = 4


@dataclass(frozen=True)
class Limits:
    """The limits of a comparison.

    Attributes:
        at_least: share of equal sequences, 0 to 1.
        max_relative_error: of the logits, L2 of the difference over L2 of Hugging Face's.
    """

    at_least: float
    max_relative_error: float

    def exceeded(self, found: Comparison) -> list[str]:
        """Messages about exceeded limits."""
        problems = []
        if not found.share >= self.at_least:
            problems.append(f"{found.share:.4f} of the sequences are equal, below {self.at_least:g}")
        if not found.relative_logit_error <= self.max_relative_error:  # NaN is above every limit
            error = found.relative_logit_error
            problems.append(f"the relative error of the logits is {error:.2e}, above {self.max_relative_error:g}")
        return problems


#: In float32 only the order of sums differs. The others allow several times what was measured: fp16 0.2 to 0.8% where layers
#: have to be scaled, bf16 has 8 times its rounding, int8 3 to 5%, int4 8%. A token differs where the best two logits are closer than that.
LIMITS = {
    "fp32": Limits(1.0, 1e-3),
    "tf32": Limits(0.9, 1e-2),
    "fp16": Limits(0.9, 3e-2),
    "bf16": Limits(0.8, 0.15),
    "int8": Limits(0.9, 0.15),
    "int4": Limits(0.8, 0.25),
}


def searches(config: Any, precision: str, num_beams: int | None, new_tokens: int) -> dict[str, dict[str, Any]]:
    """Name -> arguments of ``generate()``: greedy search, beams, and sampling where the checkpoint samples.

    Sampling is compared only in float32: in other precisions a draw near a boundary changes the rest of a sequence.

    Args:
        config: the model's generation config, whose processors take part.
        precision: of the model.
        num_beams: only this search; None takes all.
        new_tokens: largest number in a sequence.
    """
    own, results = config.num_beams or 1, config.num_return_sequences or 1
    beams = own if own > 1 else _BEAMS
    found: dict[str, dict[str, Any]] = {}
    for number in (1, beams) if num_beams is None else (num_beams,):
        name = "greedy" if number == 1 else f"{number} beams"
        found[name] = one_search(config, num_beams=number, do_sample=False, results=min(results, number))
    if num_beams is None and config.do_sample and precision == "fp32":
        found["sampling"] = one_search(config, num_beams=own, do_sample=True, results=results)
    return {name: {**settings, **length_limit(config, new_tokens)} for name, settings in found.items()}


def default_batches(model: Any, name: str, size: int) -> tuple[list[Batch], str]:
    """Sources to compare on, and a description: texts for the checkpoint's tokenizer, or random tokens without one.

    Args:
        model: whose vocabulary and padding token are used.
        name: hub id or folder of its tokenizer.
        size: rows of a batch.
    """
    try:
        tokenizer = load_tokenizer(name)
        texts, kind = sample_texts(tokenizer)
    except CheckpointError:
        texts, kind = [], ""
    if not texts:
        return _random_batches(size, model.config.vocab_size), "random tokens, for want of a tokenizer"
    return list(text_batches(tokenizer, texts, size, pad_token_id=model.config.pad_token_id)), kind


def _random_batches(size: int, vocabulary: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for length in (8, 20, 40):
        lengths = torch.randint(1, length + 1, (size,), generator=generator)
        mask = (torch.arange(length) < lengths[:, None]).long()
        ids = torch.randint(min(3, vocabulary - 1), vocabulary, (size, length), generator=generator)
        batches.append({"input_ids": ids * mask, "attention_mask": mask})
    return batches
