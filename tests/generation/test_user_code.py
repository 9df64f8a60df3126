"""What `generate()` hands to user code belongs to it: processors, criteria, streamers and callables keep it and write into it.

Both models run the same user code; what it kept is compared when all is over, and again after another call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from t5_trt import TRTT5ForConditionalGeneration
from t5_trt.generation import decode_loop
from tests.cases import ENDS, LateWatcher, prompt
from tests.conftest import pair_of
from tests.stand_in_tensorrt import stand_in_session
from tests.tiny_models import batch, make_hugging_face
from tests.tolerances import LOGITS_ATOL

SCORES = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
ROWS_END: dict[str, Any] = {"eos_token_id": ENDS, "pad_token_id": 3}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy, rows end": ROWS_END,
    "greedy, prompt": {"decoder_input_ids": prompt(4, 4)},
    "greedy, two buckets": {"max_new_tokens": 70, "min_new_tokens": 70},
    "sampling": {"do_sample": True, "num_return_sequences": 2, "top_k": 0},  # a tie at the edge would be cut otherwise
    "sampling, prompt, rows end": {"do_sample": True, "top_k": 0, "decoder_input_ids": prompt(4, 2), **ROWS_END},
    "beams": {"num_beams": 3},
    "beams, rows end": {"num_beams": 3, "num_return_sequences": 2, **ROWS_END},
    "beams, prompt": {"num_beams": 2, "decoder_input_ids": prompt(4, 4)},
    "beams, two buckets": {"num_beams": 2, "max_new_tokens": 70, "min_new_tokens": 70},
    "beam sampling": {"num_beams": 3, "do_sample": True, "top_k": 0},
    "no cache": {"use_cache": False},
    "beams, no cache": {"num_beams": 2, "use_cache": False},
}


class Kept:
    """Keeps tensors and what they held when they were handed out."""

    def __init__(self) -> None:
        self.kept: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    def keep(self, name: str, tensor: torch.Tensor) -> None:
        self.kept.append((name, tensor, tensor.clone()))


class Processor(LogitsProcessor):
    """Keeps what it gets and what it gives; prefers even ids."""

    def __init__(self, kept: Kept, name: str) -> None:
        self.kept, self.name = kept, name

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.kept.keep(self.name + " ids", input_ids)
        self.kept.keep(self.name + " scores", scores)
        bonus = torch.zeros_like(scores)
        bonus[:, ::2] = 0.5
        self.kept.keep(self.name + " given", scores := scores + bonus)
        return scores


class Criterion(StoppingCriteria):
    """Keeps what it gets; ends rows by their last id."""

    def __init__(self, kept: Kept) -> None:
        self.kept = kept

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        assert scores is None or isinstance(scores, tuple)
        self.kept.keep("criterion ids", input_ids)
        for step in (scores or ())[-2:]:
            self.kept.keep(f"criterion scores, {len(scores)} steps", step)
        return (input_ids[:, -1] % 11 == 0) & (input_ids.shape[1] > 3)


class Streamer(BaseStreamer):
    """Keeps what it gets."""

    def __init__(self, kept: Kept) -> None:
        self.kept = kept

    def put(self, value: torch.Tensor) -> None:
        self.kept.keep("streamer", value)

    def end(self) -> None:
        self.kept.keep("end", torch.zeros(1))


def processor(kept: Kept, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"logits_processor": LogitsProcessorList([Processor(kept, "first"), Processor(kept, "second")])}


def criterion(kept: Kept, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"stopping_criteria": StoppingCriteriaList([Criterion(kept)])}


def prefix_function(kept: Kept, arguments: dict[str, Any]) -> dict[str, Any]:
    def allowed(batch_id: int, ids: torch.Tensor) -> list[int]:
        kept.keep(f"prefix of {batch_id}", ids)
        return list(range(2 + (batch_id * 17 + int(ids[-1])) % 90, 150))

    return {"prefix_allowed_tokens_fn": allowed}


def everything(kept: Kept, arguments: dict[str, Any]) -> dict[str, Any]:
    streamer = {} if arguments.get("num_beams", 1) > 1 else {"streamer": Streamer(kept)}  # beams cannot be streamed
    return {**processor(kept, arguments), **criterion(kept, arguments), **streamer, **SCORES}


def run(model: Any, arguments: dict[str, Any], seed: int = 7) -> Any:
    torch.manual_seed(seed)
    return model.generate(**batch(4), **{"max_new_tokens": 12, **arguments})


def assert_same_tensor(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert (got.dtype, got.shape, got.device) == (expected.dtype, expected.shape, expected.device)
    if got.is_floating_point():
        assert torch.equal(got.isinf(), expected.isinf())
        torch.testing.assert_close(got, expected, atol=LOGITS_ATOL, rtol=1e-5)
    else:
        assert torch.equal(got, expected)


def assert_same_kept(got: Kept, expected: Kept) -> None:
    assert [name for name, *_ in got.kept] == [name for name, *_ in expected.kept] and got.kept
    for (name, mine, mine_then), (_, theirs, theirs_then) in zip(got.kept, expected.kept, strict=True):
        assert_same_tensor(mine_then, theirs_then)
        assert_same_tensor(mine, theirs)
        assert torch.equal(mine, mine_then), f"{name} was written to"


def assert_same_result(got: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert_same_tensor(got, expected)
        return
    assert set(got) == set(expected)
    assert_same_tensor(got.sequences, expected.sequences)
    for name in ("scores", "logits"):
        assert len(got[name]) == len(expected[name])
        for mine, theirs in zip(got[name], expected[name], strict=True):
            assert_same_tensor(mine, theirs)


@pytest.fixture(scope="module")
def on_stand_in() -> Iterator[Any]:
    """A T5 v1.1 model on the TensorRT session, with reports that come late."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_loop, "Watcher", LateWatcher)
        ours = TRTT5ForConditionalGeneration.from_model(make_hugging_face("t5-v1.1"), num_threads=1)
        ours.session = stand_in_session(ours, patch)
        yield ours


def compare(hugging_face: Any, ours: Any, arguments: dict[str, Any], code: Callable[..., dict[str, Any]]) -> None:
    kepts, results = [], []
    for model in (hugging_face, ours):
        kepts.append(Kept())
        results.append(run(model, {**arguments, **code(kepts[-1], arguments)}))
        run(model, {**arguments, "decoder_input_ids": prompt(4, 1, seed=8)})  # another call writes into none of it
    assert_same_result(results[1], results[0])
    assert_same_kept(kepts[1], kepts[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("code", [prefix_function, everything])
def test_kept_tensors_stay_as_they_were(v11: tuple[Any, Any], mode: str, code: Any) -> None:
    compare(*v11, MODES[mode], code)


@pytest.mark.parametrize(
    "mode", ["greedy, rows end", "greedy, two buckets", "sampling", "beams, rows end", "beam sampling"]
)
def test_kept_tensors_stay_as_they_were_on_fixed_buffers(v11: tuple[Any, Any], on_stand_in: Any, mode: str) -> None:
    compare(v11[0], on_stand_in, MODES[mode], everything)
    assert on_stand_in.last_generation_path.loop == "device"


@pytest.mark.parametrize("code", [processor, criterion])
@pytest.mark.parametrize("mode", ["greedy", "sampling", "beams"])
def test_kept_tensors_of_one_kind_of_user_code(v11: tuple[Any, Any], mode: str, code: Any) -> None:
    compare(*v11, MODES[mode], code)


@pytest.mark.parametrize("kind", ["t5-v1.0", "mt5", "umt5"])
@pytest.mark.parametrize("mode", ["greedy, rows end", "beams, rows end"])
def test_kept_tensors_of_other_families(kind: str, mode: str) -> None:
    compare(*pair_of(kind), MODES[mode], everything)


def test_stop_strings_beside_a_criterion(shipped: tuple[Any, Any, Any]) -> None:
    tokenizer, hugging_face, ours = shipped
    inputs = tokenizer(["ウチュウ", "ネコ"], padding=True, return_tensors="pt")
    for beams in (1, 3):
        kepts, rows = [], []
        for model in (hugging_face, ours):
            kepts.append(Kept())
            request = {"stop_strings": ["u"], "tokenizer": tokenizer, "num_beams": beams, "max_new_tokens": 20}
            rows.append(model.generate(**inputs, **request, **criterion(kepts[-1], {})))
        assert torch.equal(*rows)
        assert_same_kept(kepts[1], kepts[0])


class WritesScores(LogitsProcessor):
    """Prefers even ids by writing into what it gets."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, ::2] += 0.5
        return scores


class WritesIds(LogitsProcessor):
    """Writes over the token in the middle, and then looks at it."""

    def __init__(self) -> None:
        self.seen: list[list[list[int]]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append(input_ids.tolist())
        input_ids[:, input_ids.shape[1] // 2] = 40 + input_ids.shape[1]
        return scores


class WritesLastToken(StoppingCriteria):
    """Replaces tokens that were chosen; the next step must decode the new one."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        input_ids[input_ids[:, -1] % 3 == 0, -1] = 17
        return torch.zeros(len(input_ids), dtype=torch.bool)


class WritesWhatItKept(LogitsProcessor):
    """Writes into the tensors of the step before."""

    def __init__(self) -> None:
        self.last: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.last is not None:
            self.last[0].fill_(9)
            self.last[1].fill_(-3.0)
        self.last = (input_ids, scores)
        return scores + 0.0


WRITERS: dict[str, Callable[[], dict[str, Any]]] = {
    "scores": lambda: {"logits_processor": LogitsProcessorList([WritesScores()])},
    "ids": lambda: {"logits_processor": LogitsProcessorList([WritesIds()])},
    "last token": lambda: {"stopping_criteria": StoppingCriteriaList([WritesLastToken()])},
    "what it kept": lambda: {"logits_processor": LogitsProcessorList([WritesWhatItKept()])},
    "all": lambda: {
        "logits_processor": LogitsProcessorList([WritesIds(), WritesScores(), WritesWhatItKept()]),
        "stopping_criteria": StoppingCriteriaList([WritesLastToken()]),
    },
}


@pytest.mark.parametrize("mode", [mode for mode in MODES if "two buckets" not in mode])
@pytest.mark.parametrize("writer", WRITERS)
def test_writing_into_what_was_handed_out_has_the_same_effect(v11: tuple[Any, Any], mode: str, writer: str) -> None:
    results, seen = [], []
    for model in v11:
        code = WRITERS[writer]()
        arguments = {**MODES[mode], **SCORES}
        if "decoder_input_ids" in arguments:  # the first step may write into the caller's own prompt
            arguments["decoder_input_ids"] = arguments["decoder_input_ids"].clone()
        results.append(run(model, {**arguments, **code}))
        seen.append([getattr(one, "seen", None) for one in code.get("logits_processor", ())])
        seen[-1].append(arguments.get("decoder_input_ids", torch.zeros(1)).tolist())
    assert_same_result(results[1], results[0])
    assert seen[1] == seen[0]


def test_processors_get_contiguous_rows(v11: tuple[Any, Any]) -> None:
    """`.view()` works where it does in the Hugging Face class."""

    class Views(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            assert len(input_ids.view(-1)) == input_ids.numel()
            return scores

    for arguments in ({}, {"do_sample": True}):
        run(v11[1], {**arguments, "logits_processor": LogitsProcessorList([Views()])})


def test_library_processors_beside_user_code(v11: tuple[Any, Any]) -> None:
    """They see and change the same tensors, in the same order."""
    for arguments in ({"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}, {"num_beams": 3, "bad_words_ids": [[5]]}):
        kepts, results = [], []
        for model in v11:
            kepts.append(Kept())
            processors = LogitsProcessorList(
                [Processor(kepts[-1], "first"), MinNewTokensLengthLogitsProcessor(1, 9, 1), WritesScores()]
            )
            results.append(run(model, {**arguments, **SCORES, "logits_processor": processors}))
        assert_same_result(results[1], results[0])


@pytest.mark.parametrize("mode", ["greedy", "sampling", "beams"])
def test_user_code_may_use_the_model(v11: tuple[Any, Any], mode: str) -> None:
    """Even generate() and forward(), in the middle of a request."""

    class Asks(LogitsProcessor):
        def __init__(self, model: Any) -> None:
            self.model = model

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            favourite = self.model.generate(**batch(1, 6), max_new_tokens=3)[0, -1]
            logits = self.model(**batch(1, 6), decoder_input_ids=input_ids[:1]).logits[0, -1]
            scores[:, favourite] += 1.0
            return scores + 0.1 * logits

    results = [run(m, {**MODES[mode], **SCORES, "logits_processor": LogitsProcessorList([Asks(m)])}) for m in v11]
    assert_same_result(results[1], results[0])


@pytest.mark.parametrize("engine", ["onnxruntime", "stand-in"])
@pytest.mark.parametrize("mode", ["greedy", "sampling", "beams", "beam sampling"])
def test_results_stay_as_they_were(v11: tuple[Any, Any], on_stand_in: Any, engine: str, mode: str) -> None:
    """Sequences, scores, caches and encoder states of earlier calls, whatever comes after."""
    ours = v11[1] if engine == "onnxruntime" else on_stand_in
    kept, caches = Kept(), []
    for call in range(3):
        out = run(ours, {**MODES[mode], **SCORES}, seed=call)
        encoded = ours.get_encoder()(**batch(4, seed=call))
        step = ours(**batch(4, seed=call), decoder_input_ids=prompt(4, 1 + call))
        for tensor in (out.sequences, *out.scores, *out.logits, encoded[0], step.logits, step[-1]):
            kept.keep(f"call {call}", tensor)
        for cache in (out[-1], step["cache" if "cache" in step else "past_key_values"]):
            caches.append((cache, cache.as_hugging_face()))
    assert all(torch.equal(tensor, then) for _, tensor, then in kept.kept)
    for cache, then in caches:
        for now, before in zip(cache.as_hugging_face(), then, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(now, before, strict=True) if a is not None)
