"""`benchmarks/encoder.py` measures every part, on the CPU with emulated kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import encoder as benchmark
from t5_trt.graph.fp16_scaling import Fp16Scaling
from t5_trt.runtime.device_weights import DeviceWeights
from t5_trt.runtime.kernel_encoder import KernelEncoder
from t5_trt.runtime.torch_layers import TorchEncoder
from tests.kernels.emulation import EmulatedKernels
from tests.stand_in_kernels import Recording


@pytest.fixture
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small requests, and each measured work runs once."""
    monkeypatch.setattr(benchmark, "capture", Recording)
    monkeypatch.setattr(benchmark, "random_source", lambda rows, tokens: torch.randint(2, 90, (rows, tokens)))
    monkeypatch.setattr(benchmark, "events_ms", lambda work, times: (work(), 1.0)[1])
    monkeypatch.setattr(benchmark, "timed_ms", lambda work, runs: (work(), 1.0)[1:])
    monkeypatch.setattr(benchmark, "GENERATED", {(2, 5): 1})
    monkeypatch.setattr(benchmark, "NEW_TOKENS", 3)


@torch.no_grad()
def test_every_part_of_an_encoder_is_measured(on_cpu: Any, once: None, tmp_path: Path) -> None:
    arch, weights = on_cpu.session.arch, on_cpu.reference.state_dict()
    plain = benchmark.open_forms(on_cpu, tmp_path)
    assert plain.kernels is None, "the model is in float32"
    found: dict[str, Any] = {}
    benchmark.measure(found, on_cpu, plain, 2, 5, 1)
    assert "failed" not in found and found["generate_ms"] == 0.5 and found["difference_from_torch_form"] == 0.0
    halves = DeviceWeights(arch, weights, torch.float16, torch.device("cpu"))
    kernels = EmulatedKernels(arch, torch.float16, tmp_path)
    by_torch = TorchEncoder(arch, halves, Fp16Scaling(), "fp16")
    by_kernels = KernelEncoder(kernels, arch, halves, Fp16Scaling(), "fp16")
    found = {}
    benchmark.measure(found, on_cpu, benchmark.Forms(arch, halves, by_torch, by_kernels, kernels), 1, 4, 1)
    assert "failed" not in found and found["form"] == "encoder (kernels)"
    assert found["difference_from_torch_form"] < 5e-3 and all(value == 1.0 for value in found["parts_ms"].values())
    benchmark.measure_peer(found, on_cpu.reference.encoder, 1, 4, 1, compiled=False)
    assert found["hf_eager_ms"] == 1.0 and "1x4 encoder (kernels): 1.0 ms" in benchmark.summary(found)


def test_cases_are_read() -> None:
    assert benchmark.sizes("16x512,1x32") == [(16, 512), (1, 32)] and benchmark.sizes("") == []
