"""Shared options of the commands: types of options, several values after one option, files of texts."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console
from typer.core import TyperCommand

from t5_trt.config import BACKENDS, DECODE, ENGINE_PRECISIONS, PRECISIONS
from t5_trt.errors import InputError


def choice(choices: tuple[str, ...]) -> Callable[[Optional[str]], Optional[str]]:  # noqa: UP045 - typer reads it at run time
    """A check of an option's value, which lists the choices where it is another word."""

    def check(value: Optional[str]) -> Optional[str]:  # noqa: UP045
        if value is not None and value not in choices:
            raise typer.BadParameter(f"{value!r} is none of {', '.join(choices)}.")
        return value

    return check


def _finite(value: Optional[float]) -> Optional[float]:  # noqa: UP045
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number.")
    return value


Model = Annotated[str, typer.Argument(metavar="MODEL", help="hub id or folder of a checkpoint")]
CacheDir = Annotated[Optional[Path], typer.Option("--cache-dir", help="folder of engines; default T5_TRT_CACHE")]  # noqa: UP045
Backend = Annotated[str, typer.Option(help=", ".join(BACKENDS), callback=choice(BACKENDS))]
Precision = Annotated[str, typer.Option(help=f"of ours: {', '.join(PRECISIONS)}", callback=choice(PRECISIONS))]
Decode = Annotated[str, typer.Option(help=f"who does a decoder step: {', '.join(DECODE)}", callback=choice(DECODE))]
EnginePrecision = Annotated[str, typer.Option(help=", ".join(ENGINE_PRECISIONS), callback=choice(ENGINE_PRECISIONS))]
Flavor = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="tensorrt or rtx; default: what is installed", callback=choice(("tensorrt", "rtx"))),
]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]


def number(help_text: str, *, least: float, most: float | None = None) -> Any:
    """An option that takes a finite number.

    Args:
        help_text: for the user.
        least: smallest number.
        most: largest number.
    """
    return typer.Option(help=help_text, callback=_finite, min=least, max=most)


class ListCommand(TyperCommand):
    """A command that accepts ``--batch 1 8 32`` for ``--batch 1 --batch 8 --batch 32``.

    A subclass defines in `lists` which options take lists, and how their values are recognized.
    """

    lists: dict[str, Callable[[str], bool]] = {}

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Expand lists, then parse."""
        return super().parse_args(ctx, spread_lists(args, self.lists))


def spread_lists(arguments: list[str], lists: dict[str, Callable[[str], bool]]) -> list[str]:
    """Repeat an option before each of its values; a word that cannot be a value ends the list.

    The first word after an option is always its value, so that the parser can report what is wrong with it.
    """
    result: list[str] = []
    option: str | None = None
    behind = False
    for place, argument in enumerate(arguments):
        name, equals, _ = argument.partition("=")
        if argument == "--":
            return result + arguments[place:]
        if behind:
            result.append(argument)
            behind = False
        elif name in lists:
            option, behind = name, not equals
            result.append(argument)
        elif option is not None and lists[option](argument):
            result += [option, argument]
        else:
            option = None
            result.append(argument)
    return result


def read_lines(option: str, path: Path) -> list[str]:
    """The lines of a file of texts that are not blank.

    Raises:
        InputError: it is not a file, cannot be read, is not UTF-8 or has no text; the message names the option.
    """
    expected = "expected a text file in UTF-8, one text a line."
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is no file" if path.exists() else "does not exist"
        raise InputError(f"{option} got {str(path)!r}, which {what}; {expected}")
    try:
        with path.open(encoding="utf-8") as file:
            lines = [line.rstrip("\n") for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{option} got {str(path)!r}, which cannot be read ({error}); {expected}") from error
    if not lines:
        raise InputError(f"{option} got {str(path)!r}, which holds no text; {expected}")
    return lines


def console() -> Console:
    """A console on standard output for tables; lines are not wrapped in a pipe."""
    # no markup: messages contain brackets, as in t5-trt[cu13]
    return Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False)


def print_json(facts: Any) -> None:
    """Print facts as JSON; non-finite numbers become null, because JSON has none."""
    typer.echo(json.dumps(_finite_only(facts), indent=2))


def _finite_only(facts: Any) -> Any:
    if isinstance(facts, dict):
        return {key: _finite_only(value) for key, value in facts.items()}
    if isinstance(facts, list | tuple):
        return [_finite_only(value) for value in facts]
    return None if isinstance(facts, float) and not math.isfinite(facts) else facts
