"""Encoder engines that TensorRT builds while our own form serves, and the selector between both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from t5_trt import TRTT5ForConditionalGeneration
from t5_trt.runtime.encoder_forms import EncoderForms
from tests.tiny_models import batch, make_hugging_face

FIXED = {"max_new_tokens": 12, "min_new_tokens": 12}


def on_gpu(rows: int = 3, tokens: int = 11) -> dict[str, torch.Tensor]:
    return {name: tensor.cuda() for name, tensor in batch(rows, tokens).items()}


@pytest.mark.parametrize("winner", ["engine", "kernels"])
def test_request_is_served_before_and_after_its_engine(
    winner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, measured = EncoderForms._times_ms, []

    def times(forms: Any, *key: Any) -> tuple[float, float]:
        measured.append(real(forms, *key))
        return (1.0, 2.0) if winner == "engine" else (2.0, 1.0)

    monkeypatch.setattr(EncoderForms, "_times_ms", times)
    hugging_face = make_hugging_face("t5-v1.1").cuda()
    ours = TRTT5ForConditionalGeneration.from_model(
        make_hugging_face("t5-v1.1"),
        backend="tensorrt",
        precision="fp32",
        building="background",
        engine_cache_dir=tmp_path / "store",
    )
    expected = hugging_face.generate(**on_gpu(), **FIXED)
    assert torch.equal(ours.generate(**on_gpu(), **FIXED), expected)
    forms = ours.session._forms
    assert "encoder" not in ours.session.loaded_graphs() and forms._begun
    for _ in range(4):  # captured meanwhile
        assert torch.equal(ours.generate(**on_gpu(), **FIXED), expected)
    forms.wait()
    for _ in range(3):
        assert torch.equal(ours.generate(**on_gpu(), **FIXED), expected)
    assert ("encoder" in ours.session.loaded_graphs()) == (winner == "engine")
    assert len(measured) == 1 and min(measured[0]) > 0


def test_auto_times_a_new_engine_against_the_kernels(tmp_path: Path) -> None:
    options = {"backend": "auto", "precision": "fp16", "engine_cache_dir": tmp_path / "store"}
    tokens = []
    for _ in range(2):  # the second model finds what the first one measured
        ours = TRTT5ForConditionalGeneration.from_model(make_hugging_face("t5-v1.1"), **options)
        assert (ours.session.backend, ours.session.steps_by) == ("tensorrt", "kernels")
        tokens.append(ours.generate(**on_gpu(), **FIXED))
    store = ours.session.engines.provider.store
    times = [entry.manifest["encoder_ms"] for entry in store.entries() if "encoder_ms" in entry.manifest]
    assert len(times) == 1 and all(value > 0 for value in times[0].values())
    assert torch.equal(*tokens)
    own = times[0]["kernels"] < times[0]["engine"]
    assert ("encoder" in ours.session.loaded_graphs()) != own
