"""`benchmarks/curves.py` times ours and its peers for a case, on the CPU with stand-ins for the kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import curves as benchmark
from benchmarks import decode


class Peers:
    """Hugging Face only; what torch.compile would take is a number."""

    def __init__(self, hugging_face: Any) -> None:
        self.hugging_face, self.ctranslate2 = hugging_face, None

    def compiled_ms(self, arguments: dict[str, Any], runs: int) -> float:
        assert arguments["max_new_tokens"] == 5 and runs
        raise RuntimeError("nothing was compiled")


def test_times_and_rates_of_all_that_run(on_cpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "random_source", lambda rows, tokens: torch.randint(2, 90, (rows, tokens)))
    peers: Any = Peers(on_cpu.reference)
    found = benchmark.measure(on_cpu, peers, (2, 7, 5), 2, compiled=False)
    assert list(found) == ["batch", "source_tokens", "new_tokens", "ours_ms", "tokens_per_s", "hf_eager_fp16_ms", "hf_eager_fp16_tokens_per_s"]  # fmt: skip
    assert found["tokens_per_s"] == pytest.approx(2 * 5 / found["ours_ms"] * 1e3, rel=0.1)
    assert "nothing was compiled" in str(benchmark.measure(on_cpu, peers, (2, 7, 5), 1, compiled=True)["failed"])


def test_cases_are_read() -> None:
    assert tuple(benchmark.sizes("1x32x99,8x512x64")) == ((1, 32, 99), (8, 512, 64))
    assert tuple(benchmark.sizes("")) == ()
