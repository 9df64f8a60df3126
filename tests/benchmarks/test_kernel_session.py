"""The scripts for a GPU session of the kernels, as far as they run without one: what they call, keep, compare and show."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import decode, kernel_models, kernel_session, lanes, report, sanitize
from benchmarks.decode_parts import Captures, Launches
from benchmarks.token_differences import Difference, differences, equal_rows, greedy_gaps, stripped
from t5_trt import TRTT5ForConditionalGeneration
from t5_trt.runtime import cuda_graph, kernel_decoder
from tests.conftest import ROOT
from tests.tiny_models import batch, make_hugging_face

COMMANDS = [
    command
    for part in kernel_session.PARTS
    for small in (True, False)
    for lane in kernel_session.commands(part, small=small)
    for command in lane
]


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS))
def test_commands_name_what_exists(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(command.format(python="python", store="store", out="out", json="json"))
    module = words[words.index("-m") + 1]
    if module == "pytest":
        assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))
        return
    with pytest.raises(SystemExit) as end:
        importlib.import_module(module).main(["--help"])
    usage = capsys.readouterr().out
    assert end.value.code == 0
    assert all(word in usage for word in words[words.index(module) + 1 :] if word.startswith("--"))


def test_all_gpu_tests_are_in_a_part() -> None:
    named = {*kernel_session.BARE_TESTS, *kernel_session.ENGINE_TESTS}
    assert named == {path.name for path in (ROOT / "tests" / "gpu").glob("test_*.py")}


def test_part_ends_badly_with_one_of_its_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lanes, "STORE", tmp_path / "store")
    monkeypatch.setattr(kernel_session, "STORE", tmp_path / "store")
    good = "{python} -c 'print(\"3 passed\")'"
    for part, expected in (([[good], [good]], True), ([[good], ["exit 3"]], False), ([["sleep 60"]], False)):
        monkeypatch.setattr(kernel_session, "PARTS", {"part": part})
        start = time.monotonic()
        assert kernel_session.run_part("part", tmp_path / "out", 0.03) is expected
        assert time.monotonic() - start < 20
    assert "part-0-0: 3 passed" in capsys.readouterr().out


def test_newer_records_replace_those_of_their_case(tmp_path: Path) -> None:
    old = [{"part": "decode", "backend": "cuda", "batch": 1, "ours_ms": 3.0}, {"part": "sanitize", "tool": "memcheck"}]
    new = [
        {"part": "decode", "backend": "cuda", "batch": 1, "ours_ms": 2.0},
        {"part": "decode", "backend": "cuda", "batch": 8},
    ]
    for number, records in enumerate((old, new)):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "decode.json").write_text(json.dumps(records))
    results = tmp_path / "h200.json"
    assert kernel_session.keep([tmp_path / "0"], results) == 2
    assert kernel_session.keep([tmp_path / "1"], results) == 2
    assert json.loads(results.read_text()) == [new[0], old[1], new[1]]


def test_table_shows_kernels_beside_the_engine() -> None:
    case = {
        "part": "decode",
        "batch": 8,
        "num_beams": 4,
        "new_tokens": 99,
        "python": "3.10.1",
        "hf_eager_fp16_ms": 2000.0,
    }
    kernels = {
        **case,
        "backend": "tensorrt-kernels",
        "ours_ms": 40.0,
        "tensorrt": "8.5",
        "step_us": {"alone": 300.4, "with choice": 350.2},
    }
    engine = {
        **case,
        "backend": "tensorrt-engine",
        "ours_ms": 121.3,
        "tensorrt": "8.5",
        "step_us": {"with choice": 1182.0},
    }
    bare = {**kernels, "backend": "cuda", "python": "3.12.3", "tensorrt": None, "ours_ms": 42.0, "step_us": {}}
    lines = report.kernel_speed_table([kernels, engine, {"part": "sanitize"}, bare]).splitlines()
    assert lines[2:] == [
        "| 8 | 4 | 99 | 40.0 | - | 121.3 | 3.0 | 300 | 350 | 1182 | 19800 |",
        "| 8 | 4 | 99 | - | 42.0 | - | - | - | - | - | 18857 |",
    ]
    assert {line.count("|") for line in lines} == {12}


@pytest.mark.parametrize(
    ("log", "status", "clean"),
    [
        ("x\n========= ERROR SUMMARY: 0 errors\n", 0, True),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", 0, True),
        ("========= ERROR SUMMARY: 12 errors\n", 0, False),
        ("========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n", 0, False),
        ("Traceback\n========= ERROR SUMMARY: 0 errors\n", 1, False),
        ("Device not supported\n", 0, False),
        ("", 0, False),
    ],
)
def test_sanitizer_that_saw_nothing_is_not_clean(log: str, status: int, clean: bool) -> None:
    assert sanitize.verdict(log, status)["clean"] is clean


def test_every_tool_looks_at_every_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "compute-sanitizer"
    said = 'case "$2" in racecheck) echo "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors)";; *) echo "========= ERROR SUMMARY: 0 errors";; esac'
    program.write_text(f"#!/bin/sh\n{said}\n")
    program.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(SystemExit) as end:
        sanitize.main(["--out", str(tmp_path / "out")])
    records = json.loads((tmp_path / "out" / "sanitize.json").read_text())
    assert end.value.code == 1
    assert [(each["tool"], each["stage"], each["clean"]) for each in records] == [
        (tool, stage, tool == "memcheck") for tool in sanitize.TOOLS for stage in sanitize.STAGES
    ]


def test_rows_are_compared_without_what_stands_behind_their_end() -> None:
    assert stripped([0, 5, 0, 7, 1, 0, 0]) == stripped([0, 5, 0, 7, 1, 1]) == [0, 5, 0, 7]
    logits = [torch.tensor([[0.0, 5.0, 4.5], [3.0, 0.0, 0.0]])] * 4
    found = differences([[0, 7, 8, 9], [0, 4, 1, 1]], [[0, 7, 6, 9], [0, 4, 1, 0]], greedy_gaps(logits))
    assert [(each.row, each.step, each.got, each.expected, each.gap) for each in found] == [(0, 1, 8, 6, 0.5)]
    assert "0.5 apart" in str(found[0])
    assert differences([[0, 7]], [[0, 7, 5]]) == [Difference(0, 1, None, 5)]
    assert equal_rows(torch.tensor([[0, 7], [0, 8]]), torch.tensor([[0, 7], [0, 9]])) == 1


def test_parts_of_a_call_add_up(on_cpu: Any) -> None:
    for beams in (1, 3):
        with Launches(on_cpu.session) as launches:
            launches.run(
                lambda beams=beams: on_cpu.generate(**batch(), num_beams=beams, max_new_tokens=9, min_new_tokens=9)
            )
        parts, whole = launches.parts(), (launches.returned - launches.start) * 1e3
        assert len(launches.steps_us()) == len(launches.host) == 9
        assert all(value >= 0 for value in parts.values())
        on_gpu = sum(value for name, value in parts.items() if name.startswith("GPU"))
        assert 0.5 * whole < on_gpu < 2 * whole and parts["host before the steps"] < whole
    assert "generation_step" not in vars(on_cpu.session)


def test_captures_of_a_new_size_are_timed(on_cpu: Any) -> None:
    counts = []
    for tokens in (9, 9, 90):
        with Captures() as captures:
            on_cpu.generate(**batch(), max_new_tokens=tokens, min_new_tokens=tokens)
        counts.append(len(captures.times_ms))
    assert counts[0] >= 1 and counts[2] >= 1, "a step of a size, and one of a larger cache"
    assert kernel_decoder.capture is cuda_graph.capture


def test_all_of_a_case_is_measured(on_cpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "random_source", lambda rows, tokens: torch.randint(2, 200, (rows, tokens)))
    for batch_size, beams in ((1, 1), (3, 2)):
        found = decode.measure(on_cpu, decode.request(batch_size, beams), 1, captures=True)
        assert "failed" not in found, found
        assert {"with choice", "alone", "by difference of calls"} == set(found["step_us"])
        assert found["first_call_captures_ms"] and found["capture_ms"] > 0 and found["encoder_ms"] > 0
        assert f"{batch_size}x{beams}" in decode.summary("cuda", found)
    assert decode.long_output(on_cpu, 1)["ratio"] > 0


def test_failed_measurement_is_named_and_the_others_stay() -> None:
    found: dict[str, Any] = {}
    kernel_models.attempt(found, "one", lambda: 1 / 0)
    kernel_models.attempt(found, "two", lambda: 2)
    assert found == {"two": 2, "failed": {"one": "ZeroDivisionError: division by zero"}}


def test_fewer_layers_run_as_hugging_face(monkeypatch: pytest.MonkeyPatch) -> None:
    hugging_face = make_hugging_face("t5-v1.0", num_layers=3)
    monkeypatch.setattr(kernel_models, "random_t5", lambda *_: hugging_face)
    cut = kernel_models.t5_base(1)
    ours = TRTT5ForConditionalGeneration.from_model(cut, num_threads=1)
    assert ours.architecture.encoder_layers == ours.architecture.decoder_layers == 1
    assert ours.generate(**batch(), max_new_tokens=6).tolist() == cut.generate(**batch(), max_new_tokens=6).tolist()


def test_unknown_backend_is_named() -> None:
    with pytest.raises(SystemExit, match="nothing; expected some of cuda"):
        kernel_models.named_backends("cuda,nothing")
    assert kernel_models.named_backends("cuda") == ["cuda"]
