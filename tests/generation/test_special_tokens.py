"""Start, end and padding tokens from the config, the generation config or arguments; lists of them; one start for each row."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from t5_trt import TRTT5ForConditionalGeneration
from t5_trt.errors import InputError
from tests.tiny_models import batch, make_hugging_face

IDS = {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
#: name -> (in the config, in the generation config)
PLACES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "config only": (IDS, {}),
    "generation config only": ({}, IDS),
    "a start in the generation config": ({"eos_token_id": 1, "pad_token_id": 0}, {"decoder_start_token_id": 4}),
    "a first token instead of a start": ({}, {"bos_token_id": 5, "eos_token_id": 1}),
    "one start for each row": ({}, {**IDS, "decoder_start_token_id": [3, 4, 5], "eos_token_id": [1, 59, 26]}),
    "none": ({}, {}),
}
ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"decoder_start_token_id": 7, "eos_token_id": torch.tensor([1, 59])},
    {"decoder_start_token_id": [3, 4, 5], "pad_token_id": 9},
    {"decoder_start_token_id": torch.tensor([3, 4, 5]), "num_beams": 3},
    {"bos_token_id": 6, "do_sample": True},
    {"decoder_start_token_id": 2, "decoder_input_ids": torch.tensor([[0, 9], [4, 8], [5, 9]])},
]


def outcome(model: Any, **request: Any) -> Any:
    torch.manual_seed(1)
    try:
        return model.generate(**batch(), max_new_tokens=5, **request).tolist()
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("place", PLACES)
def test_special_tokens_are_found_where_the_hugging_face_class_finds_them(place: str) -> None:
    hugging_face = make_hugging_face("t5-v1.1")
    for target, values in zip((hugging_face.config, hugging_face.generation_config), PLACES[place], strict=True):
        for name in (*IDS, "bos_token_id"):
            setattr(target, name, values.get(name))
    ours = TRTT5ForConditionalGeneration.from_model(hugging_face, num_threads=1)
    for arguments in ARGUMENTS:
        assert outcome(ours, **arguments) == outcome(hugging_face, **arguments)
    labels, results = torch.tensor([[5, 6], [4, -100], [7, 8]]), []
    for model in (hugging_face, ours):
        try:
            with torch.no_grad():
                results.append(model(**batch(), labels=labels).loss.item())
        except ValueError as error:  # forward() makes no decoder's input from labels without a start in the config
            results.append(str(error))
    if isinstance(results[0], float):
        assert results[1] == pytest.approx(results[0], abs=1e-4)
    else:
        assert "decoder_start_token_id" in results[0] and "config" in results[1], results


@pytest.mark.parametrize("name", ["forced_bos_token_id", "forced_eos_token_id"])
def test_forced_tokens_beyond_the_vocabulary_are_refused_and_negative_ones_count_from_its_end(name: str) -> None:
    hugging_face = make_hugging_face("t5-v1.1")
    ours = TRTT5ForConditionalGeneration.from_model(hugging_face, num_threads=1)
    assert outcome(ours, **{name: -3}) == outcome(hugging_face, **{name: -3})
    beyond = hugging_face.config.vocab_size
    with pytest.raises(IndexError):
        hugging_face.generate(**batch(), max_new_tokens=5, **{name: beyond})
    with pytest.raises(InputError, match=rf"got \[{beyond}\]; expected ids below {beyond}"):
        ours.generate(**batch(), max_new_tokens=5, **{name: beyond})
