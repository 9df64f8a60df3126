"""`benchmarks/positions.py` measures every form, on the CPU with stand-ins for the kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import positions as benchmark
from t5_trt.runtime.torch_layers import TorchDecoder


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many positions torch decoded at once, in every call that has more than one."""
    seen: list[int] = []
    run = TorchDecoder.run

    def noted(self: Any, tokens: torch.Tensor, *rest: Any) -> Any:
        seen.extend(count for count in tokens.shape[1:] if count > 1)
        return run(self, tokens, *rest)

    monkeypatch.setattr(TorchDecoder, "run", noted)
    monkeypatch.setattr(benchmark, "random_source", lambda rows, tokens: torch.randint(2, 90, (rows, tokens)))
    return seen


@torch.no_grad()
def test_every_form_is_measured(on_cpu: Any, several: list[int]) -> None:
    found: dict[str, Any] = {}
    benchmark.measure(found, on_cpu, on_cpu.reference, 2, 5, 1)
    assert "failed" not in found
    times = [name for name in found if name.endswith("_ms")]
    assert times == ["decoder_ms", "decoder_by_torch_ms", "single_steps_ms", "forward_ms", "forward_by_torch_ms", "hf_eager_fp16_forward_ms"]  # fmt: skip
    assert all(found[name] > 0 for name in times)
    assert several == [5] * 4, "of two forms by torch, each run twice"
    assert "decode" not in vars(on_cpu.session)


def test_kernels_are_compiled_for_all_steps_of_a_case(on_cpu: Any) -> None:
    arch = on_cpu.session.arch
    assert [sorted(benchmark.rows_of(*case, arch)) for case in ((1, 1), (8, 4), (8, 70), (200, 5))] == [
        [1], [8, 32], [8, 48, 512], [200, 400],
    ]  # fmt: skip
