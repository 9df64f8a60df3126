"""Converts texts to batches of token ids with a checkpoint's tokenizer.

T5 takes ids and a mask; other outputs of a tokenizer (token types) are dropped. Padding is done here, so that it also works for
tokenizers without a padding token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from t5_trt.errors import InputError
from t5_trt.validation import check_texts

Batch = dict[str, torch.Tensor]


def token_rows(tokenizer: Any, texts: Iterable[str], **options: Any) -> list[list[int]]:
    """The token ids of each text.

    Args:
        tokenizer: of the checkpoint.
        texts: strings.
        options: of the tokenizer, such as ``truncation``.

    Raises:
        InputError: `texts` is one string, a text is not a string, or the tokenizer returns no token for it.
    """
    known = check_texts(texts)
    for place, text in enumerate(known):
        if not isinstance(text, str):
            raise InputError(f"texts[{place}] got {type(text).__name__}; expected a string.")
    rows = [list(row) for row in tokenizer(known, **options)["input_ids"]] if known else []
    empty = next((place for place, row in enumerate(rows) if not row), None)
    if empty is not None:
        raise InputError(
            f"texts[{empty}] got {known[empty]!r}, of which the tokenizer makes no token; expected at least one. Leave it out."
        )
    return rows


def padded(tokenizer: Any, rows: Sequence[Sequence[int]], pad_token_id: int | None) -> Batch:
    """One batch: ``input_ids`` and ``attention_mask``, int64 [rows, longest].

    Args:
        tokenizer: defines the side and the token of padding.
        rows: token ids of each text.
        pad_token_id: of the model, used if the tokenizer has none.
    """
    padding = tokenizer.pad_token_id
    if padding is None:
        padding = pad_token_id or 0
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), padding)
    mask = torch.zeros_like(ids)
    left = getattr(tokenizer, "padding_side", "right") == "left"
    for place, row in enumerate(rows):
        columns = slice(width - len(row), width) if left else slice(len(row))
        ids[place, columns] = torch.tensor(row)
        mask[place, columns] = 1
    return {"input_ids": ids, "attention_mask": mask}


def text_batches(tokenizer: Any, texts: Iterable[str], size: int = 8, *, pad_token_id: int | None) -> Iterator[Batch]:
    """Texts in batches of `size`, in their order.

    Raises:
        InputError: there are none, or see `token_rows`.
    """
    rows = token_rows(tokenizer, texts)
    if not rows:
        raise InputError("texts got none; expected strings, at least one.")
    for start in range(0, len(rows), size):
        yield padded(tokenizer, rows[start : start + size], pad_token_id)
