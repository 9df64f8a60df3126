"""The kernels of the choice of tokens on a CPU, thread by thread, against Transformers' processors and torch's draws."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as processors

from t5_trt import kernels
from t5_trt.generation.token_rules import TokenRules
from tests.kernels.emulation import call, compiled_library, entry, without

CPU = torch.device("cpu")
THREADS = 64
HEADER = """
#include "emulated_step.h"
#define nullptr 0
#define DIVIDES 1
#define __logf(value) logf(value)
static int __shfl_xor_sync(unsigned mask, int value, int step) { return __float_as_uint(__shfl_xor_sync(mask, __uint_as_float(value), step)); }
static int atomicAdd(int* at, int value) { return (*at += value) - value; }
static int __syncthreads_count(bool holds)
{
    static int count;
    __syncthreads(), count = 0, __syncthreads(), count += holds, __syncthreads();
    return count;
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder, text = Path(kernels.__file__).parent, ""
    for name in ("launch.cuh", "token_rules.cuh", "edit_scores.cu", "choose_tokens.cu"):
        text += re.sub(r"#include .*|#pragma \w.*", "", (folder / name).read_text())
    text = without(text, ("let_next_start", "wait_for_inputs", "send_report")).replace("__shared__", "static")
    calls = "\n".join(entry(name, text) for name in ("edit_scores", "choose_tokens"))
    header = HEADER.replace('"emulated_step.h"', f'"{Path(__file__).parent / "emulated_step.h"}"')
    return compiled_library(f"{header}\n{text}\n{calls}", {}, tmp_path_factory.mktemp("choice"))


def packed(rules: TokenRules, rows: int, device: torch.device = CPU, **numbers: Any) -> torch.Tensor:
    """The rules of all rows, with some numbers of their own."""
    table = np.repeat(rules.numbers(device, draws=True), rows)
    for name, values in numbers.items():
        table[name] = values
    return torch.from_numpy(table.view(np.int64).reshape(rows, -1)).to(device)


def choose(library: Any, scores: torch.Tensor, rules: torch.Tensor, variates: torch.Tensor | None) -> list[int]:
    rows, vocabulary = scores.shape
    chosen = torch.full((rows,), -1)
    threads = -(-vocabulary // 256) * 256
    call(library, "choose_tokens", (rows,), THREADS, (scores, rules, variates, chosen, None, 1, vocabulary, threads, 0))
    return chosen.tolist()


WARPS = {
    "nothing": [],
    "top-k": [processors.TopKLogitsWarper(50)],
    "best": [processors.TopKLogitsWarper(1)],
    "temperature and top-k": [processors.TemperatureLogitsWarper(0.7), processors.TopKLogitsWarper(7)],
    "top-p": [processors.TopPLogitsWarper(0.9)],
    "hardly any": [processors.TopPLogitsWarper(0.05)],
    "none but the best": [processors.TopPLogitsWarper(0.0)],
    "nearly all": [processors.TopPLogitsWarper(0.999)],
    "top-k and top-p": [processors.TopKLogitsWarper(20), processors.TopPLogitsWarper(0.8)],
    "all three": [
        processors.TemperatureLogitsWarper(1.7),
        processors.TopKLogitsWarper(600),
        processors.TopPLogitsWarper(0.7),
    ],
    "more than there are": [processors.TopKLogitsWarper(100_000), processors.TopPLogitsWarper(0.5)],
}


def scores_of(kind: str, vocabulary: int) -> torch.Tensor:
    """Four rows: as a model's, all about equal, with many equal ones, or mostly hidden."""
    made = torch.randn((4, vocabulary), generator=torch.Generator().manual_seed(vocabulary))
    if kind == "flat":
        return made * 0.01
    if kind == "equal":
        return made.round()
    if kind == "hidden":
        made[:, 5:-3] = -torch.inf
        return made
    return made * 4


@pytest.mark.parametrize("vocabulary", [96, 1003, 4000])
@pytest.mark.parametrize("kind", ["peaked", "flat", "equal", "hidden"])
@pytest.mark.parametrize("name", WARPS)
def test_draws_are_those_of_the_warpers(
    library: Any, monkeypatch: pytest.MonkeyPatch, name: str, kind: str, vocabulary: int
) -> None:
    """With the same variates, whatever path the kernel takes: lists of few tokens, or all scores."""
    monkeypatch.setattr(torch, "sort", partial(torch.sort, stable=True))  # else top-p keeps any of equal tokens
    scores = scores_of(kind, vocabulary)
    expected = scores
    for warper in WARPS[name]:
        expected = warper(torch.zeros((4, 1), dtype=torch.long), expected)
    rules = packed(TokenRules.of(WARPS[name]), 4)
    for seed in range(3):
        variates = torch.empty_like(scores).exponential_(generator=torch.Generator().manual_seed(seed))
        drawn = (expected.softmax(-1) / variates).argmax(-1).tolist()
        assert choose(library, scores, rules, variates) == drawn


def test_the_best_token_is_the_first_of_equal_ones(library: Any) -> None:
    scores = scores_of("equal", 1003)
    rules = packed(TokenRules.of([]), 4, draws=[0, 0, 1, 0], place=[0, 1, 2, 3])
    drawn = choose(library, scores, rules, torch.ones_like(scores))
    assert drawn == scores.argmax(-1).tolist()


def test_rows_have_places_and_rules_of_their_own(library: Any) -> None:
    """Two of four rows, the last one first."""
    scores, variates = scores_of("peaked", 1003), torch.ones(4, 1003)
    rules = packed(TokenRules.of([]), 2, place=[3, 1], top_k=[1, 0], draws=[1, 0])
    chosen, best = torch.full((4,), -1), scores.argmax(-1).tolist()
    call(library, "choose_tokens", (2,), THREADS, (scores, rules, variates, chosen, None, 1, 1003, 1024, 0))
    assert chosen.tolist() == [-1, best[1], -1, best[3]]


EDITS = {
    "penalty": [processors.RepetitionPenaltyLogitsProcessor(1.3)],
    "less": [processors.RepetitionPenaltyLogitsProcessor(0.7)],
    "no token twice": [processors.NoRepeatNGramLogitsProcessor(1)],
    "no pair twice": [processors.NoRepeatNGramLogitsProcessor(2)],
    "no three twice": [processors.NoRepeatNGramLogitsProcessor(3)],
    "longer than rows": [processors.NoRepeatNGramLogitsProcessor(500)],
    "least length": [processors.MinLengthLogitsProcessor(40, torch.tensor([1, 7]))],
    "all": [
        processors.RepetitionPenaltyLogitsProcessor(2.0),
        processors.NoRepeatNGramLogitsProcessor(2),
        processors.MinLengthLogitsProcessor(20, torch.tensor([1, 7])),
        processors.MinNewTokensLengthLogitsProcessor(1, 30, torch.tensor([1, 7])),
    ],
}


@pytest.mark.parametrize("name", EDITS)
def test_scores_are_edited_as_by_the_processors(library: Any, name: str) -> None:
    """Rows of 1, 2, 30 and 150 tokens, in a buffer whose rest has others: equal bits."""
    scores, rules = scores_of("peaked", 203), TokenRules.of(EDITS[name])
    tokens = torch.randint(0, 9, (4, 160), generator=torch.Generator().manual_seed(0))
    lengths, edited = [1, 2, 30, 150], scores.clone()
    ends = torch.tensor([rules.ends] * 4, dtype=torch.int64).view(4, -1)
    table = packed(rules, 4, length=lengths)
    call(library, "edit_scores", (4,), THREADS, (edited, table, tokens, ends, None, 1, 160, ends.shape[1], 203))
    for row, length in enumerate(lengths):
        expected = scores[row : row + 1]
        for processor in EDITS[name]:
            expected = processor(tokens[row : row + 1, :length], expected)
        assert torch.equal(edited[row : row + 1], expected)
    together = scores.clone()  # the same rules and length for all
    call(
        library, "edit_scores", (4,), THREADS,
        (together, packed(rules, 1), tokens, ends[:1], torch.tensor([29]), 0, 160, ends.shape[1], 203),
    )  # fmt: skip
    assert torch.equal(together[2], edited[2])


def test_variates_are_those_of_philox(library: Any) -> None:
    """The known answer for zeros (kat_vectors of Random123), by one thread that draws four: the largest has the smallest variate."""
    words = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    chosen, rules = torch.zeros(1, dtype=torch.int64), packed(TokenRules.of([]), 1, place=0)
    call(library, "choose_tokens", (1,), THREADS, (torch.zeros((1, 4)), rules, None, chosen, None, 1, 4, 1, 0))
    assert chosen.item() == words.index(max(words))
