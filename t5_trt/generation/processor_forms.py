"""What each of Transformers' processors comes to in a captured step: fixed shapes, lengths and numbers in tensors, no waiting.

`CAPTURABLE` has them by class; `t5_trt.generation.processors` makes and calls them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

import torch
from transformers.generation import logits_process

from t5_trt.errors import InputError

#: (tokens int64 [rows, M], their number int64 [1], or [rows, 1] where rows differ, scores float32 [rows, V]) -> scores
Apply = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
#: (processor, device) -> a parameter value of it, []
Read = Callable[[Any, torch.device], torch.Tensor]
HIDDEN = float("-inf")
#: tokens among which top-p looks for the most probable ones on a CPU before it sorts all
LIKELY = 512


def _real(name: str, *, more: Callable[[Any], float] = lambda processor: 0) -> Read:
    """A number plus an addend in double precision, as in Python.

    Torch rounds it at the same place as in the Hugging Face class; lengths may be fractions too.
    """
    return lambda processor, device: torch.tensor(getattr(processor, name) + more(processor), dtype=torch.float64)


def _divisor(name: str) -> Read:
    """The operand of `_divide`: the reciprocal if torch divides by a Python float by multiplying."""

    return lambda processor, device: torch.tensor(
        divisor_operand(getattr(processor, name), device), dtype=torch.float32
    )


def divisor_operand(number: float, device: torch.device) -> float:
    """What torch divides scores by: the number, or what it multiplies them with instead."""
    return _reciprocal(float(number), device) if _multiplies(device) else float(number)


@lru_cache(1024)
def _reciprocal(number: float, device: torch.device) -> float:
    """The reciprocal that torch multiplies by; measured, because there are two ways to round it (they differ for 1.7)."""
    return float(torch.ones((), device=device) / number)


def _divide(scores: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
    return scores * divisor if _multiplies(scores.device) else scores / divisor


@cache
def _multiplies(device: torch.device) -> bool:
    """Whether torch divides by a Python float by multiplying with its reciprocal, rounded, as it does on GPUs.

    See ``div_true_kernel_cuda`` in aten/src/ATen/native/cuda/BinaryDivTrueKernel.cu.
    """
    numbers, divisor = torch.arange(1.0, 1000.0), 0.7
    return not torch.equal((numbers.to(device) / divisor).cpu(), numbers / torch.tensor(divisor))


def _as_is(processor: Any, vocab_size: int, capacity: int, device: torch.device) -> Apply:
    """A Hugging Face processor that reads only the scores and already has fixed shapes."""
    return lambda tokens, length, scores: processor(tokens, scores)


def _temperature(processor: Any, vocab_size: int, capacity: int, device: torch.device) -> Apply:
    return lambda tokens, length, scores: _divide(scores, processor.temperature)


def _top_p(processor: Any, vocab_size: int, capacity: int, device: torch.device) -> Apply:
    """On a CPU a sort of 32,128 scores takes longer than a step of T5-base: top-p mostly keeps some of the best 512."""
    if device.type != "cpu":
        return _as_is(processor, vocab_size, capacity, device)

    def apply(tokens: torch.Tensor, length: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        found = likely(scores, processor.top_p, processor.min_tokens_to_keep, processor.filter_value)
        return processor(tokens, scores) if found is None else found

    return apply


def likely(scores: torch.Tensor, top_p: torch.Tensor, least: int, filter_value: float) -> torch.Tensor | None:
    """What Transformers' top-p leaves of scores, but for a token at its very edge, as sums are rounded differently.

    Args:
        scores: float32 [rows, V].
        top_p: float64 [].
        least: tokens that stay at least.
        filter_value: of the others.

    Returns:
        New scores, or None where the `LIKELY` best tokens do not say it: more of them would stay, equal ones lie at the edge, or a score is
        no number.
    """
    values, ids = scores.topk(min(LIKELY, scores.shape[-1]))
    all_weights = (scores - values[:, :1]).exp_()
    weights, total = all_weights.gather(-1, ids).double(), all_weights.sum(-1, keepdim=True, dtype=torch.float64)
    # by the probability of a token and all less likely ones
    kept = ((total - weights.cumsum(-1) + weights) / total).float() > 1 - top_p
    kept[:, :least] = True
    number = kept.sum(-1, keepdim=True)
    edge = values.gather(-1, number.clamp(max=values.shape[-1] - 1))
    says = (number < values.shape[-1]) & (edge < values.gather(-1, number - 1)) & total.isfinite()
    if not bool(says.all()):
        return None
    return torch.full_like(scores, filter_value).scatter_(-1, ids, values.masked_fill(~kept, filter_value))


def marked(ids: Any, vocab_size: int, device: torch.device) -> torch.Tensor:
    """Bool [V], true at the ids; ids beyond the vocabulary are ignored, as in Transformers' processors."""
    return torch.isin(torch.arange(vocab_size), torch.as_tensor(ids).cpu().flatten().long()).to(device)


def _min_length(processor: Any, vocab_size: int, capacity: int, device: torch.device) -> Apply:
    ends, minimum = marked(processor.eos_token_id, vocab_size, device), processor.min_length
    return lambda tokens, length, scores: scores.masked_fill(ends & (length < minimum), HIDDEN)


def _min_new_tokens(processor: Any, vocab_size: int, capacity: int, device: torch.device) -> Apply:
    ends = marked(processor.eos_token_id, vocab_size, device)
    minimum = processor.min_new_tokens  # with the prompt, see `CAPTURABLE`
    return lambda tokens, length, scores: scores.masked_fill(ends & (length < minimum), HIDDEN)


def _suppress(processor: Any, vocab_size: int, capacity: int, device: torch.device) -> Apply:
    hidden = marked(processor.suppress_tokens, vocab_size, device)
    return lambda tokens, length, scores: scores.masked_fill(hidden, HIDDEN)


def _suppress_at_begin(processor: Any, vocab_size: int, capacity: int, device: torch.device) -> Apply:
    hidden, begin = marked(processor.begin_suppress_tokens, vocab_size, device), processor.begin_index
    return lambda tokens, length, scores: scores.masked_fill(hidden & (length == begin), HIDDEN)


def _forced(ids: Any, when: Any, vocab_size: int, device: torch.device) -> Apply:
    named = torch.as_tensor(ids).cpu().flatten().long()
    if not bool(((named >= -vocab_size) & (named < vocab_size)).all()):
        raise InputError(
            f"a forced token got {named.tolist()}; expected ids below {vocab_size}, the size of the vocabulary."
        )
    only = torch.where(
        marked(named % vocab_size, vocab_size, device), 0.0, HIDDEN
    )  # negative ids count from the end; [V]
    return lambda tokens, length, scores: torch.where(length == when, only, scores)


def _forced_bos(processor: Any, vocab_size: int, capacity: int, device: torch.device) -> Apply:
    return _forced([processor.bos_token_id], 1, vocab_size, device)


def _forced_eos(processor: Any, vocab_size: int, capacity: int, device: torch.device) -> Apply:
    last = processor.max_length  # less one, see `CAPTURABLE`
    return _forced(processor.eos_token_id, last, vocab_size, device)


def _repetition_penalty(processor: Any, vocab_size: int, capacity: int, device: torch.device) -> Apply:
    penalty, divisor = processor.penalty, processor.divisor
    places = torch.arange(capacity, device=device)

    def apply(tokens: torch.Tensor, length: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen = scores.new_zeros(
            (len(scores), vocab_size + 1), dtype=torch.bool
        )  # the last column is for values that are not tokens
        seen.scatter_(1, torch.where(places < length, tokens, vocab_size), True)
        return torch.where(
            seen[:, :vocab_size], torch.where(scores < 0, scores * penalty, _divide(scores, divisor)), scores
        )

    return apply


def _last(tokens: torch.Tensor, length: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Tokens at places (below 0) before the end of each row, [rows, places]; the first one where a row is too short."""
    return tokens.gather(1, (length + places).clamp(min=0).expand(len(tokens), -1))


def _no_repeat_ngram(processor: Any, vocab_size: int, capacity: int, device: torch.device) -> Apply:
    size = processor.ngram_size
    if size > capacity:
        return lambda tokens, length, scores: scores
    starts, prefix_places = torch.arange(capacity - size + 1, device=device), torch.arange(1 - size, 0, device=device)

    def apply(tokens: torch.Tensor, length: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        prefix = _last(tokens, length, prefix_places)  # [rows, size - 1]
        windows = tokens.unfold(1, size, 1)  # [rows, starts, size]
        whole = starts + size <= length  # with too few tokens for the prefix there is no window
        repeats = (windows[..., :-1] == prefix[:, None]).all(-1) & whole
        banned = scores.new_zeros((len(scores), vocab_size + 1), dtype=torch.bool)
        banned.scatter_(1, torch.where(repeats, windows[..., -1], vocab_size), True)
        return scores.masked_fill(banned[:, :vocab_size], HIDDEN)

    return apply


def _sequence_bias(processor: Any, vocab_size: int, capacity: int, device: torch.device) -> Apply:
    beyond = sorted(token for ids in processor.sequence_bias for token in ids if token >= vocab_size)
    if beyond:
        raise ValueError(
            f"The model vocabulary size is {vocab_size}, but the following tokens were being biased: {beyond}"
        )
    single = torch.zeros(vocab_size, dtype=torch.float32)
    groups: dict[int, list[tuple[tuple[int, ...], float]]] = {}
    for ids, bias in processor.sequence_bias.items():
        if len(ids) == 1:
            single[ids[0]] = bias
        elif ids and len(ids) - 1 <= capacity:  # an empty sequence has no effect
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
            recent = _last(tokens, length, places)  # [rows, prefix]
            fits = (recent[:, None] == prefixes).all(-1) & (length + places[0] >= spare)
            bias.index_add_(1, last, torch.where(fits, amounts, 0.0))
        return scores + bias

    return apply


@cache
def _whole_contexts_count() -> bool:
    """Whether a sequence bias applies when all tokens so far are its prefix: not in Transformers 5.17, but in 5.20 and newer."""
    processor = logits_process.SequenceBiasLogitsProcessor([[[1, 1], 1.0]])
    return bool(processor(torch.ones(1, 1, dtype=torch.long), torch.zeros(1, 2))[0, 1] == 1.0)


def _growth(factor: float, steps: int) -> float:
    """The penalty at a length; lengths at which the Hugging Face class fails are not reached in practice."""
    try:
        return float(factor**steps - 1)
    except OverflowError:
        return float("inf") if factor > 0 or steps % 2 == 0 else float("-inf")


def _decaying_length(processor: Any, vocab_size: int, capacity: int, device: torch.device) -> Apply:
    ends, start = marked(processor.eos_token_id, vocab_size, device), processor.regulation_start
    # a power on the host in double precision, as in the Hugging Face class
    growths = [_growth(processor.regulation_factor, max(at - start, 0)) for at in range(capacity + 1)]
    growth = torch.tensor(growths, dtype=torch.float32, device=device)

    def apply(tokens: torch.Tensor, length: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        penalty = (scores.abs() * growth[length]).masked_fill(~(ends & scores.isfinite()), 0.0)
        return scores + penalty

    return apply


@dataclass(frozen=True)
class Kind:
    """How to make the capturable form of a class of processors.

    Attributes:
        make: (a copy of the processor with `numbers` in it, vocab_size, capacity, device) -> what it does.
        numbers: attribute of that copy -> where its value comes from.
        hides_ends_below: the number that is a length, if the processor only hides the end tokens of shorter sequences.
        by_row: the bits of a row do not depend on the number of rows, on a GPU either. Sums along a row do there (``torch.cumsum``).
    """

    make: Callable[[Any, int, int, torch.device], Apply]
    numbers: Mapping[str, Read] = field(default_factory=dict)
    hides_ends_below: str | None = None
    by_row: bool = True


#: the processors that can be part of a captured step
CAPTURABLE: dict[type, Kind] = {
    logits_process.TemperatureLogitsWarper: Kind(_temperature, {"temperature": _divisor("temperature")}),
    logits_process.TopKLogitsWarper: Kind(_as_is),
    logits_process.TopPLogitsWarper: Kind(_top_p, {"top_p": _real("top_p")}, by_row=False),
    logits_process.MinPLogitsWarper: Kind(_as_is, {"min_p": _real("min_p")}),
    logits_process.TypicalLogitsWarper: Kind(_as_is, {"mass": _real("mass")}, by_row=False),
    logits_process.EpsilonLogitsWarper: Kind(_as_is, {"epsilon": _real("epsilon")}),
    logits_process.InfNanRemoveLogitsProcessor: Kind(_as_is),
    logits_process.LogitNormalization: Kind(_as_is),
    logits_process.MinLengthLogitsProcessor: Kind(_min_length, {"min_length": _real("min_length")}, "min_length"),
    logits_process.MinNewTokensLengthLogitsProcessor: Kind(
        _min_new_tokens,
        {"min_new_tokens": _real("min_new_tokens", more=lambda p: p.prompt_length_to_skip)},
        "min_new_tokens",
    ),
    logits_process.SuppressTokensLogitsProcessor: Kind(_suppress),
    logits_process.SuppressTokensAtBeginLogitsProcessor: Kind(_suppress_at_begin),
    logits_process.ForcedBOSTokenLogitsProcessor: Kind(_forced_bos),
    logits_process.ForcedEOSTokenLogitsProcessor: Kind(
        _forced_eos, {"max_length": _real("max_length", more=lambda p: -1)}
    ),
    logits_process.RepetitionPenaltyLogitsProcessor: Kind(
        _repetition_penalty, {"penalty": _real("penalty"), "divisor": _divisor("penalty")}
    ),
    logits_process.NoRepeatNGramLogitsProcessor: Kind(_no_repeat_ngram),
    logits_process.SequenceBiasLogitsProcessor: Kind(_sequence_bias),
    logits_process.NoBadWordsLogitsProcessor: Kind(_sequence_bias),
    logits_process.ExponentialDecayLengthPenalty: Kind(_decaying_length),
}
