"""The command line in tests: in this process by the fixture `run`, or in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conftest import ROOT, SHIPPED

#: takes the words of a command line; gives status, standard output and standard error
Run = Callable[..., tuple[int, str, str]]
MODEL = str(SHIPPED)


def process(*arguments: str, cache: Path | None = None, **options: Any) -> subprocess.Popen[str]:
    """A command line in a process of its own, with pipes."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if cache is not None:
        environment["T5_TRT_CACHE"] = str(cache)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-m", "t5_trt.cli", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environment, **{**pipes, **options})


def one_line(shown: str) -> str:
    assert shown.startswith("error: ") and shown.count("\n") == 1 and "Traceback" not in shown, shown
    return shown
