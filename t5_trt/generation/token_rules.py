"""The choice of tokens by our kernels: which processors they stand for, and the numbers that they read.

processors ── front ── torch's forms, whatever they are
           ├─ edits ── repetition penalty, no n-gram twice, least lengths: kernels/edit_scores.cu
           └─ warps ── temperature, top-k, top-p, and the choice itself: kernels/choose_tokens.cu
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.generation import logits_process

from t5_trt.generation.cached_property import cached_property
from t5_trt.generation.processor_forms import divisor_operand
from t5_trt.runtime import cuda_kernels

#: ``Rules`` of kernels/token_rules.cuh
RULES = np.dtype(
    [(name, np.float64) for name in ("penalty", "divisor", "until", "temperature", "top_p")]
    + [(name, np.int64) for name in ("ngram", "top_k", "draws", "place", "length", "slot", "first")]
    + [(name, np.uint64) for name in ("seed", "offset")]
)
_EDITS = (
    logits_process.RepetitionPenaltyLogitsProcessor,
    logits_process.NoRepeatNGramLogitsProcessor,
    logits_process.MinLengthLogitsProcessor,
    logits_process.MinNewTokensLengthLogitsProcessor,
)
_WARPS = (
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
)
_ORDER: tuple[type, ...] = (*_EDITS, *_WARPS)


@dataclass(frozen=True)
class TokenRules:
    """Processors, all of which have capturable forms, by who does their work.

    Attributes:
        front: the first ones, which kernels do not know.
        edits: those that `edit_scores` stands for.
        warps: those that `choose_tokens` stands for, in sampling.
    """

    front: tuple[Any, ...]
    edits: tuple[Any, ...]
    warps: tuple[Any, ...]

    @classmethod
    def of(cls, processors: Sequence[Any]) -> TokenRules:
        """Split processors: the kernels take the longest end of the list that has their order."""
        first, before = len(processors), len(_ORDER)
        while first > 0 and _rank(processors[first - 1]) < before and _same_ends(processors[first - 1 :]):
            first -= 1
            before = _rank(processors[first])
        edits = tuple(each for each in processors[first:] if type(each) in _EDITS)
        return cls(tuple(processors[:first]), edits, tuple(processors[first + len(edits) :]))

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """The tokens that edits hide up to a least length."""
        return next((_ends(each) for each in self.edits if hasattr(each, "eos_token_id")), ())

    @cached_property
    def until(self) -> int:
        """The length in tokens below which edits hide `ends`; 0 if none does."""
        lengths = [
            each.min_length
            if isinstance(each, logits_process.MinLengthLogitsProcessor)
            else each.prompt_length_to_skip + each.min_new_tokens
            for each in self.edits
            if hasattr(each, "eos_token_id")
        ]
        return max(lengths, default=0)

    @cached_property
    def looks_back(self) -> bool:
        """Whether edits look at a row's tokens, not only at their number."""
        return any(isinstance(each, _EDITS[:2]) for each in self.edits)

    def numbers(self, device: torch.device, *, draws: bool) -> np.ndarray[Any, Any]:
        """What the kernels read of them, an entry of `RULES` [1].

        Args:
            device: of the scores.
            draws: tokens are drawn.
        """
        made = np.zeros(1, RULES)
        made["penalty"] = made["divisor"] = made["temperature"] = made["top_p"] = 1.0
        made["draws"], made["until"] = draws, self.until
        for name in ("place", "length", "slot", "first"):
            made[name] = -1
        for each in (*self.edits, *self.warps):
            if isinstance(each, logits_process.RepetitionPenaltyLogitsProcessor):
                made["penalty"], made["divisor"] = each.penalty, divisor_operand(each.penalty, device)
            elif isinstance(each, logits_process.NoRepeatNGramLogitsProcessor):
                made["ngram"] = each.ngram_size
            elif isinstance(each, logits_process.TemperatureLogitsWarper):
                made["temperature"] = divisor_operand(each.temperature, device)
            elif isinstance(each, logits_process.TopKLogitsWarper):
                made["top_k"] = each.top_k
            elif isinstance(each, logits_process.TopPLogitsWarper):
                made["top_p"] = each.top_p
        return made


class DeviceRules:
    """Rules of all rows of a token selector, in memory that a captured step reads.

    Args:
        rules: see `TokenRules`.
        device: a GPU that has the kernels (`t5_trt.runtime.cuda_kernels.choice_kernels`).
        draws: tokens are drawn.
    """

    def __init__(self, rules: TokenRules, device: torch.device, *, draws: bool) -> None:
        self.parts = len(rules.front), len(rules.front) + len(rules.edits)
        self._draws = draws
        self._table = torch.zeros((1, RULES.itemsize // 8), dtype=torch.int64, device=device)
        self._ends = torch.tensor([rules.ends], dtype=torch.int64, device=device)
        self._write(rules)

    def load(self, processors: Sequence[Any]) -> None:
        """Take the numbers of other processors of the same kinds. This does not wait for the GPU."""
        front, edited = self.parts
        self._write(
            TokenRules(*(tuple(part) for part in (processors[:front], processors[front:edited], processors[edited:])))
        )

    def _write(self, rules: TokenRules) -> None:
        numbers = rules.numbers(self._table.device, draws=self._draws)
        self._table.copy_(torch.from_numpy(numbers.view(np.int64))[None], non_blocking=True)

    def edit(self, tokens: torch.Tensor, position: torch.Tensor, scores: torch.Tensor) -> None:
        """Write the edits into scores, float32 [R, V]; the other arguments as of `CapturableProcessors`."""
        cuda_kernels.edit_scores(scores, self._table, tokens, self._ends, position, len(tokens))

    def choose(self, scores: torch.Tensor, variates: torch.Tensor | None, chosen: torch.Tensor) -> None:
        """Choose tokens by edited scores, see `t5_trt.runtime.cuda_kernels.choose_tokens`."""
        cuda_kernels.choose_tokens(scores, self._table, variates, chosen, len(chosen))


def _rank(processor: Any) -> int:
    """The place of a processor in the order of the kernels; beyond its end for others, and for settings that they do not have."""
    if type(processor) not in _ORDER or getattr(processor, "filter_value", -np.inf) != -np.inf:
        return len(_ORDER)
    keeps = getattr(processor, "min_tokens_to_keep", 1) if isinstance(processor, _WARPS[-1]) else 1
    return _ORDER.index(type(processor)) if keeps == 1 else len(_ORDER)


def _ends(processor: Any) -> tuple[int, ...]:
    return tuple(torch.as_tensor(processor.eos_token_id).flatten().tolist())


def _same_ends(processors: Sequence[Any]) -> bool:
    """Whether all that hide end tokens hide the same ones."""
    return len({_ends(each) for each in processors if hasattr(each, "eos_token_id")}) <= 1
