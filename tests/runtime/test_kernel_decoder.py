"""The logic around the kernels on a CPU: slots, growing caches, beams. Torch stands in for the kernels, and a recording runs its work."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from t5_trt.generation.decode_loop import DecodeLoop
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


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 4}], ids=str)
def test_the_host_waits_for_nothing_between_encoder_and_steps(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any]
) -> None:
    """In a call like an earlier one, on a GPU: it reads no number back, and copies no hidden states for each beam."""
    ours, seen = pair[1], []
    encode, drive = ours.session.encode, DecodeLoop._drive
    request = {**batch(3), "max_new_tokens": 6, **arguments}
    expected = ours.generate(**request)

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, given: Any = (), named: Any = None) -> Any:
            made = function(*given, **(named or {}))
            seen.append((function._schema.name, made.dim() if isinstance(made, torch.Tensor) else 0))
            return made

    def encoded(*given: Any) -> Any:
        made = encode(*given)
        seen.clear()
        return made

    def driven(*given: Any) -> Any:
        between.extend(seen)
        return drive(*given)

    between: list[tuple[str, int]] = []
    monkeypatch.setattr(ours.session, "encode", encoded)
    monkeypatch.setattr(DecodeLoop, "_drive", driven)
    with Operations():
        got = ours.generate(**request)
    assert torch.equal(got, expected) and len(between) > 5
    assert not [name for name, _ in between if name in ("aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero")]
    assert ("aten::clone", 3) not in between


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
