"""`generate_many`: order, batches, arguments; and `generate()` from several threads."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from t5_trt import InputError, TRTT5ForConditionalGeneration, generate_many
from tests.tiny_models import batch, make_hugging_face

TEXTS = ["がっこう", "さくら", "こんにちは せかい", "", "とうきょう おおさか なごや", "ねこ", "いぬ"]


def test_results_in_the_order_of_the_input(shipped: tuple[Any, Any, Any]) -> None:
    tokenizer, hugging_face, ours = shipped
    expected = []
    for text in TEXTS:
        rows = hugging_face.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=40)
        expected += tokenizer.batch_decode(rows, skip_special_tokens=True)
    for options in ({}, {"batch_size": 2}, {"batch_size": 3, "sort_by_length": False}):
        assert list(generate_many(ours, tokenizer, TEXTS, max_new_tokens=40, **options)) == expected
    assert list(generate_many(hugging_face, tokenizer, iter(TEXTS), max_new_tokens=40, batch_size=2)) == expected


def test_longest_first_and_several_results(shipped: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, _, ours = shipped
    shapes, generate = [], type(ours).generate

    def spy(self: Any, **arguments: Any) -> Any:
        shapes.append(tuple(arguments["input_ids"].shape))
        return generate(self, **arguments)

    monkeypatch.setattr(type(ours), "generate", spy)
    results = list(
        generate_many(ours, tokenizer, TEXTS, batch_size=3, num_beams=3, num_return_sequences=2, max_new_tokens=30)
    )
    assert [rows for rows, _ in shapes] == [3, 3, 1]
    lengths = [length for _, length in shapes]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > lengths[-1]
    assert all(len(found) == 2 for found in results) and results[1][0] == "sakura"


def test_long_texts_are_cut_where_asked(shipped: tuple[Any, Any, Any]) -> None:
    tokenizer, _, ours = shipped
    short = list(generate_many(ours, tokenizer, ["さくら " * 30], max_source_tokens=8, max_new_tokens=90))
    assert 0 < len(short[0]) < 30


def test_progress(shipped: tuple[Any, Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer, _, ours = shipped
    list(generate_many(ours, tokenizer, TEXTS, show_progress=True, max_new_tokens=5))
    assert "7/7" in capsys.readouterr().err
    list(generate_many(ours, tokenizer, TEXTS, max_new_tokens=5))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ("one", {}, "one string"),
        (["a", 3], {}, r"texts\[1\] got int"),
        (["a"], {"batch_size": 0}, "batch_size got 0"),
        (["a"], {"return_dict_in_generate": True}, "gives text"),
    ],
)
def test_bad_arguments_are_refused_at_once(
    shipped: tuple[Any, Any, Any], texts: Any, options: dict[str, Any], message: str
) -> None:
    tokenizer, _, ours = shipped
    with pytest.raises(InputError, match=message):
        generate_many(ours, tokenizer, texts, **options)


def test_nothing_to_do(shipped: tuple[Any, Any, Any]) -> None:
    assert list(generate_many(shipped[2], shipped[0], [])) == []


def in_threads(works: list[Any]) -> list[Any]:
    results: list[Any] = [None] * len(works)

    def run(place: int) -> None:
        results[place] = works[place]()

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_threads_on_one_model(v11: tuple[Any, Any]) -> None:
    hugging_face, ours = v11
    requests = [{**batch(1 + n % 4, 8 + n, seed=n), "max_new_tokens": 25, "num_beams": 1 + n % 3} for n in range(8)]
    expected = [hugging_face.generate(**request).tolist() for request in requests]
    got = in_threads([lambda request=request: ours.generate(**request).tolist() for request in requests])
    assert got == expected


def test_threads_on_two_models() -> None:
    """Each model has its own lock: one generates while another is in the middle of a request."""
    hugging_face_models = [make_hugging_face("t5-v1.1", seed=seed) for seed in (0, 1)]
    models = [
        TRTT5ForConditionalGeneration.from_model(hugging_face, num_threads=1) for hugging_face in hugging_face_models
    ]
    expected = [hugging_face.generate(**batch(), max_new_tokens=25).tolist() for hugging_face in hugging_face_models]
    meeting = threading.Barrier(2, timeout=60)  # broken unless both models are inside a request at once

    class Meet:
        met = False

        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if not self.met:
                self.met = True
                meeting.wait()
            return scores

    works = [
        lambda model=model: model.generate(**batch(), max_new_tokens=25, logits_processor=[Meet()]).tolist()
        for model in models
    ]
    assert in_threads(works) == expected
