"""The kernels of the choice of tokens against torch's operations on the same GPU."""

from __future__ import annotations

import pytest
import torch

from t5_trt.generation.processors import CapturableProcessors, capturable_processors
from t5_trt.generation.token_rules import DeviceRules, TokenRules
from t5_trt.runtime import cuda_kernels
from t5_trt.serving.ruled_choice import draws_as_torch
from tests.kernels.test_token_choice_emulated import EDITS, WARPS, packed, scores_of

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)
ROWS = 37


def rows_of(kind: str, vocabulary: int) -> torch.Tensor:
    return torch.cat([scores_of(kind, vocabulary)] * 10)[:ROWS].to(GPU)


@pytest.mark.parametrize("vocabulary", [5, 1003, 32128, 250_112, 600_000])
def test_generators_draw_what_torch_draws(vocabulary: int) -> None:
    assert draws_as_torch(vocabulary, GPU)


@pytest.mark.parametrize("vocabulary", [1003, 32128, 250_112])
@pytest.mark.parametrize("kind", ["peaked", "flat", "hidden"])
@pytest.mark.parametrize("name", WARPS)
def test_draws_are_those_of_the_warpers(name: str, kind: str, vocabulary: int) -> None:
    """All rows at once and each alone; a token at the very edge of top-p may differ, which these scores hardly have."""
    scores = rows_of(kind, vocabulary)
    forms = CapturableProcessors(capturable_processors(WARPS[name], vocabulary, 64, GPU) or [])
    expected = forms(
        torch.zeros((ROWS, 64), dtype=torch.int64, device=GPU), torch.zeros(1, dtype=torch.int64, device=GPU), scores
    )
    variates = torch.empty_like(scores).exponential_(generator=torch.Generator(GPU).manual_seed(3))
    table, chosen = packed(TokenRules.of(WARPS[name]), ROWS, GPU), torch.zeros(ROWS, dtype=torch.int64, device=GPU)
    cuda_kernels.choose_tokens(scores, table, variates, chosen, ROWS)
    wanted = (expected.softmax(-1) / variates).argmax(-1)
    assert int((chosen != wanted).sum()) <= (1 if any("TopP" in type(each).__name__ for each in WARPS[name]) else 0)
    for row in (0, 17, ROWS - 1):
        own = torch.zeros(1, dtype=torch.int64, device=GPU)
        cuda_kernels.choose_tokens(scores[row : row + 1], table[:1], variates[row : row + 1], own, 1)
        assert own[0] == chosen[row]


def test_the_best_tokens() -> None:
    scores, chosen = rows_of("equal", 32128), torch.zeros(ROWS, dtype=torch.int64, device=GPU)
    cuda_kernels.choose_tokens(scores, packed(TokenRules.of([]), 1, GPU, draws=0), None, chosen, ROWS)
    assert torch.equal(chosen, torch.from_numpy(scores.cpu().numpy().argmax(-1)).to(GPU))  # the first of equal ones


@pytest.mark.parametrize("name", EDITS)
def test_scores_are_edited_as_by_torch(name: str) -> None:
    """Equal bits, with one length for all rows."""
    vocabulary, scores = 32128, rows_of("peaked", 32128)
    tokens = torch.randint(0, 50, (ROWS, 512), device=GPU, generator=torch.Generator(GPU).manual_seed(0))
    forms = capturable_processors(EDITS[name], vocabulary, 512, GPU)
    assert forms is not None
    torch_forms, kernels = (
        CapturableProcessors(forms, rules)
        for rules in (None, DeviceRules(TokenRules.of(EDITS[name]), GPU, draws=False))
    )
    for length in (1, 2, 29, 300, 511):
        position = torch.tensor([length - 1], device=GPU)
        expected = torch_forms(tokens, position, scores)
        assert torch.equal(kernels(tokens, position, scores.clone()), expected)
