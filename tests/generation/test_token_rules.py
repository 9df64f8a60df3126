"""Which processors the kernels of the choice of tokens stand for, and the numbers that these get."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.generation import logits_process as processors

from t5_trt.generation.processors import CapturableProcessors, capturable_processors
from t5_trt.generation.token_rules import DeviceRules, TokenRules
from tests.stand_in_choice import use_stand_ins

CPU = torch.device("cpu")
ENDS, OTHER_ENDS = torch.tensor([1, 7]), torch.tensor([1])


class OwnTopK(processors.TopKLogitsWarper):
    """A user's class."""


PENALTY, NGRAM = processors.RepetitionPenaltyLogitsProcessor(1.3), processors.NoRepeatNGramLogitsProcessor(2)
LENGTH, NEW = (
    processors.MinLengthLogitsProcessor(9, ENDS),
    processors.MinNewTokensLengthLogitsProcessor(3, 9, ENDS),
)
TEMPERATURE, TOP_K, TOP_P = (
    processors.TemperatureLogitsWarper(0.7),
    processors.TopKLogitsWarper(9),
    processors.TopPLogitsWarper(0.8),
)
SUPPRESS, MIN_P = processors.SuppressTokensLogitsProcessor([3, 4]), processors.MinPLogitsWarper(0.1)


@pytest.mark.parametrize(
    ("given", "front"),
    [
        ([], 0),
        ([PENALTY, NGRAM, LENGTH, NEW, TEMPERATURE, TOP_K, TOP_P], 0),
        ([SUPPRESS, NGRAM, TOP_P], 1),
        ([PENALTY, SUPPRESS, TEMPERATURE], 2),
        ([NGRAM, PENALTY], 1),  # the kernel has another order
        ([TOP_K, TEMPERATURE], 1),
        ([TEMPERATURE, TOP_K, MIN_P], 3),
        ([TOP_K, TOP_K], 1),
        ([processors.MinLengthLogitsProcessor(9, OTHER_ENDS), NEW, TOP_K], 1),
        ([processors.TopKLogitsWarper(9, filter_value=-5.0), TOP_P], 1),
        ([TEMPERATURE, processors.TopPLogitsWarper(0.8, min_tokens_to_keep=2)], 2),
        ([OwnTopK(9), TOP_P], 1),
    ],
    ids=lambda given: "-".join(type(each).__name__ for each in given) if isinstance(given, list) else "",
)
def test_kernels_take_the_end_of_the_list_that_they_know(given: list[Any], front: int) -> None:
    rules = TokenRules.of(given)
    assert list(rules.front) == given[:front] and [*rules.edits, *rules.warps] == given[front:]
    assert all(each in (PENALTY, NGRAM, LENGTH, NEW) for each in rules.edits)
    assert rules.looks_back == any(each in rules.edits for each in (PENALTY, NGRAM))
    assert rules.ends == ((1, 7) if any(each in rules.edits for each in (LENGTH, NEW)) else ())


def test_numbers_are_those_of_the_processors() -> None:
    numbers = TokenRules.of([PENALTY, NGRAM, LENGTH, NEW, TEMPERATURE, TOP_K, TOP_P]).numbers(CPU, draws=True)[0]
    assert (numbers["penalty"], numbers["ngram"], numbers["until"]) == (1.3, 2, 12)
    assert (numbers["temperature"], numbers["top_k"], numbers["top_p"], numbers["draws"]) == (0.7, 9, 0.8, 1)
    none = TokenRules.of([]).numbers(CPU, draws=False)[0]
    assert (none["penalty"], none["ngram"], none["until"], none["temperature"]) == (1, 0, 0, 1)
    assert (none["top_k"], none["top_p"], none["draws"], none["place"], none["length"]) == (0, 1, 0, -1, -1)


def kinds(strength: float) -> list[Any]:
    """Processors of the same kinds with other numbers, a front among them."""
    return [
        processors.ExponentialDecayLengthPenalty((2, 1.1), ENDS, 1),
        processors.RepetitionPenaltyLogitsProcessor(1.0 + strength),
        processors.MinNewTokensLengthLogitsProcessor(1, int(40 * strength), ENDS),
        processors.TemperatureLogitsWarper(1.5 - strength),
        processors.TopPLogitsWarper(1.0 - strength / 2),
    ]


def test_rules_take_the_numbers_of_other_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the forms do: one captured step serves both."""
    use_stand_ins(monkeypatch)
    generator = torch.Generator().manual_seed(2)
    tokens, logits = (
        torch.randint(0, 60, (3, 32), generator=generator),
        3 * torch.randn((3, 60), generator=generator),
    )
    variates, position = torch.empty_like(logits).exponential_(generator=generator), torch.tensor([10])
    own = capturable_processors(kinds(0.1), 60, 32, CPU)
    assert own is not None
    by_rules = CapturableProcessors(own, DeviceRules(TokenRules.of(kinds(0.1)), CPU, draws=True))
    by_forms = CapturableProcessors(capturable_processors(kinds(0.1), 60, 32, CPU) or [])
    assert by_rules.chooses and not by_forms.chooses
    results = []
    for strength in (0.1, 0.6, 0.3, 0.1):
        for each in (by_rules, by_forms):
            each.load(kinds(strength))
        expected = by_forms(tokens, position, logits)
        assert torch.equal(by_rules(tokens, position, logits.clone()), expected)
        chosen = torch.zeros(3, dtype=torch.int64)
        by_rules.choose(tokens, position, logits.clone(), variates, chosen)
        assert torch.equal(chosen, (expected.softmax(-1) / variates).argmax(-1))
        results.append(expected)
    assert torch.equal(results[0], results[3]) and not torch.equal(results[0], results[1])
