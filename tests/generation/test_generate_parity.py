"""`generate()` on engines gives what the Hugging Face class gives: the same tokens for the same arguments and torch seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    MinLengthLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
)

from t5_trt.generation.request import GenerationPath
from tests.conftest import pair_of
from tests.tiny_models import KINDS, VOCAB, batch, make_stock
from tests.tolerances import LOGITS_ATOL

SCORES = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}


class PreferEven(LogitsProcessor):
    """Adds 3 to the logits of even ids."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        bonus = torch.zeros_like(scores)
        bonus[:, ::2] = 3.0
        return scores + bonus


class StopOnMultipleOf(StoppingCriteria):
    """Ends a row when its last id is a multiple of a number."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return (input_ids[:, -1] % self.number == 0) & (input_ids.shape[1] > 3)


def only_some(batch_id: int, ids: torch.Tensor) -> list[int]:
    """Ids that a prefix constraint allows: they depend on the row and on the last token."""
    start = 2 + (batch_id * 17 + int(ids[-1])) % 90
    return list(range(start, start + 60))


def prompt(rows: int, tokens: int, seed: int = 3) -> torch.Tensor:
    ids = torch.randint(2, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return torch.cat((torch.zeros(rows, 1, dtype=torch.long), ids), 1)


#: name -> arguments of generate(), beside max_new_tokens=12
CORE: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy with scores": {**SCORES},
    "greedy, no cache": {"use_cache": False},
    "greedy past two buckets": {"max_new_tokens": 150, "min_new_tokens": 150},
    "sampling": {"do_sample": True},
    "sampling, several": {"do_sample": True, "num_return_sequences": 3, "top_k": 0},
    "beams": {"num_beams": 4},
    "beams with scores": {"num_beams": 3, "num_return_sequences": 3, **SCORES},
    "beam sampling": {"num_beams": 3, "do_sample": True, "top_k": 20},
    "prompt": {"decoder_input_ids": prompt(3, 5)},
    "min length": {"min_new_tokens": 12},
}
MORE: dict[str, dict[str, Any]] = {
    "max length": {"max_length": 7, "max_new_tokens": None},
    "min and max length": {"min_length": 6, "max_length": 9, "max_new_tokens": None},
    "no limit given": {"max_new_tokens": None},
    "temperature": {"do_sample": True, "temperature": 0.5},
    "hot": {"do_sample": True, "temperature": 2.5, "top_k": 0},
    "top-k": {"do_sample": True, "top_k": 5},
    "top-p": {"do_sample": True, "top_p": 0.6, "top_k": 0},
    "min-p": {"do_sample": True, "min_p": 0.05, "top_k": 0},
    "typical-p": {"do_sample": True, "typical_p": 0.7, "top_k": 0},
    "epsilon cutoff": {"do_sample": True, "epsilon_cutoff": 0.01, "top_k": 0},
    "eta cutoff": {"do_sample": True, "eta_cutoff": 0.01, "top_k": 0},
    "top-h": {"do_sample": True, "top_h": 0.5, "top_k": 0},
    "all warpers": {"do_sample": True, "temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.01, **SCORES},
    "sampling with scores": {"do_sample": True, "num_return_sequences": 2, **SCORES},
    "renormalized": {"do_sample": True, "top_k": 10, "renormalize_logits": True, **SCORES},
    "repetition penalty": {"repetition_penalty": 1.7},
    "repetition reward": {"repetition_penalty": 0.8, "min_new_tokens": 12},
    "encoder repetition penalty": {"encoder_repetition_penalty": 1.8},
    "no repeated bigram": {"no_repeat_ngram_size": 2, "min_new_tokens": 12},
    "no repeated token": {"no_repeat_ngram_size": 1, "min_new_tokens": 12},
    "no source bigram": {"encoder_no_repeat_ngram_size": 1},
    "forced bos": {"forced_bos_token_id": 17},
    "forced eos": {"forced_eos_token_id": 1},
    "suppressed": {"suppress_tokens": list(range(2, 120))},
    "suppressed at first": {"begin_suppress_tokens": list(range(2, 120))},
    "bad words": {"bad_words_ids": [[5], [7], [40, 41], [100, 3, 9]]},
    "sequence bias": {"sequence_bias": [[[9], 4.0], [[10, 11], -6.0]]},
    "decaying length": {"exponential_decay_length_penalty": (3, 1.8)},
    "invalid values removed": {"remove_invalid_values": True},
    "several ends": {"eos_token_id": [1, 5, 9, 20, 33, 60, 90, 120, 150]},
    "another padding": {"pad_token_id": 3, "eos_token_id": [1, 5, 9, 20, 33, 60, 90, 120, 150]},
    "another start": {"decoder_start_token_id": 8},
    "watermark": {"watermarking_config": {"bias": 2.5, "seeding_scheme": "selfhash"}},
    "guidance": {"guidance_scale": 1.0},
    "two beams, many results": {"num_beams": 5, "num_return_sequences": 5},
    "short preferred": {"num_beams": 4, "length_penalty": -1.5},
    "long preferred": {"num_beams": 4, "length_penalty": 2.0},
    "no length penalty": {"num_beams": 4, "length_penalty": 0.0},
    "early stopping": {"num_beams": 4, "early_stopping": True},
    "never early": {"num_beams": 4, "early_stopping": "never", "length_penalty": 0.5},
    "never early, short": {"num_beams": 4, "early_stopping": "never", "length_penalty": -0.5},
    "beams, min length": {"num_beams": 3, "min_new_tokens": 8},
    "beams, no repeat": {"num_beams": 3, "no_repeat_ngram_size": 2, "repetition_penalty": 1.2},
    "beams, no cache": {"num_beams": 3, "use_cache": False},
    "beams, bad words": {"num_beams": 3, "bad_words_ids": [[5], [7], [40, 41]]},
    "beams, several ends": {"num_beams": 4, "eos_token_id": [1, 5, 9, 20, 33, 60, 90, 120, 150]},
    "beams, prompt": {"num_beams": 3, "decoder_input_ids": prompt(3, 4)},
    "beams, long": {"num_beams": 2, "max_new_tokens": 90, "min_new_tokens": 90},
    "beam sampling, warm": {"num_beams": 4, "do_sample": True, "temperature": 1.7, "top_p": 0.9, "top_k": 0},
    "beam sampling, several": {"num_beams": 4, "do_sample": True, "num_return_sequences": 2, **SCORES},
    "beams, never, scores": {"num_beams": 3, "early_stopping": "never", "length_penalty": -1.0, **SCORES},
    "long prompt": {"decoder_input_ids": prompt(3, 70)},
    "prompt and mask": {
        "decoder_input_ids": prompt(3, 5),
        "decoder_attention_mask": torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1]]),
    },
    "prompt, sampling": {"decoder_input_ids": prompt(3, 3), "do_sample": True, "num_return_sequences": 2},
    "static cache wished": {"cache_implementation": "static", "disable_compile": True},
    "dynamic cache wished": {"cache_implementation": "dynamic"},
    "processor": {"logits_processor": LogitsProcessorList([PreferEven()])},
    "processors, beams": {"logits_processor": LogitsProcessorList([PreferEven()]), "num_beams": 3},
    "library processors": {
        "logits_processor": LogitsProcessorList([MinLengthLogitsProcessor(9, 1), TemperatureLogitsWarper(0.7)])
    },
    "criterion": {"stopping_criteria": StoppingCriteriaList([StopOnMultipleOf(3)]), "min_new_tokens": 12},
    "criterion, beams": {"stopping_criteria": StoppingCriteriaList([StopOnMultipleOf(5)]), "num_beams": 3},
    "ample time": {"max_time": 60.0, "stopping_criteria": StoppingCriteriaList([MaxTimeCriteria(90.0)])},
    "prefix constraint": {"prefix_allowed_tokens_fn": only_some},
    "prefix constraint, beams": {"prefix_allowed_tokens_fn": only_some, "num_beams": 3},
    "config object": {"generation_config": GenerationConfig(num_beams=2, no_repeat_ngram_size=3, max_new_tokens=9)},
    "low memory": {"num_beams": 2, "low_memory": None},
}


#: argument sets that Transformers' own loop must run, with the reason that is given
OTHER_LOOP = {
    "greedy, no cache": "use_cache=False",
    "beams, no cache": "use_cache=False",
    "prompt and mask": "a decoder_attention_mask that hides tokens",
}


def run(model: Any, arguments: dict[str, Any], seed: int = 11) -> Any:
    torch.manual_seed(seed)
    return model.generate(**batch(), **{"max_new_tokens": 12, **arguments})


def assert_same(ours: Any, expected: Any, atol: float = LOGITS_ATOL) -> None:
    if isinstance(expected, torch.Tensor):
        assert ours.tolist() == expected.tolist()
        return
    assert ours.sequences.tolist() == expected.sequences.tolist()
    assert set(ours.keys()) == set(expected.keys())
    for name in ("scores", "logits"):
        for left, right in zip(ours[name], expected[name], strict=True):
            assert torch.equal(left.isinf(), right.isinf())
            torch.testing.assert_close(left, right, atol=atol, rtol=1e-5)
    if "sequences_scores" in expected:
        torch.testing.assert_close(ours.sequences_scores, expected.sequences_scores, atol=atol, rtol=1e-5)
        assert ours.beam_indices.tolist() == expected.beam_indices.tolist()


def assert_expected_loop(model: Any, name: str) -> None:
    reason = OTHER_LOOP.get(name, "")
    assert model.last_generation_path == GenerationPath("transformers" if reason else "device", reason)


def test_there_are_at_least_sixty_argument_sets() -> None:
    assert len(CORE) + len(MORE) >= 60


@pytest.mark.parametrize("name", [*CORE, *MORE])
def test_v11_generates_as_stock(v11: tuple[Any, Any], name: str) -> None:
    arguments = {**CORE, **MORE}[name]
    assert_same(run(v11[1], arguments), run(v11[0], arguments))
    assert_expected_loop(v11[1], name)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "t5-v1.1"])
@pytest.mark.parametrize("name", list(CORE))
def test_family_generates_as_stock(kind: str, name: str) -> None:
    stock, ours = pair_of(kind)
    assert_same(run(ours, CORE[name]), run(stock, CORE[name]))
    assert_expected_loop(ours, name)


def test_outputs_are_not_degenerate(pair: tuple[Any, Any]) -> None:
    """The comparison means something only if rows differ and tokens change from step to step."""
    out = run(pair[0], {"min_new_tokens": 12})
    assert out.unique().numel() >= 8
    assert len({tuple(row) for row in out.tolist()}) == len(out)


@pytest.mark.parametrize("padding", ["left", "right", "none"])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_padding_on_either_side(v10: tuple[Any, Any], padding: str, rows: int) -> None:
    stock, ours = v10
    inputs = batch(rows, 9, padding=padding)
    for beams in (1, 3):
        expected = stock.generate(**inputs, max_new_tokens=10, num_beams=beams)
        assert ours.generate(**inputs, max_new_tokens=10, num_beams=beams).tolist() == expected.tolist()


def test_without_attention_mask_and_positional(v11: tuple[Any, Any]) -> None:
    stock, ours = v11
    ids = batch(padding="none")["input_ids"]
    assert ours.generate(ids, max_new_tokens=8).tolist() == stock.generate(ids, max_new_tokens=8).tolist()


def test_a_row_without_any_key(v10: tuple[Any, Any]) -> None:
    """A row whose source is all padding attends to everything equally in both."""
    stock, ours = v10
    inputs = batch()
    inputs["attention_mask"][1] = 0
    assert ours.generate(**inputs, max_new_tokens=8).tolist() == stock.generate(**inputs, max_new_tokens=8).tolist()


def test_more_decoder_than_encoder_layers() -> None:
    """The Hugging Face class's own cache is too short there: it needs use_cache=False, we do not."""
    from t5_trt import TRTT5ForConditionalGeneration

    stock = make_stock("t5-v1.1", num_layers=1, num_decoder_layers=3)
    ours = TRTT5ForConditionalGeneration.from_model(stock, num_threads=1)
    for arguments in ({}, {"num_beams": 3}, {"do_sample": True}):
        torch.manual_seed(2)
        expected = stock.generate(**batch(), max_new_tokens=10, use_cache=False, **arguments)
        torch.manual_seed(2)
        assert ours.generate(**batch(), max_new_tokens=10, **arguments).tolist() == expected.tolist()


def test_source_beyond_the_bias_table(v11: tuple[Any, Any]) -> None:
    """Positions beyond max_distance and beyond 512 share the last bucket."""
    stock, ours = v11
    inputs = batch(2, 700)
    assert ours.generate(**inputs, max_new_tokens=5).tolist() == stock.generate(**inputs, max_new_tokens=5).tolist()


def test_six_hundred_new_tokens() -> None:
    stock, ours = pair_of("byt5")
    request = {**batch(1, 6), "max_new_tokens": 600, "min_new_tokens": 600}
    assert ours.generate(**request).tolist() == stock.generate(**request).tolist()


def test_prompt_in_chunks(v11: tuple[Any, Any]) -> None:
    """The stock loop fails here (it cuts the encoder's mask); the result is that of the prompt in one piece."""
    stock, ours = v11
    expected = run(stock, {"decoder_input_ids": prompt(3, 9)})
    assert_same(run(ours, {"decoder_input_ids": prompt(3, 9), "prefill_chunk_size": 4}), expected)
