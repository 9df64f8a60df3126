"""Stand-ins for the kernels of the choice of tokens on a CPU: Transformers' processors, made from the numbers that the kernels would read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.generation import logits_process as processors

from t5_trt.generation.token_rules import RULES
from t5_trt.runtime import cuda_kernels


def use_stand_ins(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have them run in place of the kernels; returns how many rows have chosen together, each time."""
    rows_together: list[int] = []

    def choose(*given: Any) -> None:
        rows_together.append(given[4])
        choose_tokens(*given)

    monkeypatch.setattr(cuda_kernels, "choice_kernels", lambda device, vocabulary: True)
    monkeypatch.setattr(cuda_kernels, "edit_scores", edit_scores)
    monkeypatch.setattr(cuda_kernels, "choose_tokens", choose)
    return rows_together


def _each(rules: torch.Tensor, rows: int) -> list[tuple[int, Any]]:
    """The place of each row and its rules."""
    assert rules.is_contiguous() and len(rules) in (1, rows)
    numbers = rules.numpy().view(RULES)[:, 0]
    own = [numbers[row if len(rules) > 1 else 0] for row in range(rows)]
    return [(row if each["place"] < 0 else int(each["place"]), each) for row, each in enumerate(own)]


def edit_scores(
    scores: torch.Tensor, rules: torch.Tensor, tokens: torch.Tensor, ends: torch.Tensor, position: Any, rows: int
) -> None:
    """As `t5_trt.runtime.cuda_kernels.edit_scores`."""
    for row, (place, numbers) in enumerate(_each(rules, rows)):
        length = int(numbers["length"]) if numbers["length"] >= 0 else int(position) + 1
        own = tokens[row if numbers["slot"] < 0 else int(numbers["slot"])]
        if length == 1 and numbers["first"] >= 0:
            own[0] = int(numbers["first"])
        ids, edited = own[None, :length], scores[place : place + 1].clone()
        its_ends = ends[row if len(ends) > 1 else 0]
        if numbers["penalty"] != 1:
            edited = processors.RepetitionPenaltyLogitsProcessor(float(numbers["penalty"]))(ids, edited)
        if numbers["ngram"] > 0:
            edited = processors.NoRepeatNGramLogitsProcessor(int(numbers["ngram"]))(ids, edited)
        if length < numbers["until"]:
            edited[:, its_ends[its_ends >= 0]] = -torch.inf
        scores[place] = edited[0]


def choose_tokens(
    scores: torch.Tensor,
    rules: torch.Tensor,
    variates: torch.Tensor | None,
    chosen: torch.Tensor,
    rows: int,
    tokens: torch.Tensor | None = None,
) -> None:
    """As `t5_trt.runtime.cuda_kernels.choose_tokens`, where draws have variates."""
    for place, numbers in _each(rules, rows):
        own = scores[place : place + 1]
        if numbers["draws"]:
            assert variates is not None
            if numbers["temperature"] != 1:
                own = own / float(numbers["temperature"])
            if numbers["top_k"] > 0:
                own = processors.TopKLogitsWarper(int(numbers["top_k"]))(torch.empty(0), own)
            if numbers["top_p"] < 1:
                own = processors.TopPLogitsWarper(float(numbers["top_p"]))(torch.empty(0), own)
            chosen[place] = (own.softmax(-1) / variates[place]).argmax()
        else:
            chosen[place] = own.argmax()
        if tokens is not None and numbers["slot"] >= 0:
            tokens[int(numbers["slot"]), int(numbers["length"])] = chosen[place]
