"""`benchmarks.cpu_text` and `benchmarks.cpu_threads`: what they compare, and their records."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cpu_text, cpu_threads
from benchmarks.cpu_threads import Setting
from t5_trt.tools.records import read_records


def run(monkeypatch: pytest.MonkeyPatch, file: Path, *arguments: str) -> int:
    """The status of `cpu_text` with few sentences."""
    monkeypatch.setattr(
        sys, "argv", ["cpu_text", "--parts", "shipped", "--sentences", "8", "--json", str(file), *arguments]
    )
    monkeypatch.setenv("T5_TRT_CACHE", str(file.parent / "store"))
    with pytest.raises(SystemExit) as ended:
        cpu_text.main()
    return int(str(ended.value.code))


def test_sentences_are_compared_in_every_search_and_batch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "text.json"
    assert [run(monkeypatch, file, "--precisions", "int8", "int4") for _ in range(2)] == [0, 0]
    found = {tuple(record[name] for name in cpu_text.CASE[1:]): record for record in read_records(file)}
    assert set(found) == {(p, beams, batch) for p in ("int8", "int4") for beams in (1, 4) for batch in (1, 16)}
    assert len(read_records(file)) == 8 and all(record["sentences_equal"] == 8 for record in found.values())


def test_too_few_equal_sentences_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpu_text, "differences", lambda got, expected: ["row 0"])
    assert run(monkeypatch, tmp_path / "text.json", "--precisions", "int8") == 1
    assert {(record["sentences_equal"], record["good"]) for record in read_records(tmp_path / "text.json")} == {
        (7, False)
    }


def test_threads_record_medians_in_place_of_older_ones(tmp_path: Path) -> None:
    file, setting = tmp_path / "threads.json", Setting(2, False, 1)
    alone, both = [[1.0, 20.0], [3.0, 10.0], [2.0, 90.0]], [[5.0, 7.0]]
    made = cpu_threads.record("int8", setting, alone, both)
    other: dict[str, Any] = cpu_threads.record("int8", Setting(1, False, 1), both, both)
    for records in ([made | {"rounds": 1}, other], [made]):
        cpu_threads.store(file, records)
    assert read_records(file) == [other, made]
    assert (made["greedy, one process, ms"], made["4 beams, one process, ms"]) == (2.0, 20.0)
    assert made["greedy, each of two, ms"] == 5.0 and made["spinning"] is False
