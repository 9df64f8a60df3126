"""Repositories of the hub in all their shapes load as the Hugging Face class loads them, and give its tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from t5_trt import TRTT5ForConditionalGeneration
from tests.hub_folders import HUB_FOLDERS, TEXTS, put_into_cache


@pytest.mark.parametrize("kind", list(HUB_FOLDERS))
def test_generates_from_a_download(kind: str, tmp_path: Path) -> None:
    """By its name, out of the cache of the hub's client."""
    put_into_cache(tmp_path, "somebody/some-model", HUB_FOLDERS[kind])
    where = {"cache_dir": str(tmp_path)}
    tokenizer = AutoTokenizer.from_pretrained("somebody/some-model", **where)
    request = tokenizer(list(TEXTS), return_tensors="pt", padding=True)
    assert "".join(tokenizer.batch_decode(request["input_ids"], skip_special_tokens=True))
    hugging_face = AutoModelForSeq2SeqLM.from_pretrained("somebody/some-model", **where).eval()
    ours = TRTT5ForConditionalGeneration.from_pretrained("somebody/some-model", num_threads=1, **where)
    assert isinstance(ours, type(hugging_face))
    for options in ({"num_beams": 4}, {}):
        expected = hugging_face.generate(**request, max_new_tokens=12, **options)
        assert ours.generate(**request, max_new_tokens=12, **options).tolist() == expected.tolist()
