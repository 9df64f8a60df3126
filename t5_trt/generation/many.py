"""`generate_many`: many texts in batches of similar length, with results in the order of the input."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from t5_trt.checkpoint.tokenizing import padded, token_rows
from t5_trt.errors import InputError
from t5_trt.generation.search_settings import only_tokens


def generate_many(
    model: Any,
    tokenizer: Any,
    texts: Iterable[str],
    *,
    batch_size: int = 16,
    sort_by_length: bool = True,
    max_source_tokens: int | None = None,
    show_progress: bool | None = None,
    skip_special_tokens: bool = True,
    **generate_arguments: Any,
) -> Iterator[Any]:
    """Generate for many texts.

    Texts are batched with others of similar length, the longest first: so there is little padding, and a batch that is too large
    fails at the start. All texts are tokenized before the first batch; a result is returned once those of all earlier texts
    were.

    Args:
        model: a `TRTT5ForConditionalGeneration`, or any other Transformers model with ``generate``.
        tokenizer: of the model.
        texts: strings; an iterator is read to its end at once.
        batch_size: texts in a batch.
        sort_by_length: False batches texts in their order.
        max_source_tokens: cut longer texts to this many tokens; None cuts nothing.
        show_progress: draw a bar; None does so on a terminal only.
        skip_special_tokens: leave padding and end tokens out of the results.
        generate_arguments: of ``model.generate``, such as ``num_beams``.

    Returns:
        An iterator over the generated strings, in the order of `texts`; over lists of strings with
        ``num_return_sequences`` above 1.

    Raises:
        InputError: `batch_size` is not positive; `texts` is one string, contains something other than strings, or a text for which
            the tokenizer returns no token; or the arguments ask ``generate`` for something other than tokens.
    """
    if batch_size < 1:
        raise InputError(f"batch_size got {batch_size}; expected at least 1.")
    if generate_arguments.get("return_dict_in_generate"):
        raise InputError("return_dict_in_generate is not supported: generate_many gives text. Use model.generate().")
    cut = {"truncation": True, "max_length": max_source_tokens} if max_source_tokens else {}
    sources = token_rows(tokenizer, texts, **cut)
    order = list(range(len(sources)))
    if sort_by_length:
        order.sort(key=lambda place: -len(sources[place]))  # stable: equal lengths stay in order
    batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    shown = sys.stderr.isatty() if show_progress is None else show_progress
    bar = tqdm(total=len(sources), unit="text", disable=not shown)

    def decoded(places: list[int]) -> list[str]:
        rows = _generate(model, tokenizer, [sources[place] for place in places], batch_size, generate_arguments)
        texts: list[str] = tokenizer.batch_decode(rows, skip_special_tokens=skip_special_tokens)
        return texts

    return _in_order(batches, decoded, bar)


def _in_order(batches: list[list[int]], decoded: Callable[[list[int]], list[str]], bar: Any) -> Iterator[Any]:
    """Yield the results of all batches in the order of their places, each once all earlier ones are available.

    Args:
        batches: places of the texts in each batch.
        decoded: gives the results of a batch, the same number for each place.
        bar: shows progress.
    """
    done: dict[int, Any] = {}
    upcoming = 0
    with bar:
        for places in batches:
            results = decoded(places)
            each = len(results) // len(places)
            for row, place in enumerate(places):
                found = results[row * each : (row + 1) * each]
                done[place] = found[0] if each == 1 else found
            bar.update(len(places))
            while upcoming in done:
                yield done.pop(upcoming)
                upcoming += 1


def _generate(
    model: Any, tokenizer: Any, sources: Sequence[list[int]], batch_size: int, arguments: dict[str, Any]
) -> torch.Tensor:
    """Token rows for one batch."""
    count = len(sources)
    if count < batch_size and model.device.type == "cuda":
        # the last batch is padded with copies: its own size could need another engine
        sources = [*sources, *[sources[-1]] * (batch_size - count)]
    inputs = {
        name: rows.to(model.device) for name, rows in padded(tokenizer, sources, model.config.pad_token_id).items()
    }
    rows: torch.Tensor = model.generate(**inputs, **only_tokens(model.generation_config, arguments, tokenizer))
    return rows[: len(rows) // len(sources) * count]
