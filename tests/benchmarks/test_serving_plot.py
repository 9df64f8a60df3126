"""The picture of serving on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.serving_plot import draw_serving
from t5_trt.errors import InputError


def record(clients: int, rate: int) -> dict[str, Any]:
    waits = {"first_token_ms": {"p50": 2.0, "p95": 9.0}}
    serving = {"engine": {"tokens_per_s": rate, **waits}, "static": {"tokens_per_s": 7, **waits}}
    fixed = {"model": "t5-base shapes, seed 0", "precision": "fp16", "backend": "cuda", "stage": "uniform lengths"}
    return {**fixed, "batch": clients, "serving": serving, "gpu_and_driver": "GPU, 1.2", "processor": "a"}


def test_the_last_record_of_each_case_is_drawn(tmp_path: Path) -> None:
    failed = {**record(64, 0), "failed": "no memory"}
    del failed["serving"]
    drawn = {
        "a.png": [record(64, 11111), record(64, 22222), record(256, 33333), failed],
        "b.png": [record(64, 22222), record(256, 33333)],
        "c.png": [record(64, 11111), record(256, 33333)],
    }
    for name, records in drawn.items():
        draw_serving(records, tmp_path / name)
    first, same, other = ((tmp_path / name).read_bytes() for name in drawn)
    assert first == same and same != other


def test_records_of_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no records of serving"):
        draw_serving([{"part": "decode"}], tmp_path / "a.png")
