"""The backend "cuda" on a CPU, so that benchmarks of it can run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import kernel_models
from t5_trt.runtime import cuda_graph


class Clock:
    """In place of a CUDA event."""

    def __init__(self, **_: Any) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: Clock) -> float:
        return (other.at - self.at) * 1e3


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The backend "cuda" with torch's operations as its kernels, see `tests/stand_in_kernels.py`."""
    from tests import stand_in_kernels as stand_in

    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    monkeypatch.setattr(kernel_models, "DEVICE", "cpu")
    monkeypatch.setattr(cuda_graph, "capture", stand_in.Recording)
    return stand_in.kernels_pair(monkeypatch, tmp_path)[1]
