"""The shipped kana-to-romaji model: real text, the same tokens as the Hugging Face class, and as accurate as recorded."""

from __future__ import annotations

import json
import logging
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT

LINES = (ROOT / "examples" / "data" / "kana.txt").read_text(encoding="utf-8").split("\n")[:-1]
EXPECTED = (ROOT / "examples" / "data" / "kana_romaji_expected.txt").read_text(encoding="utf-8").split("\n")[:-1]


def encode(tokenizer: Any, lines: list[str], side: str = "right") -> Any:
    tokenizer.padding_side = side
    return tokenizer(lines, return_tensors="pt", padding=True)


@pytest.mark.parametrize("size", [1, 7, 40])
@pytest.mark.parametrize("beams", [1, 4])
def test_tokens_equal_hugging_face(shipped: tuple[Any, Any, Any], size: int, beams: int) -> None:
    tokenizer, hugging_face, ours = shipped
    for side in ("right", "left"):
        for start in range(0, len(LINES) if size > 1 else 6, size):
            inputs = encode(tokenizer, LINES[start : start + size], side)
            expected = hugging_face.generate(**inputs, num_beams=beams, max_new_tokens=96).tolist()
            assert ours.generate(**inputs, num_beams=beams, max_new_tokens=96).tolist() == expected


def test_text_is_right(shipped: tuple[Any, Any, Any]) -> None:
    tokenizer, _, ours = shipped
    tokens = ours.generate(**encode(tokenizer, LINES), max_new_tokens=96)
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    assert len(LINES) == len(EXPECTED) == 40
    assert sum(text == expected for text, expected in zip(texts, EXPECTED, strict=True)) >= 38


def test_sampling_and_scores_equal_hugging_face(shipped: tuple[Any, Any, Any]) -> None:
    tokenizer, hugging_face, ours = shipped
    inputs = encode(tokenizer, LINES[:8])
    options = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 40, "output_scores": True}
    results = []
    for model in (hugging_face, ours):
        torch.manual_seed(0)
        results.append(model.generate(**inputs, **options, return_dict_in_generate=True))
    assert results[0].sequences.tolist() == results[1].sequences.tolist()
    for left, right in zip(results[0].scores, results[1].scores, strict=True):
        torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-5)


def test_recorded_accuracy_and_size(shipped: tuple[Any, Any, Any], shipped_folder: Path) -> None:
    metrics = json.loads((shipped_folder / "metrics.json").read_text())
    assert metrics["words_total"] == 2000 and metrics["words_accuracy"] >= 0.99
    assert 1_000_000 <= shipped[1].num_parameters() == metrics["parameters"] <= 2_000_000
    assert (shipped_folder / "model.safetensors").stat().st_size < 8e6


def test_generate_logs_nothing(shipped: tuple[Any, Any, Any], caplog: pytest.LogCaptureFixture) -> None:
    """Of Transformers, which warns in every call where a config names ``max_length`` and the call ``max_new_tokens``."""
    tokenizer, *models = shipped
    inputs = encode(tokenizer, LINES[:2])
    for model in models:
        with caplog.at_level("WARNING"):
            logging.getLogger("transformers").addHandler(caplog.handler)
            try:
                results = [model.generate(**inputs, **options) for options in ({}, {"max_new_tokens": 95})]
            finally:
                logging.getLogger("transformers").removeHandler(caplog.handler)
        assert results[0].tolist() == results[1].tolist() and not caplog.messages


def test_training_script_writes_the_shipped_generation_config(
    shipped: tuple[Any, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """96 tokens with the decoder's start token."""
    tokenizer, hugging_face, _ = shipped
    monkeypatch.syspath_prepend(ROOT / "examples")  # of its module kana_rules
    training = runpy.run_path(str(ROOT / "examples" / "train_kana.py"))
    training["save"](hugging_face, tokenizer, tmp_path)
    files = (folder / "generation_config.json" for folder in (tmp_path, ROOT / "examples" / "kana_romaji"))
    written, kept = ({**json.loads(file.read_text()), "transformers_version": ""} for file in files)
    assert written == kept and kept["max_new_tokens"] == training["MAX_TOKENS"] - 1 and "max_length" not in kept
