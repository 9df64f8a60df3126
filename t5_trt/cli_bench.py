"""The command ``t5-trt bench``: `t5_trt.benchmarking` from a terminal, with a table, a file of records and a picture.

`register` adds it to the application of `t5_trt.cli`. As there, everything heavy is imported when the command runs.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from typer.core import TyperCommand

from t5_trt.errors import InputError

_LISTS = ("--batch", "--source-tokens", "--new-tokens", "--num-beams")
_Numbers = Optional[list[int]]  # noqa: UP045 - typer reads it at run time


def register(app: typer.Typer) -> None:
    """Add ``bench`` to the application."""
    epilog = "Example: t5-trt bench MODEL --batch 1 8 --num-beams 1 4 --json records.json --plot latency.png"
    app.command(cls=BenchCommand, epilog=epilog)(bench)


class BenchCommand(TyperCommand):
    """Takes ``--batch 1 8 32`` for ``--batch 1 --batch 8 --batch 32``, and the like."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse, once lists are spread."""
        return super().parse_args(ctx, spread_numbers(args))


def spread_numbers(arguments: list[str]) -> list[str]:
    """Repeat a list option before each of its numbers; a word that is no number ends the list."""
    result: list[str] = []
    option = None
    for position, argument in enumerate(arguments):
        if argument in _LISTS:
            option = argument
            following = arguments[position + 1 : position + 2]
            if not following or not _is_number(following[0]):
                result.append(argument)  # the parser says what is wrong
        elif option is not None and _is_number(argument):
            result += [option, argument]
        else:
            option = None
            result.append(argument)
    return result


def _is_number(argument: str) -> bool:
    return argument.removeprefix("-").isdigit()


def bench(
    model: Annotated[
        str, typer.Argument(help="hub id or folder of a checkpoint, or random:t5-base or random:t5-small")
    ],
    batch: Annotated[_Numbers, typer.Option(help="rows; several values, as in --batch 1 8 32, are all timed")] = None,
    source_tokens: Annotated[_Numbers, typer.Option(help="random source tokens of a row; default 32")] = None,
    new_tokens: Annotated[_Numbers, typer.Option(help="tokens that every row generates; default 64")] = None,
    num_beams: Annotated[_Numbers, typer.Option(help="beams; default 1, greedy")] = None,
    do_sample: Annotated[
        bool, typer.Option("--do-sample", help="draw tokens, with the same seed in all calls")
    ] = False,
    runs: Annotated[int, typer.Option(help="timed calls of each model, in turns")] = 5,
    backend: Annotated[str, typer.Option(help="auto, tensorrt or onnxruntime")] = "auto",
    precision: Annotated[str, typer.Option(help="of ours: auto, fp32, tf32, fp16, bf16 or int8")] = "auto",
    threads: Annotated[Optional[int], typer.Option(help="CPU threads; default torch's")] = None,  # noqa: UP045
    texts: Annotated[
        Optional[Path], typer.Option(help="file of texts, one a line, to take instead of random tokens")  # noqa: UP045
    ] = None,
    no_stock: Annotated[bool, typer.Option("--no-stock", help="time ours only; tokens are not compared")] = False,
    json_file: Annotated[Optional[Path], typer.Option("--json", help="file to append the records to")] = None,  # noqa: UP045
    plot: Annotated[
        Optional[Path], typer.Option(help="picture of the times to write: .png, .svg or .pdf")  # noqa: UP045
    ] = None,
) -> None:
    """Time generate() against Hugging Face's own class, and compare the tokens.

    Every combination of the listed values is a case. First calls, in which engines are built, are reported apart.
    """
    from rich.console import Console

    from t5_trt.bench_plot import check_picture, draw_records
    from t5_trt.bench_records import append_records, print_records, read_records

    lines = None if texts is None else _lines(texts, source_tokens)
    for path, check in ((json_file, read_records), (plot, check_picture)):
        if path is not None:  # before hours of measuring, not after
            check(path)
    for option, value in (("--runs", runs), ("--threads", threads)):
        if value is not None and value < 1:
            raise InputError(f"{option} got {value}; expected a number of at least 1.")

    import transformers

    from t5_trt.benchmarking import Case, load_contest, measure

    sizes = itertools.product(source_tokens or [32], new_tokens or [64], num_beams or [1], batch or [1])
    cases = [
        Case(batch=rows, source_tokens=source, new_tokens=new, num_beams=beams, do_sample=do_sample)
        for source, new, beams, rows in sizes
    ]
    transformers.logging.set_verbosity_error()  # it warns in every call about max_length
    contest = load_contest(
        model, stock=not no_stock, texts=lines is not None, threads=threads, backend=backend, precision=precision
    )
    records = []
    for number, case in enumerate(cases, 1):
        source = "" if lines is not None else f" source tokens {case.source_tokens},"
        what = f"batch {case.batch},{source} new tokens {case.new_tokens}, beams {case.num_beams}"
        typer.echo(f"case {number} of {len(cases)}: {what}", err=True)
        records.append(measure(contest, case, runs, lines))
        if json_file is not None:
            append_records(json_file, records[-1:])
    # a pipe gets whole lines
    print_records(records, Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False))
    if plot is not None:
        draw_records(records, plot)
        typer.echo(f"plot: {plot}", err=True)


def _lines(texts: Path, source_tokens: list[int] | None) -> list[str]:
    if source_tokens:
        raise InputError("--source-tokens got values beside --texts; the texts decide. Leave one of the two out.")
    if not texts.is_file():
        raise InputError(f"--texts got {str(texts)!r}, which is no file; expected a file of texts, one a line.")
    lines = [line for line in texts.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise InputError(f"--texts got {str(texts)!r}, which holds no text; expected at least one line.")
    return lines
