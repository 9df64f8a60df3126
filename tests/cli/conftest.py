"""The command line in this process."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator

import pytest
from transformers.utils import logging as transformers_logging

from t5_trt import cli
from tests.command_line import Run


class Terminal(io.TextIOWrapper):
    """An input that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs a command line; gives status, standard output and standard error."""
    logger = logging.getLogger("t5_trt")
    monkeypatch.setattr(logging, "basicConfig", lambda **options: None)
    monkeypatch.setattr(logger, "level", logger.level)  # to be set back

    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # as in a process of its own, where Transformers comes after

    def call(*arguments: str, stdin: bytes = b"", terminal: bool = False) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", (Terminal if terminal else io.TextIOWrapper)(io.BytesIO(stdin)))
        capsys.readouterr()
        status = cli.run(list(arguments))
        shown = capsys.readouterr()
        return status, shown.out, shown.err

    yield call
    if bars:
        transformers_logging.enable_progress_bar()
