"""Text in pieces: no half characters, and together exactly the text of all tokens."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from t5_trt.serving.handle import length
from t5_trt.serving.http.answer import Stopper
from t5_trt.serving.http.text import Decoder, TextStream

HALF = "\N{REPLACEMENT CHARACTER}"
WORDS = [
    "▁",
    "▁か",
    "な",
    "▁字",
    "a",
    "▁b",
    "。",
    ".",
    "▁.",
    "▁,",
    "n",
    "'",
    "▁'",
    "t",
    "▁n't",
    "s",
    "▁'s",
    "!",
    "▁!",
    "re",
    "▁'re",
]


def made_tokenizer(clean_up: bool = False) -> Any:
    """Sentencepiece's pieces with bytes, and sentinels as T5 has them."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = [(piece, 0.0) for piece in ["<pad>", "</s>", "<unk>", *WORDS, *bytes_]]
    core = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=True))
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<extra_id_0>", "<extra_id_1>"],
        clean_up_tokenization_spaces=clean_up,
    )


@pytest.fixture(scope="module", params=["bytes", "bytes-clean-up", "byt5", "shipped", "shipped-clean-up"])
def tokenizer(request: pytest.FixtureRequest, shipped: tuple[Any, Any, Any]) -> Any:
    clean_up = request.param.endswith("clean-up")
    if request.param.startswith("bytes"):
        return made_tokenizer(clean_up)
    if request.param == "byt5":
        return ByT5Tokenizer()
    found = copy.deepcopy(shipped[0])
    found.clean_up_tokenization_spaces = clean_up
    return found


def pieces_of(decoder: Decoder, tokens: list[int], chance: random.Random | None = None) -> list[str]:
    """Of tokens that come one by one, or some together."""
    stream, pieces, place = TextStream(decoder), [], 0
    while place < len(tokens):
        size = chance.randint(1, 5) if chance else 1
        pieces.append(stream.push(tokens[place : place + size]))
        place += size
    return [*pieces, stream.finish()]


def encoded(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text by bytes, where there are such tokens; else by the tokenizer."""
    if "<0xE3>" in tokenizer.get_vocab():
        return [token for byte in text.encode() for token in tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>"])]
    return list(tokenizer(text)["input_ids"])


def test_pieces_of_any_tokens_are_the_whole_text(tokenizer: Any) -> None:
    """Bytes that are no character, special tokens in the middle, words and spaces, in any order and number."""
    decoder, chance = Decoder(tokenizer), random.Random(3)
    words = list(range(min(len(tokenizer), 24)))
    for _ in range(150):
        kinds = chance.choice((words, range(len(tokenizer)), [*words, *encoded(tokenizer, "か字😀")]))
        tokens = chance.choices(list(kinds), k=chance.choice((1, 3, 20, 150)))
        expected = tokenizer.decode(tokens, skip_special_tokens=True)
        assert "".join(pieces_of(decoder, tokens)) == expected
        assert "".join(pieces_of(decoder, tokens, chance)) == expected


def test_pieces_have_no_half_characters(tokenizer: Any) -> None:
    tokens = encoded(tokenizer, "がっこう、かな。" * 20)
    pieces = pieces_of(Decoder(tokenizer), tokens)
    assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=True)
    assert not [piece for piece in pieces if HALF in piece]


def test_text_comes_with_its_token(shipped: tuple[Any, Any, Any]) -> None:
    """It does not wait for a space, which Japanese has not."""
    tokenizer = shipped[0]
    tokens = tokenizer.convert_tokens_to_ids(["▁", "sa", "ku", "ra", "ga"])
    assert pieces_of(Decoder(tokenizer), tokens) == ["", "sa", "ku", "ra", "ga", ""]


def test_bytes_wait_for_the_end_of_their_run() -> None:
    """One more byte that fits nowhere makes none of them a character."""
    tokenizer = made_tokenizer()
    good, bad = encoded(tokenizer, "字"), tokenizer.convert_tokens_to_ids(["<0xFF>"])
    word = tokenizer.convert_tokens_to_ids(["な"])
    assert pieces_of(Decoder(tokenizer), [*good, *word]) == ["", "", "", "字な", ""]
    assert pieces_of(Decoder(tokenizer), [*good, *bad, *word]) == ["", "", "", "", f"{HALF * 4}な", ""]
    assert pieces_of(Decoder(tokenizer), good) == ["", "", "", "字"]


def test_no_more_than_a_window_is_decoded_for_a_token(shipped: tuple[Any, Any, Any]) -> None:
    tokenizer = shipped[0]
    decoder, sizes = Decoder(tokenizer), []
    text_of = decoder.text

    def text(tokens: list[int]) -> str:
        sizes.append(len(tokens))
        return text_of(tokens)

    decoder.text = text  # type: ignore[method-assign]
    stream = TextStream(decoder)
    for token in tokenizer("がっこうへいく" * 100)["input_ids"]:
        stream.push([token])
    assert len(sizes) > 500 and max(sizes) < 100


@pytest.mark.parametrize("stops", [("ab",), ("aab", "b"), ("abab", "c"), ("。",), ()])
def test_a_stop_cuts_pieces_as_it_cuts_the_whole(stops: tuple[str, ...]) -> None:
    chance = random.Random(5)
    for _ in range(200):
        text = "".join(chance.choices("aabc。", k=chance.randint(0, 12)))
        stopper, found = Stopper(stops), ""
        for character in text:
            found += stopper.push(character)
            if stopper.stopped:
                break
        else:
            found += stopper.push("", last=True)
        first = (
            min((text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text)
            if stopper.stopped
            else None
        )
        assert found == (text if first is None else text[: first[1]])
        assert stopper.stopped == any(stop in text for stop in stops)


def test_length_ends_with_the_first_end_token() -> None:
    assert length([5, 6, 1, 0, 0], frozenset({1})) == (3, True)
    assert length([5, 6, 7], frozenset({1})) == (3, False)
    assert length([], frozenset({1})) == (0, False)
