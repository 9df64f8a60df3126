"""A `decoder_attention_mask` of any width: of the labels, as evaluation loops hand it over, or narrower than the prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from t5_trt import InputError
from t5_trt.compat import CACHE
from t5_trt.generation.request import GenerationPath
from tests.cases import prompt
from tests.conftest import pair_of
from tests.stand_in_tensorrt import stand_in_session
from tests.tiny_models import batch
from tests.tolerances import LOGITS_ATOL

FILLS: dict[str, list[list[int]]] = {
    "right": [[1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]],
    "left": [[1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1]],
    "a row without any": [[1, 1, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]],
    "ones": [[1] * 8] * 3,
}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "prompt": {"decoder_input_ids": prompt(3, 4)},
    "prompt without a start": {"decoder_input_ids": prompt(3, 4)[:, 1:]},
    "beams, prompt": {"decoder_input_ids": prompt(3, 4), "num_beams": 2},
}


def mask_of(fill: str, width: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(FILLS[fill], dtype=dtype).repeat(1, 2)[:, :width]


def assert_same_tokens(hugging_face: Any, ours: Any, mask: torch.Tensor, mode: str) -> None:
    rows = []
    for model in (hugging_face, ours):
        torch.manual_seed(2)
        request = {**batch(), "max_new_tokens": 7, "decoder_attention_mask": mask, **MODES[mode]}
        rows.append(model.generate(**request))
    assert torch.equal(*rows)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("width", [1, 3, 8, 16])
@pytest.mark.parametrize("fill", FILLS)
def test_generate_takes_masks_of_any_width(v11: tuple[Any, Any], fill: str, width: int, mode: str) -> None:
    assert_same_tokens(*v11, mask_of(fill, width), mode)


@pytest.mark.parametrize("kind", ["t5-v1.0", "mt5", "umt5"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_generate_takes_masks_in_every_family_and_dtype(kind: str, dtype: torch.dtype) -> None:
    for fill in FILLS:
        assert_same_tokens(*pair_of(kind), mask_of(fill, 8, dtype), "beams")


def test_mask_that_hides_nothing_stays_in_the_device_loop(v11: tuple[Any, Any]) -> None:
    wide = mask_of("right", 8)
    for mask, loop in ((mask_of("ones", 8), "device"), (wide[:1].expand(3, -1), "device"), (wide, "transformers")):
        assert_same_tokens(*v11, mask, "greedy")
        assert v11[1].last_generation_path.loop == loop
    late = torch.cat((torch.ones(3, 8, dtype=torch.int64), torch.zeros(3, 4, dtype=torch.int64)), 1)
    assert_same_tokens(*v11, late, "greedy")  # what it hides is never reached
    assert v11[1].last_generation_path == GenerationPath("device")


@pytest.mark.parametrize("engine", ["onnxruntime", "stand-in"])
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("width", [1, 3, 4, 9])
def test_forward_takes_masks_of_any_width(
    fresh: Any, monkeypatch: pytest.MonkeyPatch, engine: str, fill: str, width: int
) -> None:
    """At once and in pieces; queries that may attend to nothing attend to all keys equally."""
    if engine == "stand-in":
        fresh.session = stand_in_session(fresh, monkeypatch)
    hugging_face, inputs, ids, mask = fresh.reference, batch(), prompt(3, 3), mask_of(fill, width)
    with torch.no_grad():
        expected = hugging_face(**inputs, decoder_input_ids=ids, decoder_attention_mask=mask).logits
        got = fresh(**inputs, decoder_input_ids=ids, decoder_attention_mask=mask).logits
        torch.testing.assert_close(got, expected, atol=LOGITS_ATOL, rtol=1e-5)
        steps = []
        for model in (hugging_face, fresh):
            first = model(**inputs, decoder_input_ids=ids[:, :3], decoder_attention_mask=mask)
            more = {"decoder_input_ids": ids[:, 3:], "decoder_attention_mask": mask, CACHE: first[CACHE]}
            steps.append(model(**inputs, **more).logits)
        torch.testing.assert_close(steps[1], steps[0], atol=LOGITS_ATOL, rtol=1e-5)


def test_attentions_with_a_mask_of_the_labels(v11: tuple[Any, Any]) -> None:
    """The Hugging Face model, which serves them, gets the mask as it is."""
    request = {**batch(), "decoder_input_ids": prompt(3, 3), "decoder_attention_mask": mask_of("right", 8)}
    with torch.no_grad():
        got, expected = v11[1](**request, output_attentions=True), v11[0](**request)
    torch.testing.assert_close(got.logits, expected.logits, atol=LOGITS_ATOL, rtol=1e-5)


def test_mask_of_other_rows_is_refused(v11: tuple[Any, Any]) -> None:
    with pytest.raises(InputError, match=r"decoder_attention_mask got shape \(2, 4\); expected \[3, 4\]"):
        v11[1](**batch(), decoder_input_ids=prompt(3, 3), decoder_attention_mask=torch.zeros(2, 8))
