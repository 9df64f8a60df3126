"""`t5-trt generate`: texts from arguments and from a pipe, one line for each."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.command_line import MODEL, Run, one_line, process


def test_generate_from_arguments_and_from_a_pipe(run: Run) -> None:
    assert run("generate", MODEL, "がっこう", "コーヒー")[:2] == (0, "gakkō\nkōhī\n")
    lines = "がっこう\r\n\n  \nコーヒー".encode()
    options = ("--num-beams", "3", "--precision", "fp32", "--batch-size", "2", "--max-new-tokens", "20")
    assert run("generate", MODEL, *options, stdin=lines) == (0, "gakkō\n\n\nkōhī\n", "")
    assert run("generate", MODEL, stdin=b"") == (0, "", "")


def test_generate_in_another_precision(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("T5_TRT_CACHE", str(tmp_path))
    assert run("generate", MODEL, "さくら", "--precision", "int8")[1] == "sakura\n"
    assert list(tmp_path.glob("int8*")) or any(tmp_path.iterdir())  # the quantized matrices
    assert run("generate", MODEL, "さくら", "--precision", "bf16")[1] == "sakura\n"
    status, _, err = run("generate", MODEL, "さくら", "--precision", "fp16")
    assert status == 1 and "fp16" in one_line(err)


def test_every_text_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"a": "1\n2\r\n3", "b": "\n"}
    monkeypatch.setattr(
        "t5_trt.generation.many.generate_many",
        lambda model, tokenizer, texts, **options: (made[text] for text in texts),
    )
    assert run("generate", MODEL, "a", "b", "a")[1] == "1 2 3\n\n1 2 3\n"


def test_a_bar_on_a_terminal_only(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("generate", MODEL, "さくら", "ねこ")[2] == ""
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: True)
    _, out, err = run("generate", MODEL, "さくら", "ねこ")
    assert "2/2" in err and out.split() == ["sakura", "neko"]


def test_text_that_is_not_utf8_is_refused(run: Run) -> None:
    status, _, err = run("generate", MODEL, "--batch-size", "1", stdin="さくら\n".encode() + b"\xff\n")
    assert status == 1 and "line 2 of standard input is not UTF-8" in one_line(err)
    status, _, err = run("generate", MODEL, "\udcff")
    assert status == 1 and "text 1 of the command line" in one_line(err)


def test_results_come_before_the_input_ends() -> None:
    running = process("generate", MODEL, encoding="utf-8")
    assert running.stdin is not None and running.stdout is not None
    try:
        for text, expected in (("さくら\n\n", "sakura\n"), ("ねこ\n", "neko\n")):
            running.stdin.write(text)
            running.stdin.flush()
            assert running.stdout.readline() == expected
            if "\n\n" in text:
                assert running.stdout.readline() == "\n"
        running.stdin.close()
        assert running.wait(timeout=60) == 0 and running.stdout.read() == ""
    finally:
        running.kill()
        running.wait()
