"""Tokenizers of all kinds that a T5 may come with: what they return besides ids, and what they lack."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, BertTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast, T5Config

from t5_trt import InputError, TRTT5ForConditionalGeneration, cli, compare, generate_many
from t5_trt.tools.sample_texts import sample_texts
from tests.tiny_models import VOCAB, make_hugging_face

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *ascii_lowercase, *(f"##{letter}" for letter in ascii_lowercase)]
TEXTS = ["a b", "a", "b b a b a", "c"]


def bert(folder: Path) -> Any:
    """With token types."""
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    return BertTokenizer(str(folder / "vocab.txt"))


def words(folder: Path, **special: str) -> Any:
    """Neither padding nor end token, unless they are given."""
    known = ["<pad>", "</s>", "<unk>", "a", "b", *(f"w{number}" for number in range(5, VOCAB))]
    made = Tokenizer(models.WordLevel({word: place for place, word in enumerate(known)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if "eos_token" in special:
        made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", **special)


MAKERS: dict[str, Callable[[Path], Any]] = {
    "token types": bert,
    "no padding token": words,
    "no padding token, an end": lambda folder: words(folder, eos_token="</s>"),
    "padding on the left": lambda folder: words(folder, pad_token="<pad>", padding_side="left"),
    "slow, of bytes": lambda folder: ByT5Tokenizer(extra_ids=0),
}


@pytest.fixture(params=MAKERS)
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any, Any, str]:
    """(tokenizer, Hugging Face's model, ours, their folder)."""
    tokenizer = MAKERS[request.param](tmp_path)
    vocabulary = 259 if request.param == "slow, of bytes" else VOCAB
    hugging_face = make_hugging_face("t5-v1.1", vocab_size=vocabulary)
    hugging_face.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return (
        tokenizer,
        hugging_face,
        TRTT5ForConditionalGeneration.from_pretrained(tmp_path, num_threads=1),
        str(tmp_path),
    )


def test_texts_give_what_hugging_face_gives_for_each_alone(kept: tuple[Any, Any, Any, str]) -> None:
    tokenizer, hugging_face, ours, folder = kept
    expected = []
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        tokens = hugging_face.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8)
        expected += tokenizer.batch_decode(tokens, skip_special_tokens=True)
    assert len(set(expected)) > 1
    assert list(generate_many(ours, tokenizer, TEXTS, batch_size=3, max_new_tokens=8)) == expected
    assert list(generate_many(hugging_face, tokenizer, TEXTS, batch_size=4, max_new_tokens=8)) == expected
    found = compare(ours, hugging_face, TEXTS, max_new_tokens=8)
    assert found.equal == found.sequences == len(TEXTS) and found.relative_logit_error < 1e-5
    calibrated = TRTT5ForConditionalGeneration.from_pretrained(folder, calibration=TEXTS)
    assert calibrated.fp16_scaling("fp16") is not None and len(
        calibrated._runner.settings.calibration[0]["input_ids"]
    ) == len(TEXTS)


def test_commands_take_them(kept: tuple[Any, Any, Any, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder, lines = kept[3], tmp_path / "lines.txt"
    lines.write_text("\n".join(TEXTS))
    commands = (
        ("generate", folder, *TEXTS, "--max-new-tokens", "3"),
        ("verify", folder, "--max-new-tokens", "3", "--num-beams", "1"),
        ("verify", folder, "--texts", str(lines), "--max-new-tokens", "3"),
        ("bench", folder, "--texts", str(lines), "--batch", "3", "--new-tokens", "2", "--runs", "1"),
    )
    for command in commands:
        assert cli.run(list(command)) == 0, capfd.readouterr().err


def test_a_text_without_tokens_is_refused_by_its_place(tmp_path: Path) -> None:
    ours = TRTT5ForConditionalGeneration.from_model(make_hugging_face("t5-v1.1"), num_threads=1)
    with pytest.raises(InputError, match=r"texts\[1\] got ' ', of which the tokenizer makes no token"):
        generate_many(ours, words(tmp_path), ["a", " "])


def test_sample_texts_are_in_the_tokenizers_language(shipped: tuple[Any, Any, Any], tmp_path: Path) -> None:
    texts, kind = sample_texts(shipped[0])
    assert kind == "sentences in Japanese kana" and len(texts) == 16
    assert not any(shipped[0].unk_token_id in row for row in shipped[0](texts)["input_ids"])
    assert sample_texts(bert(tmp_path))[1].startswith("sentences in ")
    assert sample_texts(ByT5Tokenizer())[1].startswith("sentences in ")
    strange = words(tmp_path)
    texts, kind = sample_texts(strange)
    assert kind == "words of the tokenizer's vocabulary" and len(texts) == 16
    rows = strange(texts)["input_ids"]
    assert all(len(set(row)) > 1 for row in rows) and sum(row.count(strange.unk_token_id) for row in rows) < 20
    assert sample_texts(AutoTokenizer.from_pretrained(empty_checkpoint(tmp_path / "empty")))[0] == []


def empty_checkpoint(folder: Path) -> Path:
    """Without files of a tokenizer; Transformers makes one up that knows no word."""
    T5Config().save_pretrained(folder)
    return folder
