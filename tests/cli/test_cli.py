"""The command line: options, errors and statuses, in this process where that shows the same."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import logging as transformers_logging

from t5_trt import InputError, cli, prebuild
from t5_trt.cli import bench, build
from t5_trt.cli.arguments import spread_lists
from t5_trt.engine.cache_key import engine_key
from t5_trt.engine.store import PLAN, EngineStore
from tests.conftest import ROOT, SHIPPED

Run = Callable[..., tuple[int, str, str]]
MODEL = str(SHIPPED)


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


class Terminal(io.TextIOWrapper):
    """An input that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def process(*arguments: str, cache: Path | None = None, **options: Any) -> subprocess.Popen[str]:
    """The same in a process of its own."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if cache is not None:
        environment["T5_TRT_CACHE"] = str(cache)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-m", "t5_trt.cli", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environment, **{**pipes, **options})


def one_line(shown: str) -> str:
    assert shown.startswith("error: ") and shown.count("\n") == 1 and "Traceback" not in shown, shown
    return shown


# --- help, info ---


def test_nothing_asked_for_shows_the_commands(run: Run) -> None:
    status, out, err = run()
    assert status == 2 and all(word in out + err for word in ("info", "build", "generate", "verify", "bench", "cache"))


@pytest.mark.parametrize("command", ["info", "build", "generate", "verify", "bench"])
def test_help_shows_examples(run: Run, command: str) -> None:
    status, out, _ = run(command, "--help")
    assert status == 0 and f"t5-trt {command}" in out.split("xample")[-1]


def test_info_tells_what_is_chosen_and_why(run: Run) -> None:
    status, out, _ = run("info")
    shown = " ".join(out.split())
    assert status == 0 and "onnxruntime in fp32 on cpu" in shown and "none that PyTorch can use" in shown
    assert (
        "decoder steps by" in shown and "the backend's engine" in shown and "can our CUDA kernels? │ there is" in shown
    )
    status, out, _ = run("info", "--json")
    facts = json.loads(out)
    assert status == 0 and facts["chosen"]["backend"] == "onnxruntime" and facts["gpu"] is None
    assert facts["chosen"]["decode"] == "engine" and "GPU" in facts["why_no_kernels"]
    assert "t5-trt[cu13]" in facts["tensorrt"]["tensorrt"]["missing"]


def test_info_lists_encoders_that_our_kernels_run_faster(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("T5_TRT_CACHE", str(tmp_path / "store"))
    store = EngineStore(tmp_path / "store")
    for batch, kernels_ms in ((1, 9.0), (16, 4.5)):
        facts = {
            "graph": "encoder", "shapes": {"B": batch, "N": 1, "S": 512}, "precision": "fp16", "tensorrt": "8.5", "gpu": {"name": "H200"},
            "encoder_ms": {"engine": 8.75, "kernels": kernels_ms},
        }  # fmt: skip
        store.get_or_build(engine_key(facts), facts, lambda folder: (folder / PLAN).write_text("plan") and None)
    status, out, _ = run("info", "--json")
    (found,) = json.loads(out)["encoders_by_kernels"]
    assert status == 0 and found["shapes"]["B"] == 16 and (found["engine_ms"], found["kernels_ms"]) == (8.75, 4.5)
    shown = " ".join(run("info")[1].split())
    assert "encoder B16 S512 fp16 by our kernels" in shown and "4.50 ms, by TensorRT 8.5 8.75 ms" in shown


@pytest.mark.parametrize("backend", ["tensorrt", "cuda"])
def test_info_shows_the_rest_where_the_backend_that_is_asked_for_is_missing(
    run: Run, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setenv("T5_TRT_BACKEND", backend)
    status, out, _ = run("info", "--json")
    chosen = json.loads(out)["chosen"]
    assert status == 0 and chosen["backend"] is None and f"backend='{backend}' cannot run here" in chosen["reason"]
    assert "nothing: backend" in " ".join(run("info")[1].split())


# --- errors ---


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


# --- options ---


@pytest.mark.parametrize(
    "arguments",
    [
        *(("build", MODEL, f"--{name}", "0") for name in ("batch", "beams", "source-tokens", "target-tokens")),
        ("build", MODEL, "--precision", "auto"),
        ("build", MODEL, "--decode", "gpu"),
        ("bench", MODEL, "--decode", "gpu"),
        ("verify", MODEL, "--decode", "gpu"),
        ("generate", MODEL, "x", "--decode", "gpu"),
        ("build", MODEL, "--flavor", "rtx", "--compute-capability", "86"),
        ("build", MODEL, "--flavor", "other"),
        *(("generate", MODEL, "x", f"--{name}", "0") for name in ("num-beams", "max-new-tokens", "batch-size")),
        ("generate", MODEL, "x", "--precision", "fp8"),
        ("generate", MODEL, "x", "--backend", "tpu"),
        *(("verify", MODEL, f"--{name}", "0") for name in ("num-beams", "max-new-tokens", "batch-size")),
        *(("verify", MODEL, "--at-least", value) for value in ("98", "-0.1", "nan", "inf")),
        *(("verify", MODEL, "--max-relative-error", value) for value in ("-1", "nan", "inf")),
        *(
            ("bench", MODEL, f"--{name}", "-1")
            for name in ("batch", "source-tokens", "new-tokens", "num-beams", "runs")
        ),
        ("bench", MODEL, "--threads", "0"),
        *(("cache", "prune", "--max-gb", value) for value in ("-1", "nan", "inf", "-inf", "ten")),
    ],
)
def test_values_out_of_range_are_refused_by_the_options_name(run: Run, arguments: tuple[str, ...]) -> None:
    status, out, err = run(*arguments)
    option = next(word for word in reversed(arguments) if word.startswith("--"))
    assert status == 2 and out == "" and option in err and "Traceback" not in err


def test_files_of_texts_that_cannot_be_read_are_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("größer\n".encode("latin-1"))
    (tmp_path / "blank").write_text("\n  \n")
    wrong = {"latin": "cannot be read", "blank": "holds no text", "none": "does not exist", "": "is a folder"}
    options = (("verify", "--texts"), ("bench", "--texts"), ("build", "--calibrate"))
    for name, message in wrong.items():
        for command, option in options:
            status, _, err = run(command, MODEL, option, str(tmp_path / name))
            assert (
                status == 1
                and one_line(err).startswith(f"error: {option} got {str(tmp_path / name)!r}")
                and message in err
            )


def test_several_values_after_one_option() -> None:
    option = "--compute-capability"
    spread = spread_lists(["build", option, "8.6", "8.9", "--batch", "2"], build.BuildCommand.lists)
    assert spread == ["build", option, "8.6", option, "8.9", "--batch", "2"]
    given = ["--batch", "1", "8", "m", "--runs", "3", "--num-beams=2", "4", "--", "5"]
    assert spread_lists(given, bench.BenchCommand.lists) == [
        "--batch", "1", "--batch", "8", "m", "--runs", "3", "--num-beams=2", "--num-beams", "4", "--", "5",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [
        ("MODEL", "--compute-capability", "8.6", "8.9", "12.0"),
        ("--compute-capability", "8.6", "8.9", "12.0", "MODEL"),
        ("--compute-capability=8.6", "8.9", "--compute-capability", "12.0", "MODEL"),
    ],
)
def test_capabilities_stand_before_or_behind_the_model(
    run: Run, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    asked = []
    monkeypatch.setattr(prebuild, "build_engines", lambda model, **options: asked.append((model, options)) or [])
    assert run("build", *(MODEL if word == "MODEL" else word for word in words))[0] == 0
    assert asked[0][0] == MODEL and asked[0][1]["compute_capabilities"] == ["8.6", "8.9", "12.0"]


# --- generate ---


def test_generate_from_arguments_and_from_a_pipe(run: Run) -> None:
    assert run("generate", MODEL, "がっこう", "コーヒー")[:2] == (0, "gakkō\nkōhī\n")
    lines = "がっこう\r\n\n  \nコーヒー".encode()
    options = ("--num-beams", "3", "--precision", "fp32", "--batch-size", "2", "--max-new-tokens", "20")
    assert run("generate", MODEL, *options, stdin=lines) == (0, "gakkō\n\n\nkōhī\n", "")
    assert run("generate", MODEL, stdin=b"") == (0, "", "")


@pytest.mark.parametrize(
    "command", [("generate", MODEL, "さくら"), ("verify", MODEL), ("bench", MODEL)], ids=lambda c: c[0]
)
def test_decode_reaches_the_model(run: Run, command: tuple[str, ...]) -> None:
    status, _, err = run(*command, "--decode", "kernels")
    assert status == 1 and "decode got 'kernels'" in one_line(err)


def test_generate_in_another_precision(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("T5_TRT_CACHE", str(tmp_path))
    assert run("generate", MODEL, "さくら", "--precision", "int8")[1] == "sakura\n"
    assert list(tmp_path.glob("int8*")) or any(tmp_path.iterdir())  # the quantized matrices
    status, _, err = run("generate", MODEL, "さくら", "--precision", "bf16")
    assert status == 1 and "bf16" in one_line(err)


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


# --- build and the store ---


def test_build_then_look_at_the_cache(run: Run, tmp_path: Path) -> None:
    """The command of the documentation: engines for three kinds of GPU on a machine that has none."""
    pytest.importorskip("tensorrt_rtx")
    store, texts = str(tmp_path / "store"), tmp_path / "texts.txt"
    texts.write_text("がっこう\nコーヒー\n", encoding="utf-8")
    command = ("build", MODEL, "--flavor", "rtx", "--compute-capability", "8.6", "8.9", "12.0", "--source-tokens", "32")
    status, out, err = run(*command, "--batch", "2", "--calibrate", str(texts), "--cache-dir", store)
    assert status == 0 and "1 engine in" in out and "encoder B2 S32 fp16" in out, err
    status, out, err = run(
        *command, "--batch", "2", "--calibrate", str(texts), "--cache-dir", store, "--decode", "engine"
    )
    assert status == 0 and "3 engines in" in out and "decoder_step B2 S32 T128" in out, err

    listed = run("cache", "list", "--cache-dir", store)[1]
    assert "3 engines" in listed and "decoder_step" in listed and "rtx" in listed
    facts = json.loads(run("cache", "list", "--json", "--cache-dir", store)[1])
    key = facts["engines"][0]["key"]
    assert facts["folder"] == store and len(facts["engines"]) == 3 and facts["engines"][0]["size_bytes"] > 0
    manifest = json.loads(run("cache", "show", key[:10], "--cache-dir", store)[1])
    assert manifest["key"] == key and manifest["gpu"] == {"compute_capabilities": ["8.6", "8.9", "12.0"]}
    assert run("cache", "path", "--cache-dir", store)[1].strip() == store
    assert run("cache", "prune", "--max-gb", "0", "--cache-dir", store)[1] == "3 engines deleted\n"


def test_build_for_what_is_not_there(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    rtx = ("build", MODEL, "--flavor", "rtx", "--cache-dir", str(tmp_path))
    assert "there is no GPU here to build for" in one_line(run(*rtx)[2])
    status, _, err = run(*rtx, "--compute-capability", "9.0")
    assert status == 1 and "builds for 7.5" in err.splitlines()[-1]


@pytest.fixture
def stored(tmp_path: Path) -> EngineStore:
    store = EngineStore(tmp_path / "store")
    store.get_or_build(
        "0" * 32, {"graph": "encoder"}, lambda folder: (folder / "engine.plan").write_bytes(b"plan") and None
    )
    return store


def test_clear_asks_first(run: Run, stored: EngineStore, monkeypatch: pytest.MonkeyPatch) -> None:
    clear = ("cache", "clear", "--cache-dir", str(stored.root))
    status, out, err = run(*clear)
    assert status == 1 and out == "" and "--yes" in one_line(err) and len(stored.entries()) == 1
    assert run(*clear, stdin=b"n\n", terminal=True)[0] == 1 and len(stored.entries()) == 1
    status, out, _ = run(*clear, stdin=b"y\n", terminal=True)
    assert status == 0 and "1 engines deleted" in out and stored.entries() == []
    assert run(*clear, "--yes")[1] == "0 engines deleted\n"


def test_a_size_below_nothing_deletes_nothing(run: Run, stored: EngineStore) -> None:
    assert run("cache", "prune", "--max-gb", "-1", "--cache-dir", str(stored.root))[0] == 2 and stored.entries()
    assert run("cache", "prune", "--max-gb", "1", "--cache-dir", str(stored.root))[1] == "0 engines deleted\n"


def test_a_store_that_is_a_file_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for command in (("list",), ("clear", "--yes"), ("prune", "--max-gb", "1"), ("check",)):
        status, _, err = run("cache", *command, "--cache-dir", str(tmp_path / "file"))
        assert status == 1 and "is no folder" in one_line(err)
    status, _, err = run("cache", "show", "nothing", "--cache-dir", str(tmp_path / "none"))
    assert status == 1 and "0 engines have a key that begins with 'nothing'" in one_line(err)
