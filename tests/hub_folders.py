"""Folders of small random models, with the files that repositories of the Hugging Face hub have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from transformers import AutoTokenizer

from tests.tiny_models import make_hugging_face

TEXTS = (
    "見出しを付けたい日本語の本文。",
    "きのうは がっこうで コーヒーを のみました。",
    "translate English to German: The house is wonderful.",
    "summarize: studies have shown that owning a dog is good for you.",
)


def write_spiece(folder: Path) -> int:
    """A ``spiece.model`` as T5's: the ids 0, 1 and 2 are padding, end and unknown. Returns the size of its vocabulary."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20),
        model_prefix=str(folder / "spiece"),
        vocab_size=120,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
    (folder / "spiece.model").chmod(0o644)
    return int(sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model")).get_piece_size())


def _old(kind: str, folder: Path, vocabulary: int, **config: Any) -> None:
    """A config and ``pytorch_model.bin``, as repositories had before safetensors."""
    hugging_face = make_hugging_face(kind, vocab_size=vocabulary, **config)
    hugging_face.config.architectures = [type(hugging_face).__name__]
    hugging_face.config.save_pretrained(folder)
    tensors = {name: tensor.clone() for name, tensor in hugging_face.state_dict().items()}
    bias = tensors["decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = bias.clone()  # a relic
    torch.save(tensors, folder / "pytorch_model.bin")


def old_t5(folder: Path) -> None:
    """Such as sonoisa/t5-base-japanese: no tokenizer.json, no settings of the tokenizer."""
    _old("t5-v1.0", folder, write_spiece(folder))


def old_mt5(folder: Path) -> None:
    """Such as google/mt5-small."""
    _old("mt5", folder, write_spiece(folder), tokenizer_class="T5Tokenizer")


def byt5(folder: Path) -> None:
    """Such as google/byt5-small: its tokens are bytes, so there is no vocabulary."""
    _old("byt5", folder, 384, tokenizer_class="ByT5Tokenizer")


def new_t5(folder: Path) -> None:
    """Such as google/flan-t5-small: safetensors, and a tokenizer in every form."""
    hugging_face = make_hugging_face("t5-v1.1", vocab_size=write_spiece(folder))
    hugging_face.config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    hugging_face.save_pretrained(folder)


HUB_FOLDERS: dict[str, Callable[[Path], None]] = {
    "old-t5": old_t5,
    "new-t5": new_t5,
    "old-mt5": old_mt5,
    "byt5": byt5,
}


def put_into_cache(cache: Path, name: str, make: Callable[[Path], None]) -> None:
    """Lay a model down as a download of the repository `name`, in the folder of the hub's client."""
    repository = cache / f"models--{name.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True)
    make(folder)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
