"""``t5-trt generate``: generates one line of text for each input line, as lines arrive."""

from __future__ import annotations

import io
import select
import sys
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, BinaryIO, Optional

import typer

from t5_trt.cli.arguments import Backend, Decode, Model, Precision
from t5_trt.errors import InputError

_CHUNK = 1 << 16


def generate(
    model: Model,
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT", help="texts; none reads lines from standard input")
    ] = None,
    backend: Backend = "auto",
    precision: Precision = "auto",
    decode: Decode = "auto",
    num_beams: Annotated[Optional[int], typer.Option(min=1, help="default: the checkpoint's")] = None,  # noqa: UP045
    max_new_tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="default: the checkpoint's limit, or 128"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="lines of a batch, where so many are there")] = 8,
) -> None:
    """Print what a model generates, a line for each text; an empty line stays empty.

    Lines from standard input are answered as they come, those that are already there in batches.
    """
    from t5_trt.checkpoint.model_names import check_model_name

    check_model_name(model)

    from tqdm import tqdm

    from t5_trt.checkpoint.load import load_tokenizer
    from t5_trt.generation.many import generate_many
    from t5_trt.modeling import TRTT5ForConditionalGeneration

    tokenizer = load_tokenizer(model)
    loaded = TRTT5ForConditionalGeneration.from_pretrained(model, backend=backend, precision=precision, decode=decode)
    options = _options(loaded.generation_config, num_beams, max_new_tokens)
    batches = _batches_of(texts, batch_size) if texts else _batches_as_they_come(sys.stdin.buffer, batch_size)
    total = len(texts) if texts else None
    with tqdm(total=total, unit="line", disable=not sys.stderr.isatty()) as bar:
        for lines in batches:
            asked = [line for line in lines if line.strip()]
            made = generate_many(
                loaded, tokenizer, asked, batch_size=batch_size, sort_by_length=False, show_progress=False, **options
            )
            for line in lines:
                # one line, even if the model generates line breaks
                bar.write(" ".join(next(made).splitlines()) if line.strip() else "", file=sys.stdout)
            sys.stdout.flush()
            bar.update(len(lines))


def _options(config: Any, num_beams: int | None, max_new_tokens: int | None) -> dict[str, Any]:
    """Arguments of ``generate()`` for one result of each line."""
    options: dict[str, Any] = {"num_return_sequences": 1}
    if num_beams is not None:
        options["num_beams"] = num_beams
    if max_new_tokens is None and config.max_new_tokens is None and config.max_length is None:
        max_new_tokens = 128
    if max_new_tokens is not None:
        from t5_trt.generation.search_settings import length_limit

        options |= length_limit(config, max_new_tokens)
    return options


def _batches_of(texts: list[str], size: int) -> Iterator[list[str]]:
    for place, text in enumerate(texts, 1):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(f"text {place} of the command line is not UTF-8; expected text in UTF-8.") from None
    for start in range(0, len(texts), size):
        yield texts[start : start + size]


def _batches_as_they_come(file: BinaryIO, size: int) -> Iterator[list[str]]:
    """Batches of lines: full ones while more lines are available, a smaller one before reading would block.

    Raises:
        InputError: a line is not UTF-8.
    """
    waiting: list[str] = []
    for lines in _lines_at_hand(file):
        waiting += lines
        while len(waiting) >= size:
            yield waiting[:size]
            waiting = waiting[size:]
        if waiting and not _more_at_hand(file):
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def _lines_at_hand(file: BinaryIO) -> Iterable[list[str]]:
    """Yield lists of the lines that can be read without waiting, until the end."""
    number, rest = 0, b""
    while True:
        chunk = file.read1(_CHUNK) if hasattr(file, "read1") else file.read(_CHUNK)
        *whole, rest = (rest + chunk).split(b"\n")
        if not chunk and rest:  # the last line, without a line break
            whole, rest = [rest], b""
        lines = []
        for line in whole:
            number += 1
            try:
                lines.append(line.decode("utf-8").removesuffix("\r"))
            except UnicodeDecodeError as error:
                raise InputError(
                    f"line {number} of standard input is not UTF-8 ({error}); expected text in UTF-8."
                ) from error
        yield lines
        if not chunk:
            return


def _more_at_hand(file: BinaryIO) -> bool:
    """Whether reading would not block."""
    try:
        return bool(select.select([file], [], [], 0)[0])
    except (io.UnsupportedOperation, ValueError):  # not a file of the operating system, as in tests
        return True
