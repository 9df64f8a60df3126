"""Choosing the backend "cuda": what it needs, and what it says where that is missing. What it computes is in tests/gpu."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from t5_trt import BackendError, InputError
from t5_trt.config import RuntimeConfig
from t5_trt.kernels import compile as compiler
from t5_trt.runtime import select
from t5_trt.runtime.select import choose


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine that shows a GPU of some compute capability."""

    def show(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(select, "missing_bindings", lambda: None)

    return show


def test_without_a_gpu_it_is_refused() -> None:
    with pytest.raises(BackendError, match=r"backend='cuda' cannot run here: .*GPU.*backend='onnxruntime'"):
        choose(RuntimeConfig(backend="cuda"))


def test_precision_and_device_on_a_gpu(gpu: Any) -> None:
    gpu((9, 0))
    found = choose(RuntimeConfig(backend="cuda"))
    assert (found.backend, found.precision, found.device, found.dtype) == (
        "cuda",
        "fp16",
        torch.device("cuda:0"),
        torch.float16,
    )
    found = choose(RuntimeConfig(backend="cuda", precision="bf16", device="cuda:1"))
    assert (found.precision, found.device, found.dtype) == ("bf16", torch.device("cuda:1"), torch.bfloat16)


def test_older_gpu_is_refused(gpu: Any) -> None:
    gpu((7, 5))
    with pytest.raises(BackendError, match=r"compute capability 8\.0; this GPU has 7\.5"):
        choose(RuntimeConfig(backend="cuda"))


def test_missing_package_is_named_with_its_command(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu((9, 0))

    def absent(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.undo()
    monkeypatch.setattr(compiler.importlib, "import_module", absent)
    problem = compiler.missing_bindings()
    assert problem is not None and "cuda-bindings" in problem
    gpu((9, 0))
    monkeypatch.setattr(select, "missing_bindings", lambda: problem)
    with pytest.raises(BackendError, match=r'cuda-bindings.*pip install "t5-trt\[kernels-cu13\]"'):
        choose(RuntimeConfig(backend="cuda"))


@pytest.mark.parametrize("settings", [{"precision": "tf32"}, {"device": "cpu"}])
def test_settings_that_it_does_not_have_are_refused(settings: dict[str, str], gpu: Any) -> None:
    gpu((9, 0))
    with pytest.raises(InputError, match="the backend 'cuda'"):
        choose(RuntimeConfig(backend="cuda", **settings))
