"""The benchmark of serving on a GPU, on a CPU with a small model: both ways serve the same requests, and a record has what is compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import kernel_models, serving_gpu
from t5_trt import TRTT5ForConditionalGeneration
from tests.tiny_models import make_hugging_face


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_models, "DEVICE", "cpu")
    monkeypatch.setattr(serving_gpu, "t5_base", lambda layers: make_hugging_face("t5-v1.1", vocab_size=32000))
    monkeypatch.setattr(
        serving_gpu, "open_model", lambda name, hugging_face, *_: TRTT5ForConditionalGeneration.from_model(hugging_face)
    )
    monkeypatch.setattr(serving_gpu, "SOURCE", (4, 30))
    monkeypatch.setattr(serving_gpu, "NEW", (2, 12))


@pytest.mark.usefixtures("on_cpu")
def test_both_ways_serve_the_same_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        serving_gpu.main(["--out", str(tmp_path), "--clients", "3", "--rounds", "1", "--per-client", "4"])
    records = json.loads((tmp_path / "serving.json").read_text())
    assert end.value.code == 0 and [record["stage"] for record in records] == ["uniform lengths", "skewed lengths"]
    for record in records:
        made = record["serving"]
        assert made["equal_requests"] == made["requests"] == 12 and record["batch"] == 3 and record["python"]
        for way in ("engine", "static"):
            assert made[way]["tokens_per_s"] > 0
            assert 0 < made[way]["first_token_ms"]["p50"] <= made[way]["first_token_ms"]["p95"]
    assert "12 of 12 equal" in capsys.readouterr().out


@pytest.mark.usefixtures("on_cpu")
def test_searches_are_cases_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        given = ["--lengths", "skewed", "--searches", "sampled,penalty", "--rounds", "1", "--per-client", "4"]
        serving_gpu.main(["--out", str(tmp_path), "--clients", "3", *given])
    sampled, penalty = json.loads((tmp_path / "serving.json").read_text())
    assert end.value.code == 0 and sampled["stage"] == "skewed lengths, sampled"
    assert "equal_requests" not in sampled["serving"] and penalty["serving"]["equal_requests"] == 12
    assert "draws of 12 equal" in capsys.readouterr().out


@pytest.mark.usefixtures("on_cpu")
def test_what_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise ZeroDivisionError("here")

    monkeypatch.setattr(serving_gpu, "measure", fails)
    with pytest.raises(SystemExit) as end:
        serving_gpu.main(["--out", str(tmp_path), "--clients", "2", "--lengths", "uniform"])
    (record,) = json.loads((tmp_path / "serving.json").read_text())
    assert end.value.code == 1 and record["failed"] == {"serving": "ZeroDivisionError: here"}


def test_arrivals_of_one_seed_differ_in_their_times_only() -> None:
    slow, fast = (serving_gpu.arrivals(200, rate, "skewed", 1) for rate in (10.0, 1000.0))
    assert [one.ids.tolist() for one in slow] == [one.ids.tolist() for one in fast]
    assert all(one.at > other.at and one.new == other.new for one, other in zip(slow, fast, strict=True))
    assert all(16 <= one.ids.shape[1] <= 512 and 16 <= one.new <= 256 for one in slow)
    assert sum(one.new for one in slow) / 200 < 120  # evenly drawn ones have 136
