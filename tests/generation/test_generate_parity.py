"""`generate()` on engines gives what the Hugging Face class gives: the same tokens for the same arguments and torch seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from t5_trt.generation.request import GenerationPath
from tests.cases import CORE, OTHER_LOOP, assert_same, prompt, run
from tests.conftest import pair_of
from tests.tiny_models import KINDS, batch, make_hugging_face


def assert_expected_loop(model: Any, name: str) -> None:
    reason = OTHER_LOOP.get(name, "")
    assert model.last_generation_path == GenerationPath("transformers" if reason else "device", reason)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "t5-v1.1"])
@pytest.mark.parametrize("name", list(CORE))
def test_family_generates_as_hugging_face(kind: str, name: str) -> None:
    """T5 v1.1 meets these arguments and more in test_prepared.py, test_decode_loop.py and test_cuda_kernels.py."""
    hugging_face, ours = pair_of(kind)
    assert_same(run(ours, CORE[name]), run(hugging_face, CORE[name]))
    assert_expected_loop(ours, name)


def test_outputs_are_not_degenerate(pair: tuple[Any, Any]) -> None:
    """The comparison means something only if rows differ and tokens change from step to step."""
    out = run(pair[0], {"min_new_tokens": 12})
    assert out.unique().numel() >= 8
    assert len({tuple(row) for row in out.tolist()}) == len(out)


@pytest.mark.parametrize("padding", ["left", "right", "none"])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_padding_on_either_side(v10: tuple[Any, Any], padding: str, rows: int) -> None:
    hugging_face, ours = v10
    inputs = batch(rows, 9, padding=padding)
    for beams in (1, 3):
        expected = hugging_face.generate(**inputs, max_new_tokens=10, num_beams=beams)
        assert ours.generate(**inputs, max_new_tokens=10, num_beams=beams).tolist() == expected.tolist()


def test_without_attention_mask_and_positional(v11: tuple[Any, Any]) -> None:
    hugging_face, ours = v11
    ids = batch(padding="none")["input_ids"]
    assert ours.generate(ids, max_new_tokens=8).tolist() == hugging_face.generate(ids, max_new_tokens=8).tolist()


def test_a_row_without_any_key(v10: tuple[Any, Any]) -> None:
    """A row whose source is all padding attends to everything equally in both."""
    hugging_face, ours = v10
    inputs = batch()
    inputs["attention_mask"][1] = 0
    assert (
        ours.generate(**inputs, max_new_tokens=8).tolist() == hugging_face.generate(**inputs, max_new_tokens=8).tolist()
    )


def test_more_decoder_than_encoder_layers() -> None:
    """The Hugging Face class's own cache is too short there: it needs use_cache=False, we do not."""
    from t5_trt import TRTT5ForConditionalGeneration

    hugging_face = make_hugging_face("t5-v1.1", num_layers=1, num_decoder_layers=3)
    ours = TRTT5ForConditionalGeneration.from_model(hugging_face, num_threads=1)
    for arguments in ({}, {"num_beams": 3}, {"do_sample": True}):
        torch.manual_seed(2)
        expected = hugging_face.generate(**batch(), max_new_tokens=10, use_cache=False, **arguments)
        torch.manual_seed(2)
        assert ours.generate(**batch(), max_new_tokens=10, **arguments).tolist() == expected.tolist()


def test_source_beyond_the_bias_table(v11: tuple[Any, Any]) -> None:
    """Positions beyond max_distance and beyond 512 share the last bucket."""
    hugging_face, ours = v11
    inputs = batch(2, 700)
    assert (
        ours.generate(**inputs, max_new_tokens=5).tolist() == hugging_face.generate(**inputs, max_new_tokens=5).tolist()
    )


def test_three_hundred_new_tokens() -> None:
    """The cache grows three times."""
    hugging_face, ours = pair_of("byt5")
    request = {**batch(1, 6), "max_new_tokens": 300, "min_new_tokens": 300}
    assert ours.generate(**request).tolist() == hugging_face.generate(**request).tolist()


def test_prompt_in_chunks(v11: tuple[Any, Any]) -> None:
    """The loop of Transformers fails here (it cuts the encoder's mask); the result is that of the prompt in one piece."""
    hugging_face, ours = v11
    expected = run(hugging_face, {"decoder_input_ids": prompt(3, 9)})
    assert_same(run(ours, {"decoder_input_ids": prompt(3, 9), "prefill_chunk_size": 4}), expected)
