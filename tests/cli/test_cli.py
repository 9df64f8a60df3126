"""The command line: help, what `info` tells, and options, in this process where that shows the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from t5_trt import prebuild
from t5_trt.cli import bench, build
from t5_trt.cli.arguments import spread_lists
from t5_trt.engine.cache_key import engine_key
from t5_trt.engine.store import PLAN, EngineStore
from t5_trt.runtime import select
from t5_trt.tools.environment import environment
from tests.command_line import MODEL, Run, one_line


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
    assert "can our CUDA kernels? │ there is" in shown
    status, out, _ = run("info", "--json")
    facts = json.loads(out)
    assert status == 0 and facts["chosen"]["backend"] == "onnxruntime" and facts["gpu"] is None
    assert "GPU" in facts["why_no_kernels"] and "t5-trt[cu13]" in facts["tensorrt"]["tensorrt"]["missing"]


def test_info_tells_what_decodes_on_the_cpu(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "mycc"
    compiler.write_text("#!/bin/sh\necho mycc 1.0\n")  # it takes everything
    compiler.chmod(0o700)
    monkeypatch.setenv("CC", str(compiler))
    facts = json.loads(run("info", "--json")[1])
    assert facts["c_compiler"] == f"{compiler} (mycc 1.0)" and facts["why_not_compiled"] is None
    assert facts["chosen"]["decode"] == "kernels" and environment()["c_compiler"] == "mycc 1.0"
    shown = " ".join(run("info")[1].split())
    assert "can our C code, on the CPU? │ yes" in shown and "decoder steps by │ our C code" in shown

    monkeypatch.setenv("CC", "no-such-compiler")
    facts = json.loads(run("info", "--json")[1])
    assert facts["c_compiler"] is None and "names 'no-such-compiler'" in facts["why_not_compiled"]
    assert facts["chosen"]["decode"] == "engine" and environment()["c_compiler"] is None
    shown = " ".join(run("info")[1].split())
    assert "C compiler │ none" in shown and "decoder steps by │ the backend's engine" in shown


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


@pytest.mark.parametrize(
    "command", [("generate", MODEL, "さくら"), ("verify", MODEL), ("bench", MODEL)], ids=lambda c: c[0]
)
def test_decode_reaches_the_model(run: Run, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]) -> None:
    monkeypatch.setattr(select, "why_not_compiled", lambda: "there is no C compiler")
    status, _, err = run(*command, "--decode", "kernels")
    assert status == 1 and "decode='kernels' cannot be had here: there is no C compiler" in one_line(err)
