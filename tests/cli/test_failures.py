"""Errors of the command line: one line and a status, at once, and a mistyped folder without torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from t5_trt import InputError
from t5_trt.engine.store import EngineStore
from tests.command_line import Run, one_line, process
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (InputError("wrong"), 1, "error: wrong\n"),
        (OSError(28, "No space left on device", "x"), 1, "OSError: [Errno 28] No space left on device: 'x'"),
        (ValueError("one\n  two"), 1, "ValueError: one two"),
        (UnicodeEncodeError("ascii", "ō", 0, 1, "ordinal not in range"), 1, "UnicodeEncodeError: 'ascii'"),
        (MemoryError(), 1, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "out of memory (DefaultCPUAllocator"),
        (AssertionError("a fault of ours"), 1, "T5_TRT_DEBUG=1 shows the traceback"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_every_error_is_one_line_and_a_status(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, words: str
) -> None:
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(EngineStore, "entries", fail)
    got, out, err = run("cache", "list")
    assert got == status and words in err and err.count("\n") == bool(words) and "Traceback" not in err and out == ""
    if status == 1:
        monkeypatch.setenv("T5_TRT_DEBUG", "1")
        assert "Traceback" in run("cache", "list")[2]


def test_an_interrupt_that_another_error_hides(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise IndexError("pop from an empty list")  # noqa: B904 - as clean-up that fails

    monkeypatch.setattr(EngineStore, "entries", fail)
    assert run("cache", "list")[0] == 130


def test_a_closed_pipe_ends_it_in_silence() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        ended = process("cache", "path", stdout=writing)
        assert ended.communicate(timeout=60)[1] == "" and ended.returncode == 141
    finally:
        os.close(writing)


@pytest.mark.parametrize("command", ["build", "generate", "verify", "bench"])
@pytest.mark.parametrize("name", ["./examples/kana_romanji", "no/such/folder", "/no/such", "~nobody/x", "a\\b", "x/"])
def test_a_mistyped_folder_fails_at_once(run: Run, monkeypatch: pytest.MonkeyPatch, command: str, name: str) -> None:
    for module in ("t5_trt.prebuild", "t5_trt.modeling", "t5_trt.tools.benchmark", "t5_trt.tools.verify"):
        monkeypatch.setitem(sys.modules, module, None)  # importing it now is an error
    status, out, err = run(command, name)
    assert status == 1 and out == "" and f"there is no folder {name!r}" in one_line(err)


@pytest.mark.parametrize("name", ["no-such-model", "someone/no-such-model"])
def test_an_id_that_is_not_there_fails_at_once(run: Run, name: str) -> None:
    status, _, err = run("verify", name)
    assert status == 1 and repr(name) in one_line(err) and "HF_HUB_OFFLINE" in err


def test_what_cannot_be_a_model_is_refused_by_name(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    names = (
        (str(tmp_path), "has no config.json"),
        (str(tmp_path / "file"), "is a file"),
        ("a b", "no possible id"),
        ("", "''"),
    )
    for name, message in names:
        status, _, err = run("generate", name, "x")
        assert status == 1 and message in one_line(err)


def test_a_mistyped_folder_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import t5_trt.cli as c; sys.exit(c.run(['verify', './nowhere']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "'./nowhere'" in one_line(done.stderr)
