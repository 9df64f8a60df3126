"""What the installed Transformers calls the cache: arguments old and new, signatures, outputs, warnings, and its other rules.

Both models get the same calls under every name, and must take, refuse, warn and return alike: so the tests hold for each version.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, T5ForConditionalGeneration, generation, modeling_outputs
from transformers.utils import generic

from t5_trt import InputError, TRTT5ForConditionalGeneration
from t5_trt.compat import CACHE, orders_drawn_beams
from tests.tiny_models import batch, make_hugging_face

NAMES = ("cache", "past_key_values", "cache_params")
ONE = torch.zeros(3, 1, dtype=torch.long)


def call_forward(model: Any, **caches: Any) -> list[str]:
    with torch.no_grad():
        return list(model(**batch(), decoder_input_ids=ONE, **caches))


def call_generate(model: Any, **caches: Any) -> list[list[int]]:
    rows: list[list[int]] = model.generate(**batch(), max_new_tokens=4, min_new_tokens=4, **caches).tolist()
    return rows


def call_generate_with_attentions(model: Any, **caches: Any) -> list[list[int]]:
    request = {"max_new_tokens": 4, "min_new_tokens": 4, "output_attentions": True, "return_dict_in_generate": True}
    rows: list[list[int]] = model.generate(**batch(), **request, **caches).sequences.tolist()
    return rows


def call_preparation(model: Any, **caches: Any) -> list[str]:
    return list(model.prepare_inputs_for_generation(ONE, **caches))


def outcome(call: Callable[..., Any], model: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """What a call with a Hugging Face cache under each of the names does."""
    caches = {name: EncoderDecoderCache(DynamicCache(), DynamicCache()) for name in names}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            result = call(model, **caches)
        except ValueError as error:
            result = f"{type(error).__name__}: {error}"
    said = [str(warning.message).replace(type(model).__name__, "MODEL") for warning in seen]
    return {
        "result": result,
        "tokens": {name: cache.get_seq_length() for name, cache in caches.items()},
        # where two names are given, the warning goes on with the representation of a cache
        "warnings": [(warning.category, text.split(" Using ")[0]) for warning, text in zip(seen, said, strict=True)],
    }


@pytest.mark.parametrize("names", [*[(name,) for name in NAMES], NAMES[:2], NAMES], ids="+".join)
@pytest.mark.parametrize("call", [call_forward, call_generate, call_generate_with_attentions, call_preparation])
def test_every_name_does_what_it_does_in_the_hugging_face_class(
    v11: tuple[Any, Any], call: Callable[..., Any], names: tuple[str, ...]
) -> None:
    hugging_face = make_hugging_face("t5-v1.1", attention="eager") if call is call_generate_with_attentions else v11[0]
    expected = outcome(call, hugging_face, names)
    assert outcome(call, v11[1], names) == expected
    if names == (CACHE,):
        assert not expected["warnings"] and "Error" not in expected["result"]
        assert expected["tokens"][CACHE] == {call_forward: 1, call_preparation: 0}.get(call, 4)


def test_warnings_show_the_line_that_used_an_old_name(v11: tuple[Any, Any]) -> None:
    """As with the Hugging Face class, and not a line of this library."""
    files = []
    for model in v11:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            if CACHE == "cache":
                call_generate(model, past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()))
        files.append([warning.filename for warning in seen])
    assert files[0] == files[1] == ([__file__] if CACHE == "cache" else [])


@pytest.mark.parametrize("name", ["forward", "prepare_inputs_for_generation"])
def test_signatures(pair: tuple[Any, Any], name: str) -> None:
    """Ours has that one's parameters in its order; those that the Hugging Face class takes as kwargs come behind them."""
    hugging_face, ours = (list(inspect.signature(getattr(model, name)).parameters) for model in pair)
    assert ours[: len(hugging_face) - 1] == hugging_face[:-1] and ours[-1] == hugging_face[-1] == "kwargs"
    assert CACHE in ours and sum(known in ours for known in NAMES) == 1


def test_one_name_everywhere() -> None:
    """The library goes by one name; in Hugging Face's outputs, and in what `generate` returns, it is the same."""
    outputs = (
        modeling_outputs.Seq2SeqLMOutput,
        generation.utils.GenerateEncoderDecoderOutput,
        generation.utils.GenerateBeamEncoderDecoderOutput,
    )
    for kind in outputs:
        assert [name for name in NAMES if name in kind.__dataclass_fields__] == [CACHE]


@pytest.mark.parametrize(
    "arguments",
    [{}, {"num_beams": 3}, {"num_beams": 3, "output_scores": True}, {"output_logits": True}, {"use_cache": False}],
    ids=str,
)
def test_names_in_results(v11: tuple[Any, Any], arguments: dict[str, Any]) -> None:
    """Fields, their order and the old names that results answer to."""
    seen = []
    for model in v11:
        out = model.generate(**batch(), max_new_tokens=4, return_dict_in_generate=True, **arguments)
        seen.append((type(out), list(out), [hasattr(out, name) and name in out for name in NAMES]))
    assert seen[0] == seen[1]
    assert (CACHE in seen[0][1]) is arguments.get("use_cache", True)


def test_no_old_name_is_used_inside(v11: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs log the use of an old name once in a process, and arguments warn: neither comes from this library."""
    hugging_face, ours = v11
    monkeypatch.setattr(generic.logger, "warning_once", lambda text: pytest.fail(text), raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        for arguments in ({}, {"num_beams": 2}, {"use_cache": False}, {"output_attentions": True}):
            out = ours.generate(**batch(), max_new_tokens=4, return_dict_in_generate=True, **arguments)
        out = ours(**batch(), decoder_input_ids=ONE)
        ours(**batch(), decoder_input_ids=ONE, output_attentions=True, **{CACHE: out[CACHE]})
        ours.generate(**batch(1), max_new_tokens=8, assistant_model=hugging_face)
        ours.generate(**batch(1), max_new_tokens=8, prompt_lookup_num_tokens=2)


def test_positional_cache(v11: tuple[Any, Any]) -> None:
    """It is the sixth argument in every version."""
    logits = []
    for model in v11:
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        with torch.no_grad():
            encoded = model.get_encoder()(**batch())
            for token in (0, 5):
                mask = batch()["attention_mask"]
                out = model(None, mask, torch.full((3, 1), token), None, encoded, cache)
        assert cache.get_seq_length() == 2
        logits.append(out.logits)
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=1e-4)


def test_errors_name_the_argument_as_it_is_called(v11: tuple[Any, Any]) -> None:
    other = TRTT5ForConditionalGeneration.from_model(make_hugging_face("byt5"), num_threads=1)
    foreign = EncoderDecoderCache(DynamicCache(), DynamicCache())
    v11[1](**batch(), decoder_input_ids=ONE, **{CACHE: foreign})
    with pytest.raises(InputError, match=f"^{CACHE} holds 2 layers; the decoder has 1. Pass {CACHE}=None"):
        other(**batch(), decoder_input_ids=ONE, **{CACHE: foreign})


def test_probe_leaves_the_random_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """And tells a beam search that sorts its draws from one that does not."""
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    orders_drawn_beams.__wrapped__()
    assert torch.equal(torch.rand(3), expected)
    hugging_face = T5ForConditionalGeneration._get_top_k_continuations
    for descending in (True, False):

        def changed(self: Any, descending: bool = descending, **arguments: Any) -> Any:
            scores, *more = hugging_face(self, **arguments)
            return (scores.sort(descending=descending).values, *more)

        monkeypatch.setattr(generation.GenerationMixin, "_get_top_k_continuations", changed)
        assert orders_drawn_beams.__wrapped__() is descending
