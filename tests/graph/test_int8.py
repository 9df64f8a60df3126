"""8-bit matrices on the CPU: how they are rounded, kept on disk, and what they cost in accuracy."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from t5_trt import InputError, TRTT5ForConditionalGeneration, generate_many
from t5_trt.engine.store import PLAN, EngineStore
from t5_trt.graph.fp16_scaling import Fp16Scaling
from t5_trt.graph.int8 import quantize
from t5_trt.runtime import int8_weights
from t5_trt.runtime.int8_weights import products_saturate, weights_digest
from tests.conftest import ROOT, SHIPPED
from tests.stand_in_tensorrt import stand_in_session
from tests.tiny_models import KINDS, batch, make_hugging_face

#: relative error (L2) of the logits of the tiny models, whose large random weights amplify rounding; seen: 0.10 to 0.13
LOGITS_RELATIVE = 0.2
WEIGHT_ONLY_RELATIVE = 0.15  # the same with activations in half precision; seen: 0.03 to 0.12


def on_int8(hugging_face: Any, folder: Path, **options: Any) -> Any:
    return TRTT5ForConditionalGeneration.from_model(
        hugging_face, precision="int8", engine_cache_dir=folder, num_threads=1, **options
    )


def test_rounding() -> None:
    """Every column has its own scale; the error is at most half of it."""
    ours = TRTT5ForConditionalGeneration.from_model(make_hugging_face("t5-v1.1"))
    made = dict(quantize(ours.architecture, ours.state_dict()))
    matrix = ours.state_dict()["decoder.block.1.layer.2.DenseReluDense.wo.weight"]
    name = "decoder.block.1.layer.2.DenseReluDense.wo"
    scale = made[f"{name}.scale"]
    assert all(t.shape[-1] % 16 == 0 for t in made.values())
    assert made[f"{name}.int8"].dtype == torch.int8 and made[f"{name}.int8"].shape == matrix.T.shape
    assert ((made[f"{name}.int8"] * scale).T - matrix).abs().le(scale[:, None] / 2 + 1e-7).all()
    assert len(scale.unique()) == len(scale)
    assert "lm_head.int8" in made and "lm_head.int8" not in dict(
        quantize(ours.architecture, ours.state_dict(), head=False)
    )
    assert not [key for key in made if "relative" in key or "layer_norm" in key or key.startswith("shared")]


@pytest.mark.parametrize("kind", list(KINDS))
def test_logits_of_every_kind(kind: str, tmp_path: Path) -> None:
    hugging_face = make_hugging_face(kind)
    ours = on_int8(hugging_face, tmp_path)
    ids = torch.randint(2, 200, (3, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = hugging_face(**batch(), decoder_input_ids=ids).logits
    got = ours(**batch(), decoder_input_ids=ids).logits
    assert ours.session.precision == "int8"
    assert 1e-4 < (got - expected).norm() / expected.norm() < LOGITS_RELATIVE


def test_widths_that_an_old_runtime_gets_wrong(tmp_path: Path) -> None:
    """72 columns and 33 rows: ONNX Runtime 1.23 left some of them unwritten on processors with AMX."""
    hugging_face = make_hugging_face("mt5", d_kv=24, num_heads=3, d_ff=72, vocab_size=216)
    ours = on_int8(hugging_face, tmp_path)
    with torch.no_grad():
        expected = hugging_face.encoder(**batch(3, 40)).last_hidden_state
    got = ours.get_encoder()(**batch(3, 40)).last_hidden_state
    assert (got - expected).norm() / expected.norm() < LOGITS_RELATIVE
    assert ours(**batch(), decoder_input_ids=torch.zeros(3, 20, dtype=torch.long)).logits.shape == (3, 20, 216)


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 3}, {"do_sample": True}], ids=["greedy", "beams", "sampling"])
def test_generates(tmp_path: Path, arguments: dict[str, Any]) -> None:
    """Two of three first tokens at least are those of float32, in 48 rows; prompt, loop and cache work."""
    hugging_face = make_hugging_face("t5-v1.1")
    ours = on_int8(hugging_face, tmp_path)
    rows = 48
    prompt = torch.tensor([[0, 5, 6, 7]] * rows)
    results = []
    for model in (ours, hugging_face):
        torch.manual_seed(4)
        results.append(
            model.generate(**batch(rows), decoder_input_ids=prompt, max_new_tokens=8, min_new_tokens=8, **arguments)
        )
    same = results[0] == results[1]
    assert same.shape == (rows, 12) and (same[:, 4].sum() >= rows * 2 / 3 or "do_sample" in arguments)
    assert ours.last_generation_path.loop == "device"


def test_kept_in_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded once for each set of weights; a third of the checkpoint's size at most; damage is noticed."""
    made = []
    monkeypatch.setattr(int8_weights, "quantize", lambda *args: made.append(1) or quantize(*args))
    for seed, count in ((0, 1), (0, 1), (1, 2)):
        on_int8(make_hugging_face("t5-v1.0", seed=seed), tmp_path).generate(**batch(), max_new_tokens=3)
        assert len(made) == count
    entries = EngineStore(tmp_path).entries()
    assert [entry.manifest["graph"] for entry in entries] == ["int8 weights"] * 2
    (entries[0].folder / PLAN).write_bytes(b"damaged")
    on_int8(make_hugging_face("t5-v1.0", seed=1), tmp_path).generate(**batch(), max_new_tokens=3)
    assert len(made) == 3


def test_size_and_accuracy_of_the_shipped_model(shipped: tuple[Any, Any, Any], tmp_path: Path) -> None:
    tokenizer, _, exact = shipped
    ours = TRTT5ForConditionalGeneration.from_pretrained(SHIPPED, precision="int8", engine_cache_dir=tmp_path)
    words = (ROOT / "examples" / "data" / "kana.txt").read_text(encoding="utf-8").split()
    chooser = random.Random(0)
    texts = [" ".join(chooser.choices(words, k=chooser.randint(1, 5))) for _ in range(200)]
    for arguments in ({}, {"num_beams": 4}):
        expected = list(generate_many(exact, tokenizer, texts, max_new_tokens=96, **arguments))
        got = list(generate_many(ours, tokenizer, texts, max_new_tokens=96, **arguments))
        assert sum(a == b for a, b in zip(got, expected, strict=True)) >= 196
    stored = sum(entry.size_bytes for entry in EngineStore(tmp_path).entries())
    assert stored <= (SHIPPED / "model.safetensors").stat().st_size / 3


def test_unsigned_where_products_saturate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hugging_face, results = make_hugging_face("t5-v1.1"), []
    ids = torch.randint(2, 200, (3, 5))
    for saturate in (True, False):
        monkeypatch.setattr(int8_weights, "products_saturate", lambda saturate=saturate: saturate)
        ours = on_int8(hugging_face, tmp_path)
        results.append(ours(**batch(), decoder_input_ids=ids).logits)
        matrix = ours.session._quantized["decoder.block.0.layer.2.DenseReluDense.wo.int8"]
        assert matrix.dtype == (torch.uint8 if saturate else torch.int8)
    if not products_saturate():
        torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)


def test_which_processors_saturate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    (tmp_path / "old").write_text("flags : fpu avx2 avx512f\n")
    (tmp_path / "new").write_text("flags : fpu avx2 avx_vnni\n")
    assert products_saturate(tmp_path / "old") and not products_saturate(tmp_path / "new")
    assert products_saturate(tmp_path / "none")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert not products_saturate(tmp_path / "old")


def test_digest_follows_the_weights() -> None:
    first, second = (
        TRTT5ForConditionalGeneration.from_model(make_hugging_face("t5-v1.1", seed=seed)) for seed in (0, 1)
    )
    digests = {weights_digest(model.architecture, model.state_dict()) for model in (first, first, second)}
    assert len(digests) == 2


@pytest.mark.parametrize("kind", ["t5-v1.0", "t5-v1.1", "mt5", "umt5"])
@pytest.mark.parametrize(
    "scaling",
    [
        Fp16Scaling(),
        Fp16Scaling(
            True, 0.5, {"decoder.block.0.layer.2.DenseReluDense.wo": 2**-5}, {"decoder.block.0.layer.2": 2**-3}
        ),
    ],
    ids=["plain", "folded"],
)
def test_weight_only_graphs(kind: str, scaling: Fp16Scaling, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graphs of GPU engines with 8-bit weights, computed by torch: activations stay in half precision."""
    hugging_face = make_hugging_face(kind)
    ours = TRTT5ForConditionalGeneration.from_model(hugging_face, num_threads=1)
    ours.session = stand_in_session(ours, monkeypatch, precision="int8", scaling=scaling)
    ids = torch.randint(2, 200, (3, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = hugging_face(**batch(), decoder_input_ids=ids).logits
    got = ours(**batch(), decoder_input_ids=ids).logits
    assert 1e-3 < (got - expected).norm() / expected.norm() < WEIGHT_ONLY_RELATIVE


def test_refused_precisions() -> None:
    with pytest.raises(InputError, match="'fp32', 'bf16', 'int8' or 'int4'"):
        TRTT5ForConditionalGeneration.from_model(make_hugging_face("t5-v1.0"), backend="onnxruntime", precision="fp16")
