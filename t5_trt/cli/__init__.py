"""The command ``t5-trt``: info, building engines ahead, generating text, verifying, benchmarks, an HTTP server, the engine cache.

Commands import what they need when they run, so that ``--help`` and usage errors are fast.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from t5_trt.cli import bench, build, cache, failures, generate, info, serve, verify


class Commands(TyperGroup):
    """A typer group that ends with the statuses of `failures`."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except (BrokenPipeError, KeyboardInterrupt) as error:
            raise typer.Exit(failures.report(error)) from None
        return result


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from t5_trt import __version__

        typer.echo(f"t5-trt {__version__}")
        raise typer.Exit


@app.callback()
def generation_step(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """T5 on TensorRT and ONNX Runtime behind Hugging Face's own class."""


app.command(short_help='what "auto" chooses, and why', epilog="Examples: t5-trt info;  t5-trt info --json")(info.info)
app.command(
    cls=build.BuildCommand,
    short_help="a model's engines ahead",
    epilog="Examples: t5-trt build MODEL --batch 8 --beams 4;  t5-trt build MODEL --flavor rtx --compute-capability 8.6 8.9",
)(build.build)
app.command(
    short_help="text through a model",
    epilog='Examples: t5-trt generate MODEL "text" --num-beams 4;  t5-trt generate MODEL < lines.txt',
)(generate.generate)
app.command(
    short_help="a model behind HTTP, for OpenAI's clients too",
    epilog="Example: t5-trt serve MODEL --port 8000 --max-rows 32",
)(serve.serve)
app.command(
    short_help="tokens and logits against Hugging Face's",
    epilog="Examples: t5-trt verify MODEL;  t5-trt verify MODEL --texts lines.txt --precision int8 --at-least 0.98",
)(verify.verify)
app.command(
    cls=bench.BenchCommand,
    short_help="time against Hugging Face's class",
    epilog="Example: t5-trt bench MODEL --batch 1 8 --num-beams 1 4 --json records.json --plot latency.png",
)(bench.bench)
app.add_typer(cache.cache_app, name="cache")


def main() -> None:
    """Entry point: every error ends in one line on standard error and an exit status, see `t5_trt.cli.failures`."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line.

    Args:
        arguments: without the name of the program.

    Returns:
        The status: 0, 1 for an error or a check that fails, 2 for usage, 130 for Ctrl-C, 141 for a closed pipe.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("t5_trt").setLevel(logging.INFO)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # progress bars of downloads and of loading
    try:
        app(args=arguments, prog_name="t5-trt")
        status: Any = 0
    except SystemExit as ended:
        status = ended.code
    except BaseException as error:
        return failures.report(error)
    try:
        sys.stdout.flush()
    except BrokenPipeError as error:
        return failures.report(error)
    return int(status or 0)
