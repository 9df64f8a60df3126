"""The device loop's own logic: forms of processors, draws, dropped rows, steps ahead, programs that are used again."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process as transformers_processors

from t5_trt import TRTT5ForConditionalGeneration
from t5_trt.compat import CACHE
from t5_trt.generation import decode_loop
from t5_trt.generation.processor_forms import CAPTURABLE
from t5_trt.generation.processors import (
    CapturableProcessors,
    capturable_processors,
    fingerprint,
    is_capturable,
)
from t5_trt.generation.request import GenerationPath
from t5_trt.generation.sampling import draw
from t5_trt.modeling import generate as generate_module
from t5_trt.runtime import engine_step, step_buffers
from t5_trt.runtime.cuda_graph import CaptureError
from t5_trt.runtime.kv_buffers import DecoderState
from tests.cases import (
    CORE,
    ENDS,
    MORE,
    OTHER_LOOP,
    OTHER_NUMBERS,
    PROCESSORS,
    LateWatcher,
    assert_same,
    hugging_face_result,
    run,
    same_values,
)
from tests.stand_in_tensorrt import stand_in_session
from tests.tiny_models import VOCAB, batch, make_hugging_face


def test_every_device_form_is_compared() -> None:
    assert {type(processor) for processor in PROCESSORS} == set(CAPTURABLE)
    assert {type(p) for p in OTHER_NUMBERS} == {type_ for type_, kind in CAPTURABLE.items() if kind.numbers}


@pytest.mark.parametrize("processor", PROCESSORS, ids=lambda p: type(p).__name__)
def test_device_form_equals_the_processor_of_transformers(processor: Any) -> None:
    forms = capturable_processors([processor], VOCAB, 32, torch.device("cpu"))
    assert forms is not None
    no_change = getattr(processor, "ngram_size", 0) == 40
    assert same_values(CapturableProcessors(forms), processor, "cpu") != no_change


@pytest.mark.parametrize("other", OTHER_NUMBERS, ids=lambda p: type(p).__name__)
def test_device_form_takes_other_numbers(other: Any) -> None:
    """And its own again; the processor that it was made from stays as it was."""
    first = next(p for p in PROCESSORS if type(p) is type(other))
    before = dict(vars(first))
    forms = capturable_processors([first], VOCAB, 32, torch.device("cpu"))
    assert forms is not None and fingerprint(first) == fingerprint(other)
    process = CapturableProcessors(forms)
    for processor in (other, first):
        process.load([processor])
        assert same_values(process, processor, "cpu")
    assert vars(first) == before


def test_numbers_of_one_list_are_written_once() -> None:
    """Also after another list, and after one whose writing did not end."""
    first, other = (
        [transformers_processors.TemperatureLogitsWarper(0.7)],
        [transformers_processors.TemperatureLogitsWarper(1.3)],
    )
    forms = capturable_processors(first, VOCAB, 32, torch.device("cpu"))
    assert forms is not None
    process, number = CapturableProcessors(forms), forms[0].numbers[0][0]
    for processors in (first, other, first):
        process.load(processors)
        written = number._version
        process.load(processors)
        assert number._version == written and same_values(process, processors[0], "cpu")
    number.fill_(9.0)
    with pytest.raises(AttributeError):
        process.load([object()])
    process.load(first)
    assert same_values(process, first[0], "cpu")


def test_subclasses_and_ignored_prompts_have_no_device_form() -> None:
    class Hotter(transformers_processors.TemperatureLogitsWarper):
        pass

    assert not is_capturable(Hotter(0.5)) and is_capturable(transformers_processors.TemperatureLogitsWarper(0.5))
    assert not is_capturable(transformers_processors.RepetitionPenaltyLogitsProcessor(1.2, prompt_ignore_length=3))


def test_fingerprints() -> None:
    few, many = (transformers_processors.TopKLogitsWarper(count) for count in (5, 20))
    assert fingerprint(few) == fingerprint(transformers_processors.TopKLogitsWarper(5)) != fingerprint(many)
    assert len({fingerprint(processor) for processor in PROCESSORS}) == len(PROCESSORS)


@pytest.mark.parametrize("count", [1, 4])
def test_draws_equal_multinomial(count: int) -> None:
    scores = torch.randn(5, 1000, generator=torch.Generator().manual_seed(1))
    results = []
    for capturable in (True, False):
        torch.manual_seed(8)
        results.append([draw(scores, count, capturable=capturable) for _ in range(20)])
    assert torch.equal(torch.stack(results[0]), torch.stack(results[1]))


def test_draws_follow_the_probabilities() -> None:
    """Chi-square of 20,000 draws over 12 tokens: below the 99.9% quantile of 11 degrees of freedom."""
    torch.manual_seed(0)
    scores = torch.linspace(-2, 2, 12)
    counts = draw(scores.expand(20_000, -1), 1, capturable=True).flatten().bincount(minlength=12)
    expected = 20_000 * scores.softmax(-1)
    assert ((counts - expected) ** 2 / expected).sum() < 31.3


@pytest.fixture(scope="module")
def on_stand_in() -> Iterator[Any]:
    """A T5 v1.1 model on the TensorRT session, with the steps ahead of a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_loop, "Watcher", LateWatcher)
        ours = TRTT5ForConditionalGeneration.from_model(make_hugging_face("t5-v1.1"), num_threads=1)
        ours.session = stand_in_session(ours, patch)
        yield ours


@pytest.mark.parametrize("name", [*CORE, *MORE])
def test_captured_steps_that_run_ahead_give_equal_results(on_stand_in: Any, name: str) -> None:
    """Every argument set on fixed buffers, padded rows, programs that earlier requests left, and late reports."""
    assert_same(run(on_stand_in, {**CORE, **MORE}[name]), hugging_face_result(name))
    reason = OTHER_LOOP.get(name, "")
    assert on_stand_in.last_generation_path == GenerationPath("transformers" if reason else "device", reason)


def test_encoder_states_of_the_hugging_face_class(on_stand_in: Any) -> None:
    """Transformers gives every beam a batch entry of its own then: 9 in engines for 16, which 3 beams do not divide."""
    hugging_face, inputs = make_hugging_face("t5-v1.1"), batch()
    expected = hugging_face.generate(**inputs, num_beams=3, max_new_tokens=9).tolist()
    with torch.no_grad():
        states = hugging_face.get_encoder()(**inputs)
    mask = inputs["attention_mask"]
    got = on_stand_in.generate(encoder_outputs=states, attention_mask=mask, num_beams=3, max_new_tokens=9)
    assert got.tolist() == expected and on_stand_in.last_generation_path == GenerationPath("device")


def test_captured_steps_are_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = TRTT5ForConditionalGeneration.from_model(make_hugging_face("t5-v1.1"), num_threads=1)
    ours.session = stand_in_session(ours, monkeypatch)
    captured, capture = [], engine_step.capture
    monkeypatch.setattr(engine_step, "capture", lambda *args: captured.append(1) or capture(*args))
    counts = []
    requests: list[dict[str, Any]] = [
        {},
        {"max_new_tokens": 90},
        {"num_beams": 2},
        {"num_beams": 2},
        {"temperature": 0.5},
        {"temperature": 0.6},
        {"temperature": 0.6, "top_k": 3},
        {"temperature": 0.5},
        {"rows": 4},
        {"rows": 4, "num_beams": 2},
        {"rows": 4, "temperature": 0.5},
    ]
    for request in requests:
        inputs = batch(request.pop("rows", 3), seed=len(counts))
        ours.generate(**inputs, **{"do_sample": "temperature" in request, "max_new_tokens": 7, **request})
        counts.append(len(captured))
    assert counts == [1, 1, 2, 2, 3, 3, 4, 4, 4, 4, 5]


def test_token_selection_that_cannot_be_captured_runs_after_the_step(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It runs after the captured step then, and is not tried again."""
    hugging_face = make_hugging_face("t5-v1.1")
    ours = TRTT5ForConditionalGeneration.from_model(hugging_face, num_threads=1)
    ours.session = stand_in_session(ours, monkeypatch)
    capture, tries = engine_step.capture, []

    def refuse(work: Any, device: torch.device, memory: Any) -> Any:
        if work.args[1] is not None:
            tries.append(1)
            work()
            raise CaptureError("operation not permitted when stream is capturing")
        return capture(work, device, memory)

    monkeypatch.setattr(engine_step, "capture", refuse)
    for arguments in ({}, {}, {"num_beams": 2}):
        request = {**batch(), "max_new_tokens": 9, **arguments}
        assert ours.generate(**request).tolist() == hugging_face.generate(**request).tolist()
    assert len(tries) == 2 and caplog.text.count("is not captured") == 2


SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "early": {"num_beams": 3, "early_stopping": True, "num_return_sequences": 2},
    "never": {"num_beams": 2, "early_stopping": "never", "length_penalty": -1.0},
}


def twelve_rows(search: str) -> dict[str, Any]:
    """A request whose rows end at very different times."""
    return {**batch(12, 11), "max_new_tokens": 60, "eos_token_id": ENDS, "pad_token_id": 3, **SEARCHES[search]}


@cache
def hugging_face_rows(search: str) -> Any:
    return make_hugging_face("t5-v1.1").generate(**twelve_rows(search)).tolist()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("engine", ["onnxruntime", "stand-in"])
def test_finished_rows_leave_the_batch(monkeypatch: pytest.MonkeyPatch, engine: str, search: str, late: bool) -> None:
    """Once half of the rows are over, the rest goes on in a smaller batch."""
    ours = TRTT5ForConditionalGeneration.from_model(make_hugging_face("t5-v1.1"), num_threads=1)
    if late:
        monkeypatch.setattr(decode_loop, "Watcher", LateWatcher)
    if engine == "stand-in":
        ours.session = stand_in_session(ours, monkeypatch)
        for rows in (1, 2, 4, 8):  # only engines that are there are used
            ours.generate(**batch(rows, 11), max_new_tokens=3, **SEARCHES[search])
    sizes = []
    select = DecoderState.select_entries
    monkeypatch.setattr(
        DecoderState, "select_entries", lambda state, kept: sizes.append(len(kept)) or select(state, kept)
    )
    assert ours.generate(**twelve_rows(search)).tolist() == hugging_face_rows(search)
    assert sizes and sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("beams", [1, 3])
def test_sources_given_once_for_each_beam(v11: tuple[Any, Any], beams: int) -> None:
    """As `generate` repeats the states of a Hugging Face encoder; entries that are over are not dropped then."""
    hugging_face, ours = v11
    inputs = batch(12, 11)
    with torch.no_grad():
        states = hugging_face.get_encoder()(**inputs)
    request = {"attention_mask": inputs["attention_mask"], "num_beams": beams, "max_new_tokens": 60}
    ends: dict[str, Any] = {"eos_token_id": ENDS, "pad_token_id": 3}
    expected = hugging_face.generate(input_ids=inputs["input_ids"], **request, **ends).tolist()
    assert ours.generate(encoder_outputs=states, **request, **ends).tolist() == expected
    assert ours.last_generation_path.loop == "device"


@pytest.mark.parametrize("beams", [1, 3])
def test_steps_after_time_is_up_decode_tokens(monkeypatch: pytest.MonkeyPatch, beams: int) -> None:
    """Without a token that ends rows, Transformers fills them up with -1, which has no embedding."""
    hugging_face = make_hugging_face("t5-v1.1")
    ours = TRTT5ForConditionalGeneration.from_model(hugging_face, num_threads=1)
    ours.generation_config.eos_token_id = None
    monkeypatch.setattr(decode_loop, "Watcher", LateWatcher)
    ours.session = stand_in_session(ours, monkeypatch)
    fed, run = [], step_buffers.run_step

    def watched(slot: Any, *arguments: Any) -> None:
        fed.append(int(slot.tokens.min()))
        run(slot, *arguments)

    monkeypatch.setattr(engine_step, "run_step", watched)
    ours.generate(**batch(), max_new_tokens=60, max_time=0.0, num_beams=beams)
    assert len(fed) > 5 and min(fed) >= 0


def test_finished_rows_stay_where_leaving_would_change_results(
    v11: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    hugging_face, ours = v11
    monkeypatch.setattr(DecoderState, "select_entries", lambda *_: pytest.fail("rows were dropped"))
    for arguments in ({"do_sample": True}, {"return_dict_in_generate": True}):
        request = {**batch(12, 11), "max_new_tokens": 60, "eos_token_id": ENDS, "pad_token_id": 3, **arguments}
        results = []
        for model in (hugging_face, ours):
            torch.manual_seed(0)
            out = model.generate(**request)
            results.append(getattr(out, "sequences", out).tolist())
        assert results[0] == results[1]
        assert ours.last_generation_path.loop == "device"


def test_returned_cache_goes_on_as_in_the_hugging_face_class(v11: tuple[Any, Any]) -> None:
    """The cache of a finished request holds all tokens but the last, for every beam."""
    hugging_face, ours = v11
    for arguments in ({}, {"num_beams": 3}):
        logits = []
        for model in (hugging_face, ours):
            out = model.generate(
                **batch(), max_new_tokens=8, min_new_tokens=8, return_dict_in_generate=True, **arguments
            )
            beams = arguments.get("num_beams", 1)
            states = model.get_encoder()(**batch()).last_hidden_state.repeat_interleave(beams, 0)
            mask = batch()["attention_mask"].repeat_interleave(beams, 0)
            assert out[CACHE].get_seq_length() == 8
            token = torch.full((3 * beams, 1), 7)
            with torch.no_grad():
                step = model(
                    encoder_outputs=(states,),
                    attention_mask=mask,
                    decoder_input_ids=token,
                    **{CACHE: out[CACHE]},
                )
            logits.append(step.logits)
        torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 3}])
def test_max_time_ends_a_request(v11: tuple[Any, Any], arguments: dict[str, Any]) -> None:
    hugging_face, ours = v11
    request = {**batch(), "max_new_tokens": 500, "min_new_tokens": 500, "max_time": 1e-6, **arguments}
    expected = hugging_face.generate(**request)
    assert ours.generate(**request).tolist() == expected.tolist() and expected.shape[1] == 2


class Counter(LogitsProcessor):
    """Counts its calls and records the lengths it sees."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.lengths.append(input_ids.shape[1])
        return scores


def test_custom_code_is_called_once_a_step(on_stand_in: Any) -> None:
    counter = Counter()
    out = on_stand_in.generate(
        **batch(), max_new_tokens=20, eos_token_id=ENDS, logits_processor=LogitsProcessorList([counter])
    )
    assert counter.lengths == list(range(1, out.shape[1]))
    assert on_stand_in.last_generation_path.loop == "device"


def test_other_loops_are_named_and_logged_once(
    v11: tuple[Any, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate_module._log_once.cache_clear()
    ours = TRTT5ForConditionalGeneration.from_model(v11[0], num_threads=1)
    assert ours.last_generation_path is None
    with caplog.at_level(logging.INFO, "t5_trt"):
        for _ in range(2):
            ours.generate(**batch(), max_new_tokens=3, use_cache=False)
    assert str(ours.last_generation_path) == "transformers (use_cache=False)"
    assert caplog.text.count("use_cache=False") == 1
    ours.generate(**batch(1), max_new_tokens=5, prompt_lookup_num_tokens=2)
    assert ours.last_generation_path == GenerationPath("transformers", "this decoding method")
    ours.generate(**batch(), max_new_tokens=3, output_attentions=True, return_dict_in_generate=True)
    assert ours.last_generation_path == GenerationPath("reference", "output_attentions")
    ours.generate(**batch(), max_new_tokens=3)
    assert str(ours.last_generation_path) == "device"


def test_max_target_tokens(v11: tuple[Any, Any]) -> None:
    from t5_trt import InputError

    ours = TRTT5ForConditionalGeneration.from_model(v11[0], num_threads=1, max_target_tokens=6)
    assert ours.generate(**batch(), max_new_tokens=6, min_new_tokens=6).shape == (3, 7)
    with pytest.raises(InputError, match="max_target_tokens"):
        ours.generate(**batch(), max_new_tokens=9, min_new_tokens=9)
