"""The logic around the kernels on a CPU: slots, growing caches, beams. Torch stands in for the kernels, and a recording runs its work."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.stand_in_kernels import kernels_pair
from tests.tiny_models import batch


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Any, Any]:
    return kernels_pair(monkeypatch, tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"min_new_tokens": 30}, {"num_beams": 4}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True}, {"decoder_input_ids": [[0, 5]]}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("rows", [1, 3])
def test_tokens_equal_hugging_face(pair: tuple[Any, Any], rows: int, arguments: dict[str, Any]) -> None:
    """Beyond 64 tokens, where the cache moves to a larger slot; the second call uses the slots of the first."""
    if "decoder_input_ids" in arguments:
        arguments = {"decoder_input_ids": torch.tensor(arguments["decoder_input_ids"] * rows)}
    for _ in range(2):
        made = []
        for model in pair:
            torch.manual_seed(1)
            made.append(model.generate(**batch(rows), max_new_tokens=80, **arguments))
        assert torch.equal(*made)
    ours = pair[1]
    assert ours.last_generation_path.loop == "device" and ours.session.backend == "cuda"


@torch.no_grad()
def test_source_without_any_shown_token(pair: tuple[Any, Any]) -> None:
    """It attends to its tokens equally, and not to what fills up the encoder's buffers, in the first call and in later ones."""
    hugging_face, ours = pair
    inputs = batch()
    inputs["attention_mask"][1] = 0
    expected = hugging_face.get_encoder()(**inputs).last_hidden_state
    results = [ours.get_encoder()(**inputs).last_hidden_state for _ in range(3)]
    torch.testing.assert_close(results[0], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 3}, {"min_length": 70}], ids=str)
def test_choices_by_kernels(
    steps: list[bool],
    pair: tuple[Any, Any],
    arguments: dict[str, Any],
) -> None:
    """Their reports come by mail, from the smaller slot and then from the larger one."""
    results = [model.generate(**batch(3), max_new_tokens=80, **arguments) for model in pair]
    assert torch.equal(*results) and steps and all(steps)


def test_beams_with_sources_of_their_own(
    steps: list[bool],
    pair: tuple[Any, Any],
) -> None:
    """Transformers repeats encoder states that it is given, and rows of the cache move."""
    inputs = batch(2)
    states = pair[0].get_encoder()(**inputs)
    fixed = {"attention_mask": inputs["attention_mask"], "num_beams": 3, "max_new_tokens": 70}
    results = [model.generate(encoder_outputs=copy.copy(states), **fixed) for model in pair]
    assert torch.equal(*results) and steps and all(steps)
