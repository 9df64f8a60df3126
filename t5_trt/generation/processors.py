"""Logits processors for the decode loop: device forms of Transformers' own, and stock ones called as they are.

A device form has fixed shapes and takes the length from a tensor, so that it can be part of a recorded CUDA graph: it
neither waits for the GPU nor looks at a value on the host. Each computes what the class of the same name in
`transformers.generation.logits_process` computes, value for value.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Any

import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process as stock

#: (tokens int64 [rows, M], their number int64 [1], scores float32 [rows, V]) -> scores
Form = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
_HIDDEN = float("-inf")


class Recordable:
    """Processors in device form, in order.

    Args:
        forms: see `Form`.
    """

    def __init__(self, forms: Sequence[Form]) -> None:
        self._forms = forms

    def __call__(self, tokens: torch.Tensor, position: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [rows, V] of the token after the one at `position` (int64 [1])."""
        if self._forms:
            length = position + 1
            for form in self._forms:
                scores = form(tokens, length, scores)
        return scores


class Stock:
    """Any processors, called as Transformers' own loop calls them: with all tokens so far.

    Args:
        processors: in order.
        length: tokens of the prompt.
    """

    def __init__(self, processors: LogitsProcessorList, length: int) -> None:
        self._processors = processors
        self._length = length

    def __call__(self, tokens: torch.Tensor, position: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """As `Recordable.__call__`; one call a step."""
        scores = self._processors(tokens[:, : self._length], scores)
        self._length += 1
        return scores


Processing = Recordable | Stock


def device_forms(processors: Sequence[Any], vocab_size: int, capacity: int, device: torch.device) -> list[Form] | None:
    """Device forms of processors, or None if one of them has none (it is not in `DEVICE_FORMS`).

    Args:
        processors: instances of Transformers' classes.
        vocab_size: V.
        capacity: M, the width of the token buffer.
        device: where scores will be.
    """
    if not all(has_device_form(processor) for processor in processors):
        return None
    return [DEVICE_FORMS[type(processor)](processor, vocab_size, capacity, device) for processor in processors]


def has_device_form(processor: Any) -> bool:
    """Whether a processor can be part of a recorded step; subclasses are taken for something else."""
    if isinstance(processor, stock.RepetitionPenaltyLogitsProcessor):
        return type(processor) in DEVICE_FORMS and getattr(processor, "prompt_ignore_length", None) is None
    return type(processor) in DEVICE_FORMS


def fingerprint(processor: Any) -> Hashable:
    """Equal for processors that do the same: the class and its settings."""
    return type(processor).__name__, tuple((name, _frozen(value)) for name, value in sorted(vars(processor).items()))


def _frozen(value: Any) -> Hashable:
    if isinstance(value, torch.Tensor):
        return tuple(value.flatten().tolist())
    if isinstance(value, dict):
        return tuple((_frozen(key), _frozen(entry)) for key, entry in value.items())
    return tuple(_frozen(entry) for entry in value) if isinstance(value, list | tuple) else value


def _as_is(processor: Any, vocab_size: int, capacity: int, device: torch.device) -> Form:
    """A stock processor that looks at scores only and has fixed shapes already."""
    return lambda tokens, length, scores: processor(tokens, scores)


def _marked(ids: Any, vocab_size: int, device: torch.device) -> torch.Tensor:
    """Bool [V], true at the ids; those beyond the vocabulary mark nothing, as in the stock processors."""
    return torch.isin(torch.arange(vocab_size), torch.as_tensor(ids).cpu().flatten().long()).to(device)


def _min_length(processor: Any, vocab_size: int, capacity: int, device: torch.device) -> Form:
    ends, minimum = _marked(processor.eos_token_id, vocab_size, device), processor.min_length
    return lambda tokens, length, scores: scores.masked_fill(ends & (length < minimum), _HIDDEN)


def _min_new_tokens(processor: Any, vocab_size: int, capacity: int, device: torch.device) -> Form:
    ends = _marked(processor.eos_token_id, vocab_size, device)
    minimum = processor.prompt_length_to_skip + processor.min_new_tokens
    return lambda tokens, length, scores: scores.masked_fill(ends & (length < minimum), _HIDDEN)


def _suppress(processor: Any, vocab_size: int, capacity: int, device: torch.device) -> Form:
    hidden = _marked(processor.suppress_tokens, vocab_size, device)
    return lambda tokens, length, scores: scores.masked_fill(hidden, _HIDDEN)


def _suppress_at_begin(processor: Any, vocab_size: int, capacity: int, device: torch.device) -> Form:
    hidden, begin = _marked(processor.begin_suppress_tokens, vocab_size, device), processor.begin_index
    return lambda tokens, length, scores: scores.masked_fill(hidden & (length == begin), _HIDDEN)


def _forced(ids: Any, when: int, vocab_size: int, device: torch.device) -> Form:
    only = torch.where(_marked(ids, vocab_size, device), 0.0, _HIDDEN)  # [V]
    return lambda tokens, length, scores: torch.where(length == when, only, scores)


def _forced_bos(processor: Any, vocab_size: int, capacity: int, device: torch.device) -> Form:
    return _forced([processor.bos_token_id], 1, vocab_size, device)


def _forced_eos(processor: Any, vocab_size: int, capacity: int, device: torch.device) -> Form:
    return _forced(processor.eos_token_id, processor.max_length - 1, vocab_size, device)


def _repetition_penalty(processor: Any, vocab_size: int, capacity: int, device: torch.device) -> Form:
    penalty, places = processor.penalty, torch.arange(capacity, device=device)

    def apply(tokens: torch.Tensor, length: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen = scores.new_zeros(
            (len(scores), vocab_size + 1), dtype=torch.bool
        )  # the last column takes what is no token
        seen.scatter_(1, torch.where(places < length, tokens, vocab_size), True)
        return torch.where(seen[:, :vocab_size], torch.where(scores < 0, scores * penalty, scores / penalty), scores)

    return apply


def _no_repeat_ngram(processor: Any, vocab_size: int, capacity: int, device: torch.device) -> Form:
    size = processor.ngram_size
    if size > capacity:
        return lambda tokens, length, scores: scores
    starts, prefix_places = torch.arange(capacity - size + 1, device=device), torch.arange(1 - size, 0, device=device)

    def apply(tokens: torch.Tensor, length: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        prefix = tokens.index_select(1, (length + prefix_places).clamp(min=0))  # [rows, size - 1], the last tokens
        windows = tokens.unfold(1, size, 1)  # [rows, starts, size]
        whole = starts + size <= length  # so too few tokens for the prefix leave no window
        repeats = (windows[..., :-1] == prefix[:, None]).all(-1) & whole
        banned = scores.new_zeros((len(scores), vocab_size + 1), dtype=torch.bool)
        banned.scatter_(1, torch.where(repeats, windows[..., -1], vocab_size), True)
        return scores.masked_fill(banned[:, :vocab_size], _HIDDEN)

    return apply


def _sequence_bias(processor: Any, vocab_size: int, capacity: int, device: torch.device) -> Form:
    beyond = sorted(token for ids in processor.sequence_bias for token in ids if token >= vocab_size)
    if beyond:
        raise ValueError(
            f"The model vocabulary size is {vocab_size}, but the following tokens were being biased: {beyond}"
        )
    single = torch.zeros(vocab_size)
    groups: dict[int, list[tuple[tuple[int, ...], float]]] = {}
    for ids, bias in processor.sequence_bias.items():
        if len(ids) == 1:
            single[ids[0]] = bias
        elif ids and len(ids) - 1 <= capacity:  # an empty sequence says nothing
            groups.setdefault(len(ids) - 1, []).append((ids, bias))
    single = single.to(device)
    longer = [
        (
            torch.arange(-prefix, 0, device=device),
            torch.tensor([ids[:-1] for ids, _ in group], device=device),
            torch.tensor([ids[-1] for ids, _ in group], device=device),
            torch.tensor([bias for _, bias in group], device=device),
        )
        for prefix, group in groups.items()
    ]

    spare = 0 if _whole_contexts_count() else 1

    def apply(tokens: torch.Tensor, length: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        bias = single.expand_as(scores).clone() if longer else single
        for places, prefixes, last, amounts in longer:
            recent = tokens.index_select(1, (length + places).clamp(min=0))  # [rows, prefix]
            fits = (recent[:, None] == prefixes).all(-1) & (length + places[0] >= spare)
            bias.index_add_(1, last, torch.where(fits, amounts, 0.0))
        return scores + bias

    return apply


@cache
def _whole_contexts_count() -> bool:
    """Whether a sequence counts whose beginning is all there is so far: not in Transformers 5.17, and in 5.20 and newer."""
    stock_form = stock.SequenceBiasLogitsProcessor([[[1, 1], 1.0]])
    return bool(stock_form(torch.ones(1, 1, dtype=torch.long), torch.zeros(1, 2))[0, 1] == 1.0)


def _decaying_length(processor: Any, vocab_size: int, capacity: int, device: torch.device) -> Form:
    ends, start = _marked(processor.eos_token_id, vocab_size, device), processor.regulation_start
    # a power on the host and in double precision, as the stock class has it
    growth = torch.tensor([processor.regulation_factor ** max(at - start, 0) - 1 for at in range(capacity + 1)])
    growth = growth.to(device)

    def apply(tokens: torch.Tensor, length: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        penalty = (scores.abs() * growth.index_select(0, length)).masked_fill(~(ends & scores.isfinite()), 0.0)
        return scores + penalty

    return apply


#: the processors that can be part of a recorded step
DEVICE_FORMS: dict[type, Callable[[Any, int, int, torch.device], Form]] = {
    stock.TemperatureLogitsWarper: _as_is,
    stock.TopKLogitsWarper: _as_is,
    stock.TopPLogitsWarper: _as_is,
    stock.MinPLogitsWarper: _as_is,
    stock.TypicalLogitsWarper: _as_is,
    stock.EpsilonLogitsWarper: _as_is,
    stock.InfNanRemoveLogitsProcessor: _as_is,
    stock.LogitNormalization: _as_is,
    stock.MinLengthLogitsProcessor: _min_length,
    stock.MinNewTokensLengthLogitsProcessor: _min_new_tokens,
    stock.SuppressTokensLogitsProcessor: _suppress,
    stock.SuppressTokensAtBeginLogitsProcessor: _suppress_at_begin,
    stock.ForcedBOSTokenLogitsProcessor: _forced_bos,
    stock.ForcedEOSTokenLogitsProcessor: _forced_eos,
    stock.RepetitionPenaltyLogitsProcessor: _repetition_penalty,
    stock.NoRepeatNGramLogitsProcessor: _no_repeat_ngram,
    stock.SequenceBiasLogitsProcessor: _sequence_bias,
    stock.NoBadWordsLogitsProcessor: _sequence_bias,
    stock.ExponentialDecayLengthPenalty: _decaying_length,
}
