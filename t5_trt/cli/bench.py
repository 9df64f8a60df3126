"""``t5-trt bench``: `t5_trt.tools.benchmark` from a terminal, with a table, a file of records and a picture."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from t5_trt.cli.arguments import Backend, Decode, ListCommand, Precision, choice, read_lines
from t5_trt.errors import InputError

if TYPE_CHECKING:
    from t5_trt.tools.benchmark import Benchmark, Case

# Optional, because typer reads these at run time
_Numbers = Optional[list[int]]  # noqa: UP045
_DoSample = Annotated[bool, typer.Option("--do-sample", help="draw tokens, with the same seed in all calls")]
_OursOnly = Annotated[
    bool, typer.Option("--ours-only", "--no-stock", help="leave Hugging Face's class out; tokens are not compared")
]
_Against = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="time this tool too, in the precision of ours: ctranslate2", callback=choice(("ctranslate2",))),
]
_Texts = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="file of texts, one a line, to take instead of random tokens"),
]
_Picture = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="picture of the times to write: .png, .svg or .pdf"),
]


def is_number(word: str) -> bool:
    """Whether a word is an integer; the parser rejects negative ones with the option's name."""
    return word.removeprefix("-").isdigit()


class BenchCommand(ListCommand):
    """Accepts several numbers after one option."""

    lists = dict.fromkeys(("--batch", "--source-tokens", "--new-tokens", "--num-beams"), is_number)


def bench(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="hub id or folder of a checkpoint, or random:t5-base or random:t5-small"),
    ],
    batch: Annotated[
        _Numbers, typer.Option(min=1, help="rows; several values, as in --batch 1 8 32, are all timed")
    ] = None,
    source_tokens: Annotated[_Numbers, typer.Option(min=1, help="random source tokens of a row; default 32")] = None,
    new_tokens: Annotated[_Numbers, typer.Option(min=1, help="tokens that every row generates; default 64")] = None,
    num_beams: Annotated[_Numbers, typer.Option(min=1, help="beams; default 1, greedy")] = None,
    do_sample: _DoSample = False,
    runs: Annotated[int, typer.Option(min=1, help="timed calls of each model, in turns")] = 5,
    backend: Backend = "auto",
    precision: Precision = "auto",
    decode: Decode = "auto",
    threads: Annotated[Optional[int], typer.Option(min=1, help="CPU threads; default torch's")] = None,  # noqa: UP045
    texts: _Texts = None,
    ours_only: _OursOnly = False,
    against: _Against = None,
    json_file: Annotated[Optional[Path], typer.Option("--json", help="file to append the records to")] = None,  # noqa: UP045
    plot: _Picture = None,
) -> None:
    """Time generate() against Hugging Face's own class, and CTranslate2 if it is named, and compare the tokens.

    Every combination of the listed values is a case. First calls, in which engines are built, are reported apart.
    """
    if texts is not None and source_tokens:
        raise InputError("--source-tokens got values beside --texts; the texts decide. Leave one of the two out.")
    lines = None if texts is None else read_lines("--texts", texts)
    _check_before_measuring(model, json_file, plot, against)

    import transformers

    from t5_trt.tools.benchmark import Case, load_benchmark

    sizes = itertools.product(source_tokens or [32], new_tokens or [64], num_beams or [1], batch or [1])
    cases = [
        Case(batch=rows, source_tokens=source, new_tokens=new, num_beams=beams, do_sample=do_sample)
        for source, new, beams, rows in sizes
    ]
    transformers.logging.set_verbosity_error()  # Transformers warns about max_length in every call
    chosen = {"backend": backend, "precision": precision, "decode": decode, "against": against}
    benchmark = load_benchmark(model, hugging_face=not ours_only, texts=lines is not None, threads=threads, **chosen)
    _show(_measured(benchmark, cases, runs, lines, json_file), plot)


def _show(records: list[dict[str, Any]], plot: Path | None) -> None:
    from rich.console import Console

    from t5_trt.tools.plot import draw_records
    from t5_trt.tools.records import print_records

    # do not wrap lines in a pipe
    print_records(records, Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False))
    if plot is not None:
        draw_records(records, plot)
        typer.echo(f"plot: {plot}", err=True)


def _check_before_measuring(model: str, json_file: Path | None, plot: Path | None, against: str | None) -> None:
    """Check the model name, the output files and the peer before hours of measuring."""
    from t5_trt.checkpoint.model_names import check_model_name
    from t5_trt.tools.ctranslate2_library import import_ctranslate2
    from t5_trt.tools.plot import check_picture
    from t5_trt.tools.records import read_records

    if against:
        import_ctranslate2()
    if json_file is not None:
        read_records(json_file)
    if plot is not None:
        check_picture(plot)
    if not model.startswith("random:"):
        check_model_name(model)


def _measured(
    benchmark: Benchmark, cases: list[Case], runs: int, lines: list[str] | None, json_file: Path | None
) -> list[dict[str, Any]]:
    """Measure all cases; each record is also appended to the file, if one is given."""
    from t5_trt.tools.benchmark import measure
    from t5_trt.tools.records import append_records

    records = []
    for number, case in enumerate(cases, 1):
        typer.echo(f"case {number} of {len(cases)}: {_describe(case, texts=lines is not None)}", err=True)
        records.append(measure(benchmark, case, runs, lines))
        if json_file is not None:
            append_records(json_file, records[-1:])
    return records


def _describe(case: Case, *, texts: bool) -> str:
    source = "" if texts else f" source tokens {case.source_tokens},"
    return f"batch {case.batch},{source} new tokens {case.new_tokens}, beams {case.num_beams}"
