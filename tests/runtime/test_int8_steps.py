"""Decoder steps with 8-bit weights on a GPU: where ``precision="int8"`` goes, and what a session computes, with torch in the kernels' place."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from t5_trt import InputError, TRTT5EncoderModel, TRTT5ForConditionalGeneration
from t5_trt.config import BuildConfig, RuntimeConfig
from t5_trt.engine.store import EngineStore
from t5_trt.runtime import captured_encoder, cuda_session, kernel_decoder, select
from t5_trt.runtime import open_session as opening
from t5_trt.runtime.select import Placement, choose
from tests.conftest import ROOT, SHIPPED
from tests.stand_in_kernels import Recording, TorchSteps
from tests.tiny_models import KINDS, VOCAB, batch, make_hugging_face

CPU = torch.device("cpu")


def open_cuda(ours: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, precision: str = "int8") -> Any:
    """Give a model the session of a GPU without TensorRT."""
    monkeypatch.setattr(kernel_decoder, "capture", Recording)
    monkeypatch.setattr(captured_encoder, "capture", Recording)
    monkeypatch.setattr(cuda_session, "KernelDecoder", TorchSteps)
    session: Any = cuda_session.CudaSession(
        ours.architecture, ours.state_dict(), CPU, precision, ours.fp16_scaling(precision), EngineStore(folder)
    )
    session._steps.decoder = session._queries
    ours.session  # noqa: B018 - takes note of the weights
    ours.session = session
    return session


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_are_near_float32(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hugging_face = make_hugging_face(kind)
    ours = TRTT5ForConditionalGeneration.from_model(copy.deepcopy(hugging_face), num_threads=1)
    session = open_cuda(ours, tmp_path, monkeypatch)
    inputs = batch() | {
        "decoder_input_ids": torch.randint(2, VOCAB, (3, 5), generator=torch.Generator().manual_seed(0))
    }
    expected, got = hugging_face(**inputs).logits, ours(**inputs).logits.float()
    assert 1e-4 < float((got - expected).norm() / expected.norm()) < 0.05
    assert session.precision == "int8" and session.dtype == torch.float16


def test_sentences_of_the_shipped_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    ours = TRTT5ForConditionalGeneration.from_pretrained(SHIPPED, num_threads=1)
    words = (ROOT / "examples" / "data" / "kana.txt").read_text(encoding="utf-8").split()[:50]
    inputs = dict(tokenizer(words, return_tensors="pt", padding=True))
    expected = tokenizer.batch_decode(ours.generate(**inputs, max_new_tokens=48), True)
    open_cuda(ours, tmp_path, monkeypatch)
    got = tokenizer.batch_decode(ours.generate(**inputs, max_new_tokens=48), True)
    assert sum(a == b for a, b in zip(got, expected, strict=True)) >= 0.98 * len(words)


def test_matrices_take_half_of_the_memory_of_float16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hugging_face, taken = make_hugging_face("t5-v1.1", d_model=256, d_ff=1024), {}
    for precision in ("fp16", "int8"):
        ours = TRTT5ForConditionalGeneration.from_model(copy.deepcopy(hugging_face), num_threads=1)
        taken[precision] = open_cuda(ours, tmp_path, monkeypatch, precision)._steps.weight_bytes
    assert 0.5 < taken["int8"] / taken["fp16"] < 0.56


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine with a GPU; with a TensorRT that has no 8-bit weights, or without one. Gives the precisions it was asked for."""
    asked: list[str] = []

    def check(precision: str) -> None:
        asked.append(precision)
        if precision == "int8":
            raise InputError("this TensorRT has no 8-bit weights")

    def show(*, tensorrt: bool, capability: tuple[int, int] = (9, 0)) -> list[str]:
        api = SimpleNamespace(check_precision=check, version="8.5", flavor="tensorrt")
        monkeypatch.setattr(select, "load_tensorrt", lambda flavor=None: api)
        monkeypatch.setattr(opening, "load_tensorrt", lambda flavor=None: api)
        monkeypatch.setattr(select, "why_not_tensorrt", lambda *_: None if tensorrt else "TensorRT is not installed")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(select, "missing_bindings", lambda: None)
        return asked

    return show


@pytest.mark.parametrize("backend", ["auto", "cuda"])
def test_int8_without_tensorrt_is_the_kernels(gpu: Any, backend: str) -> None:
    gpu(tensorrt=False)
    found = choose(RuntimeConfig(backend=backend, precision="int8"))
    assert (found.backend, found.precision, found.decode) == ("cuda", "int8", "kernels")


def test_int8_beside_tensorrt_has_engines_in_half_precision(gpu: Any) -> None:
    asked = gpu(tensorrt=True)
    found = choose(RuntimeConfig(precision="int8", building="background"))
    assert (found.backend, found.precision, found.decode, asked) == ("tensorrt", "int8", "kernels", ["fp16"])


@pytest.mark.parametrize("settings", [{"decode": "engine"}, {}], ids=["engine", "old GPU"])
def test_int8_of_engines_depends_on_tensorrt(gpu: Any, settings: dict[str, str]) -> None:
    gpu(tensorrt=True, capability=(9, 0) if settings else (7, 5))
    with pytest.raises(InputError, match="has no 8-bit weights"):
        choose(RuntimeConfig(precision="int8", **settings))


def test_session_beside_tensorrt(gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Engines and the cross-attention's keys in half precision, packed matrices in 8 bits."""
    gpu(tensorrt=True)
    given: dict[str, Any] = {}
    monkeypatch.setattr(opening, "gpu_facts", lambda device: {})
    monkeypatch.setattr(opening, "EngineProvider", lambda *args, **kwargs: given.update(kwargs))
    monkeypatch.setattr(opening, "TrtSession", lambda *args, **kwargs: given.update(session=kwargs) or "session")
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.inference_mode(False))
    ours = TRTT5ForConditionalGeneration.from_model(make_hugging_face("t5-v1.1"), backend="onnxruntime")
    placement = Placement("tensorrt", "int8", CPU, torch.float16, "tensorrt", "", decode="kernels")
    arch, config = ours.architecture, RuntimeConfig(engine_cache_dir=tmp_path)
    seen: Any = None
    opening.open_session(arch, ours.state_dict(), config, placement, BuildConfig(), seen)
    assert given["precision"] == "fp16" and "quantized" not in given and given["session"]["precision"] == "int8"
    assert given["session"]["kernels"].weights.int8


def test_encoder_alone_has_no_8_bit_matrices_without_tensorrt(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(tensorrt=False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.inference_mode(False))
    ours = TRTT5EncoderModel.from_pretrained(SHIPPED, backend="onnxruntime")
    placement = Placement("cuda", "int8", CPU, torch.float16, None, "")
    seen: Any = None
    with pytest.raises(InputError, match=r"precision got 'int8'; .*this model has no decoder\. Use 'fp16'"):
        opening.open_session(ours.architecture, ours.state_dict(), RuntimeConfig(), placement, BuildConfig(), seen)
