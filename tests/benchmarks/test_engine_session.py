"""The script that measures engines on a GPU: what ends is kept, what does not is cut off, and every command it names exists."""

from __future__ import annotations

import importlib
import json
import shlex
import time
from pathlib import Path

import pytest

from benchmarks import engine_session, lanes
from benchmarks.engine_session import PARTS, keep, merged, run_part
from benchmarks.lanes import Run

COMMANDS = [
    command for part in PARTS.values() for step in part for lane in step for command in lane if "pytest" not in command
]


def test_commands_name_stages_that_exist() -> None:
    named = set()
    for command in COMMANDS:
        words = shlex.split(command)
        script = next(word for word in words if word.startswith("benchmarks/"))
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        if module.__name__ != "benchmarks.soak":
            stage = words[words.index(script) + 1]
            assert stage in module.STAGES
            named.add((module.__name__, stage))
    assert len(named) >= 12


def test_what_ends_is_kept_and_the_rest_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = "{python} -c \"import json; json.dump([dict(stage='{{}}', model='m')], open('{json}', 'w'))\""
    commands = [[write.replace("{{}}", "one"), "exit 3"], [write.replace("{{}}", "two") + "; sleep 60"]]
    monkeypatch.setattr(engine_session, "PARTS", {"part": [commands]})
    monkeypatch.setattr(engine_session, "STORE", tmp_path / "store")
    monkeypatch.setattr(lanes, "STORE", tmp_path / "store")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "soak.json").write_text("{}")
    start = time.monotonic()
    run_part("part", tmp_path / "out", minutes=0.05)
    assert time.monotonic() - start < 30
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"records.json", "log.txt", "soak.json"}
    records = json.loads((tmp_path / "out" / "records.json").read_text())
    assert [record["stage"] for record in records] == ["one", "two"]
    summary = (tmp_path / "out" / "log.txt").read_text().splitlines()[:3]
    assert sorted(line.split()[0] for line in summary) == ["0", "3", "cut"]


def test_newer_records_replace_older_ones_of_their_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = [{"stage": "a", "batch": 1, "ours_ms": 3.0}, {"stage": "b", "batch": 1, "ours_ms": 4.0}]
    new = [{"stage": "a", "batch": 1, "ours_ms": 2.0}, {"stage": "a", "batch": 2, "ours_ms": 5.0}]
    assert merged(old, new) == [new[0], old[1], new[1]]
    fuller = [{"stage": "a", "batch": 7, "source_tokens": 9}]
    assert merged(old, fuller) == [old[1], fuller[0]]
    monkeypatch.setattr(engine_session, "RESULTS", tmp_path / "results.json")
    (tmp_path / "results.json").write_text(json.dumps(old))
    (tmp_path / "records.json").write_text(json.dumps(new))
    (tmp_path / "soak.json").write_text("{}")
    keep(tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == merged(old, new)
    assert (tmp_path / engine_session.SOAK).read_text() == "{}"


def test_time_that_is_up_before_a_command(tmp_path: Path) -> None:
    """It gets a second, so that the summary names it."""
    run = Run(tmp_path, time.monotonic() - 5)
    run.lane("late", ["sleep 30"])
    assert run.summary[0].startswith(" cut off")
