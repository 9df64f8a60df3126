"""Caches and encoder outputs that go from one of the two classes to the other, and on from there."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from t5_trt import TRTT5ForConditionalGeneration
from t5_trt.compat import CACHE
from t5_trt.generation.kv_cache import EngineCache
from tests.conftest import pair_of
from tests.stand_in_tensorrt import stand_in_session
from tests.tiny_models import batch, make_hugging_face, tokens
from tests.tolerances import LOGITS_ATOL

IDS = tokens(3, 9)


def step(model: Any, cache: Any, start: int, end: int, *, mask: bool = True, rows: Any = slice(None)) -> Any:
    inputs = batch()
    with torch.no_grad():
        hidden = model.get_encoder()(**inputs).last_hidden_state[rows]
        masks = {"attention_mask": inputs["attention_mask"][rows]} if mask else {}
        ids = IDS[rows, start:end]
        return model(encoder_outputs=(hidden,), **masks, decoder_input_ids=ids, **{CACHE: cache})


def assert_same_contents(got: Any, expected: Any) -> None:
    """Of caches, by the way in which they are looked at from outside."""
    layers, wanted = list(got), list(expected)
    assert len(layers) == len(wanted) == len(got) and got.get_seq_length() == expected.get_seq_length()
    for mine, theirs in zip(layers, wanted, strict=True):
        assert [type(entry) for entry in mine] == [type(entry) for entry in theirs]
        for one, other in zip(mine, theirs, strict=True):
            if other is not None:
                torch.testing.assert_close(one, other, atol=LOGITS_ATOL, rtol=1e-5)
    assert got.is_updated == expected.is_updated


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("order", ["ours, then theirs", "theirs, then ours", "by turns"])
def test_cache_goes_from_one_class_to_the_other(pair: tuple[Any, Any], order: str, mask: bool) -> None:
    """In place, with the cross-attention K/V, with and without the source's mask."""
    hugging_face, ours = pair
    turns = {
        "ours, then theirs": (ours, hugging_face, hugging_face),
        "theirs, then ours": (hugging_face, ours, ours),
    }.get(order, (ours, hugging_face, ours))
    cache, expected = None, None
    for model, (start, end) in zip(turns, ((0, 3), (3, 4), (4, 9)), strict=True):
        out = step(model, cache, start, end, mask=mask)
        wanted = step(hugging_face, expected, start, end, mask=mask)
        assert cache is None or out[CACHE] is cache
        cache, expected = out[CACHE], wanted[CACHE]
        torch.testing.assert_close(out.logits, wanted.logits, atol=LOGITS_ATOL, rtol=1e-5)
    assert_same_contents(cache, expected)


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_cache_of_generate_goes_on_in_the_other_class(v11: tuple[Any, Any], arguments: dict[str, Any]) -> None:
    """Both ways: what one class's generate() returns, the other one's forward() goes on with."""
    made = []
    for model in v11:
        torch.manual_seed(3)
        request = {"max_new_tokens": 6, "min_new_tokens": 6, "return_dict_in_generate": True, **arguments}
        made.append(model.generate(**batch(), **request))
    assert torch.equal(made[0].sequences, made[1].sequences)
    assert_same_contents(copy.deepcopy(made[1][CACHE]), made[0][CACHE])
    each = len(made[0].sequences) // 3 if "num_beams" not in arguments else 3
    rows = torch.arange(3).repeat_interleave(each)
    expected = step(v11[0], copy.deepcopy(made[0][CACHE]), 0, 2, rows=rows).logits
    for model, out in ((v11[0], made[1]), (v11[1], made[0])):
        torch.testing.assert_close(
            step(model, out[CACHE], 0, 2, rows=rows).logits, expected, atol=LOGITS_ATOL, rtol=1e-5
        )


@pytest.mark.parametrize("sequence", [{}, {"num_beams": 2}], ids=str)
def test_generate_goes_on_with_a_cache_of_the_other_class(v11: tuple[Any, Any], sequence: dict[str, Any]) -> None:
    """A prompt that was decoded by one class, the rest of the text by the other one's generate()."""
    results = []
    for first in v11:
        for second in v11:
            cache = None
            if not sequence:
                cache = step(first, None, 0, 3)[CACHE]
            prompt = torch.cat((torch.zeros(3, 1, dtype=torch.long), IDS[:, :3]), 1)
            caches = {} if cache is None else {CACHE: cache}
            results.append(second.generate(**batch(), decoder_input_ids=prompt, max_new_tokens=5, **caches, **sequence))
    assert all(torch.equal(result, results[0]) for result in results)


METHODS: dict[str, Callable[[Any], Any]] = {
    "length": lambda cache: [cache.get_seq_length(), cache.get_seq_length(1), len(cache), cache.get_max_length()],
    "mask sizes": lambda cache: cache.get_mask_sizes(2, 0),
    "crop": lambda cache: cache.crop(-2),
    "crop nothing": lambda cache: cache.crop(0),
    "crop all": lambda cache: cache.crop(-3),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1, 2])),
    "select by mask": lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])),
    "select by list": lambda cache: cache.batch_select_indices([0, 2]),
    "properties": lambda cache: [
        getattr(cache, name) for name, value in vars(EncoderDecoderCache).items() if isinstance(value, property)
    ],
    "is_updated": lambda cache: cache.is_updated,
    "halves": lambda cache: [type(cache.self_attention_cache), cache.cross_attention_cache.get_seq_length()],
    "layers": lambda cache: [len(cache.self_attention_cache.layers), cache.self_attention_cache.layers[0].keys.shape],
    "no layers of its own": lambda cache: [hasattr(cache, name) for name in ("layers", "is_initialized", "batch_size")],
    "an attribute of the user's": lambda cache: [setattr(cache, "mine", 3), cache.mine, hasattr(cache, "other")],
    "class": lambda cache: isinstance(cache, EncoderDecoderCache),
}  # fmt: skip


@pytest.mark.parametrize("handed_over", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_cache_answers_as_the_hugging_face_class(v11: tuple[Any, Any], name: str, handed_over: bool) -> None:
    """As an engine's cache, and after other code has asked for its contents."""
    caches = [step(model, None, 0, 3)[CACHE] for model in v11]
    assert isinstance(caches[1], EngineCache)
    if handed_over:
        assert caches[1].cross_attention_cache is not None
    hugging_face, ours = (METHODS[name](cache) for cache in caches)
    assert ours == hugging_face
    assert_same_contents(caches[1], caches[0])


@pytest.mark.parametrize("name", ["crop", "reorder", "repeat", "select"])
def test_changed_cache_goes_on(v11: tuple[Any, Any], name: str) -> None:
    """In both classes, after the change was made to an engine's cache."""
    rows = {"reorder": [2, 0, 0], "repeat": [0, 0, 1, 1, 2, 2], "select": [1, 2]}.get(name, [0, 1, 2])
    logits = []
    for first, second in ((v11[0], v11[0]), (v11[1], v11[1]), (v11[1], v11[0])):
        cache = step(first, None, 0, 3)[CACHE]
        METHODS[name](cache)
        logits.append(step(second, cache, 3, 5, rows=torch.tensor(rows)).logits)
    for got in logits[1:]:
        torch.testing.assert_close(got, logits[0], atol=LOGITS_ATOL, rtol=1e-5)


def test_masks_belong_to_places_not_to_rows(v11: tuple[Any, Any]) -> None:
    """After a reordering the same mask tensor hides what it hides by place, as in the Hugging Face class."""
    inputs, logits = batch(), []
    for model in v11:
        with torch.no_grad():
            hidden = model.get_encoder()(**inputs).last_hidden_state
            request = {"encoder_outputs": (hidden,), "attention_mask": inputs["attention_mask"]}
            cache = model(**request, decoder_input_ids=IDS[:, :3])[CACHE]
            cache.reorder_cache(torch.tensor([1, 0, 2]))
            logits.append(model(**request, decoder_input_ids=IDS[:, 3:4], **{CACHE: cache}).logits)
    torch.testing.assert_close(logits[1], logits[0], atol=LOGITS_ATOL, rtol=1e-5)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "torch.save": lambda cache: torch.load(io.BytesIO(_saved(cache)), weights_only=False),
}


def _saved(cache: Any) -> bytes:
    file = io.BytesIO()
    torch.save(cache, file)
    return file.getvalue()


@pytest.mark.parametrize("engine", ["onnxruntime", "stand-in"])
@pytest.mark.parametrize("name", COPIES)
def test_copies_of_a_cache_are_independent(fresh: Any, monkeypatch: pytest.MonkeyPatch, engine: str, name: str) -> None:
    if engine == "stand-in":
        fresh.session = stand_in_session(fresh, monkeypatch)
    cache = step(fresh, None, 0, 3)[CACHE]
    step(fresh, cache, 3, 4)  # a step of one token leaves bindings behind
    other = COPIES[name](cache)
    expected = step(fresh, cache, 4, 6).logits
    assert other.get_seq_length() == 4 and cache.get_seq_length() == 6
    torch.testing.assert_close(step(fresh, other, 4, 6).logits, expected, atol=LOGITS_ATOL, rtol=1e-5)


def test_shallow_copy_shares_its_contents(v11: tuple[Any, Any]) -> None:
    lengths = []
    for model in v11:
        cache = step(model, None, 0, 3)[CACHE]
        other = copy.copy(cache)
        step(model, cache, 3, 5)
        lengths.append((cache.get_seq_length(), other.get_seq_length()))
    assert lengths[0] == lengths[1] == (5, 5)


def test_contents_stay_live(v11: tuple[Any, Any]) -> None:
    """A half of the cache that somebody holds grows with it, and what is written into it counts."""
    lengths, logits = [], []
    for model in v11:
        cache = step(model, None, 0, 3)[CACHE]
        own, cross = cache.self_attention_cache, cache.cross_attention_cache
        keys = own.layers[0].keys
        step(model, cache, 3, 4)
        lengths.append((own.get_seq_length(), cross.get_seq_length(), keys.shape[2]))
        for layer in own.layers:
            layer.values.mul_(-1.0)
        logits.append(step(model, cache, 4, 5).logits)
    assert lengths[0] == lengths[1] and lengths[0][0] == 4
    torch.testing.assert_close(logits[1], logits[0], atol=LOGITS_ATOL, rtol=1e-5)


def test_cache_advances_where_the_hugging_face_model_serves_the_call(v11: tuple[Any, Any]) -> None:
    cache = step(v11[1], None, 0, 3)[CACHE]
    with torch.no_grad():
        out = v11[1](**batch(), decoder_input_ids=IDS[:, 3:4], output_attentions=True, **{CACHE: cache})
    assert out[CACHE] is cache and cache.get_seq_length() == 4
    expected = step(v11[0], None, 0, 5).logits[:, 4:]
    torch.testing.assert_close(step(v11[1], cache, 4, 5).logits, expected, atol=LOGITS_ATOL, rtol=1e-5)


def test_static_cache_is_written_in_place(v11: tuple[Any, Any]) -> None:
    logits = []
    for model in v11:
        halves = (StaticCache(model.config, max_cache_len=size) for size in (12, 11))
        cache = EncoderDecoderCache(*halves)
        for start, end in ((0, 3), (3, 4), (4, 6)):
            out = step(model, cache, start, end)
        logits.append(out.logits)
    torch.testing.assert_close(logits[1], logits[0], atol=LOGITS_ATOL, rtol=1e-5)


@pytest.mark.parametrize("kind", ["t5-v1.0", "t5-v1.1", "mt5", "umt5"])
@pytest.mark.parametrize("arguments", [{}, {"num_beams": 3}, {"num_beams": 2, "do_sample": True}], ids=str)
def test_encoder_outputs_go_to_the_other_class(kind: str, arguments: dict[str, Any]) -> None:
    hugging_face, ours = pair_of(kind)
    mask, results = batch()["attention_mask"], []
    for first in (hugging_face, ours):
        for second in (hugging_face, ours):
            with torch.no_grad():
                encoded = first.get_encoder()(**batch())
            torch.manual_seed(5)
            request = {"encoder_outputs": encoded, "attention_mask": mask, "max_new_tokens": 8}
            results.append(second.generate(**request, **arguments))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("sample", [False, True])
def test_assisted_generation_mixes_the_classes(v11: tuple[Any, Any], sample: bool) -> None:
    small = make_hugging_face("t5-v1.1", seed=0, num_layers=1)
    small_ours = TRTT5ForConditionalGeneration.from_model(small, num_threads=1)
    rows = []
    for model in v11:
        for assistant in (small, small_ours):
            torch.manual_seed(4)
            request = {"max_new_tokens": 15, "do_sample": sample, "return_dict_in_generate": True}
            out = model.generate(**batch(1), assistant_model=assistant, **request)
            rows.append((out.sequences.tolist(), out[CACHE].get_seq_length()))
    assert all(row == rows[0] for row in rows)


def test_empty_cache_of_ours_in_the_hugging_face_model(v11: tuple[Any, Any]) -> None:
    """As code of the user's hands it on that `generate()` calls (custom_generate)."""
    cache = EngineCache(2)
    got = step(v11[0], cache, 0, 3)
    assert type(cache.self_attention_cache) is DynamicCache and cache.get_seq_length() == 3
    torch.testing.assert_close(got.logits, step(v11[0], None, 0, 3).logits)
