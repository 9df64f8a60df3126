"""4-bit matrices on the CPU: how they are rounded, kept on disk, multiplied, and what they cost in accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from t5_trt import InputError, TRTT5EncoderModel, TRTT5ForConditionalGeneration
from t5_trt.config import RuntimeConfig
from t5_trt.engine.store import EngineStore
from t5_trt.graph.build_graph import build_host_graph
from t5_trt.graph.int4 import BLOCK, quantize_to_4_bits, round_blocks
from t5_trt.graph.precision import real_type
from t5_trt.graph.signature import STEP
from t5_trt.runtime import select
from tests.conftest import ROOT, SHIPPED
from tests.tiny_models import KINDS, batch, make_hugging_face

#: relative error (L2) of the logits of the tiny models, whose large random weights amplify the rounding of activations
LOGITS_RELATIVE = 0.3


def on_int4(hugging_face: Any, folder: Path, **options: Any) -> Any:
    return TRTT5ForConditionalGeneration.from_model(
        hugging_face, precision="int4", engine_cache_dir=folder, num_threads=1, **options
    )


def restored(packed: torch.Tensor, scales: torch.Tensor, inputs: int) -> torch.Tensor:
    """The matrix [out, in] that 4-bit values and scales stand for."""
    values = torch.stack((packed & 15, packed >> 4), -1).flatten(-2).float() - 8
    return (values * scales.view(*packed.shape[:2], 1)).flatten(1)[:, :inputs]


@torch.no_grad()
def with_rounded_decoder(hugging_face: Any) -> Any:
    """A model whose matrices in the decoder's layers are rounded, those of the cross-attention's keys and values left out."""
    kept = ("EncDecAttention.k.weight", "EncDecAttention.v.weight")
    for name, weight in hugging_face.decoder.block.named_parameters():
        if weight.dim() == 2 and "relative" not in name and not name.endswith(kept):
            weight.copy_(restored(*round_blocks(weight), weight.shape[1]))
    return hugging_face


@pytest.mark.parametrize("inputs", [32, 128, 200])
def test_each_block_has_its_scale_and_uses_all_values(inputs: int) -> None:
    matrix = torch.randn((40, inputs), generator=torch.Generator().manual_seed(0))
    matrix[3] = 0
    packed, scales = round_blocks(matrix)
    blocks = -(-inputs // BLOCK)
    assert packed.shape == (40, blocks, BLOCK // 2) and packed.dtype == torch.uint8 and scales.shape == (40 * blocks,)
    errors = (restored(packed, scales, inputs) - matrix).abs()
    bounds = scales.abs().view(40, blocks, 1).expand(-1, -1, BLOCK).flatten(1)[:, :inputs]
    assert (errors <= bounds * 1.001).all() and (errors > bounds / 2 * 1.001).float().mean() < 0.03
    assert (restored(packed, scales, inputs)[3] == 0).all()


@pytest.mark.parametrize("kind", list(KINDS))
@torch.no_grad()
def test_logits_are_those_of_the_rounded_matrices(kind: str, tmp_path: Path) -> None:
    """In steps and for several positions at once; what is left is the rounding of activations, and of the matrices in 8 bits."""
    ours = on_int4(make_hugging_face(kind), tmp_path)
    exact, rounded = make_hugging_face(kind), with_rounded_decoder(make_hugging_face(kind))
    ids = torch.randint(2, 200, (3, 9), generator=torch.Generator().manual_seed(1))
    for tokens in (ids, ids[:, :1]):
        got = ours(**batch(), decoder_input_ids=tokens).logits
        errors = []
        for model in (rounded, exact):
            expected = model(**batch(), decoder_input_ids=tokens).logits
            errors.append(float((got - expected).norm() / expected.norm()))
        assert errors[0] < LOGITS_RELATIVE and errors[0] < 0.8 * errors[1]
    assert ours.session.precision == "int4" and ours.runtime_config.precision == "int4"


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 3}, {"do_sample": True}], ids=["greedy", "beams", "sampling"])
def test_generates(tmp_path: Path, arguments: dict[str, Any]) -> None:
    ours = on_int4(make_hugging_face("t5-v1.1"), tmp_path)
    prompt = torch.tensor([[0, 5, 6, 7]] * 3)
    made = ours.generate(**batch(), decoder_input_ids=prompt, max_new_tokens=8, min_new_tokens=8, **arguments)
    assert made.shape == (3, 12) and ours.last_generation_path.loop == "device"


def test_only_the_layers_of_the_decoder_have_4_bits(tmp_path: Path) -> None:
    ours = on_int4(make_hugging_face("mt5"), tmp_path)
    arch, weights = ours.architecture, ours.state_dict()
    made = dict(quantize_to_4_bits(arch, weights))
    in_4_bits = {name for name in made if name.endswith(".int4")}
    assert len(in_4_bits) == 6 * arch.decoder_layers and all(name.startswith("decoder.block") for name in in_4_bits)
    assert {"lm_head.int8", "decoder.cross_kv.int8"} < made.keys()
    model = build_host_graph(STEP, arch, weights, real_type("fp32"), quantized=made, fused=True)
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("MatMulNBits") == 6 * arch.decoder_layers and kinds.count("DynamicQuantizeMatMul") == 1


def test_matrices_are_kept_in_the_store_beside_those_of_int8(tmp_path: Path) -> None:
    sizes = {}
    for precision in ("int8", "int4", "int4"):
        model = make_hugging_face("t5-v1.1", d_model=256, d_ff=1024)
        ours = TRTT5ForConditionalGeneration.from_model(model, precision=precision, engine_cache_dir=tmp_path)
        ours.generate(**batch(), max_new_tokens=3)
    for entry in EngineStore(tmp_path).entries():
        sizes[entry.manifest["graph"]] = entry.size_bytes
    assert sorted(sizes) == ["int4 weights", "int8 weights"]
    assert sizes["int4 weights"] < 0.8 * sizes["int8 weights"]


def test_changed_weights_are_rounded_again(tmp_path: Path) -> None:
    ours = on_int4(make_hugging_face("t5-v1.1"), tmp_path)
    ids = torch.randint(2, 200, (3, 5), generator=torch.Generator().manual_seed(1))
    before = ours(**batch(), decoder_input_ids=ids).logits
    with torch.no_grad():
        ours.decoder.block[0].layer[2].DenseReluDense.wo.weight.mul_(3)
    changed = ours(**batch(), decoder_input_ids=ids).logits
    fresh = on_int4(make_hugging_face("t5-v1.1"), tmp_path)
    with torch.no_grad():
        fresh.decoder.block[0].layer[2].DenseReluDense.wo.weight.mul_(3)
    assert not torch.equal(changed, before)
    torch.testing.assert_close(changed, fresh(**batch(), decoder_input_ids=ids).logits)


def test_sentences_of_the_shipped_model(shipped: tuple[Any, Any, Any], tmp_path: Path) -> None:
    tokenizer, _, exact = shipped
    ours = TRTT5ForConditionalGeneration.from_pretrained(SHIPPED, precision="int4", engine_cache_dir=tmp_path)
    words = (ROOT / "examples" / "data" / "kana.txt").read_text(encoding="utf-8").split()[:100]
    inputs = dict(tokenizer(words, return_tensors="pt", padding=True))
    for beams in (1, 4):
        expected, got = (
            tokenizer.batch_decode(model.generate(**inputs, num_beams=beams, max_new_tokens=48), True)
            for model in (exact, ours)
        )
        assert sum(a == b for a, b in zip(got, expected, strict=True)) >= 98


def test_a_model_without_decoder_is_refused(tmp_path: Path) -> None:
    ours = TRTT5EncoderModel.from_pretrained(SHIPPED, precision="int4", engine_cache_dir=tmp_path)
    with pytest.raises(InputError, match=r"'int4'; on a CPU it is for the decoder's matrices.*Use 'int8'"):
        ours(**batch())


def test_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "why_not_tensorrt", lambda *_: None)
    for backend in ("auto", "tensorrt"):
        with pytest.raises(
            InputError, match=r"'int4'; matrices in 4 bits are for a CPU only. Use 'int8', or backend='onnxruntime'"
        ):
            select.choose(RuntimeConfig(precision="int4", backend=backend))
    with pytest.raises(InputError, match=r"'int4'; the backend 'cuda' computes in"):
        select.choose(RuntimeConfig(precision="int4", backend="cuda"))
