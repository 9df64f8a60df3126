"""8-bit weights on a GPU: text of the shipped model, all ways to decode, memory, adapters. No TensorRT is needed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, T5ForConditionalGeneration

from t5_trt import TRTT5ForConditionalGeneration
from t5_trt.compat import CACHE
from tests.conftest import ROOT, SHIPPED
from tests.gpu.cases import cuda_model, on_gpu
from tests.tiny_models import KINDS, VOCAB, batch, make_hugging_face, swollen

SENTENCES = 200


def sentences() -> list[str]:
    words = (ROOT / "examples" / "data" / "kana.txt").read_text(encoding="utf-8").split()
    chooser = random.Random(1)
    return [" ".join(chooser.choices(words, k=chooser.randint(1, 5))) for _ in range(SENTENCES)]


@pytest.mark.parametrize("beams", [1, 4])
@torch.no_grad()
def test_sentences_of_the_shipped_model_are_those_of_float32(beams: int, store: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    hugging_face = T5ForConditionalGeneration.from_pretrained(SHIPPED).eval().cuda()
    ours = TRTT5ForConditionalGeneration.from_pretrained(
        SHIPPED, backend="cuda", precision="int8", engine_cache_dir=store
    )
    equal, texts = 0, sentences()
    for first in range(0, SENTENCES, 40):
        inputs = on_gpu(dict(tokenizer(texts[first : first + 40], return_tensors="pt", padding=True)))
        made = [
            tokenizer.batch_decode(model.generate(**inputs, num_beams=beams, max_new_tokens=96), True)
            for model in (hugging_face, ours)
        ]
        equal += sum(a == b for a, b in zip(*made, strict=True))
    assert equal >= 0.98 * SENTENCES


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_steps_and_several_positions_have_the_same_rounded_weights(kind: str, store: Path) -> None:
    """Logits of steps by the kernels, and of all positions at once by torch."""
    ours = cuda_model(make_hugging_face(kind), store, "int8")
    inputs = on_gpu(batch(3)) | {"decoder_input_ids": torch.randint(2, VOCAB, (3, 6)).cuda()}
    whole, cache, steps = ours(**inputs).logits, None, []
    encoded = (ours.get_encoder()(**on_gpu(batch(3))).last_hidden_state,)
    for position in range(6):
        fed = {"decoder_input_ids": inputs["decoder_input_ids"][:, position : position + 1]}
        out = ours(encoder_outputs=encoded, attention_mask=inputs["attention_mask"], **fed, **{CACHE: cache})
        cache = out[CACHE]
        steps.append(out.logits)
    assert float((torch.cat(steps, 1) - whole).norm() / whole.norm()) < 5e-3
    exact = make_hugging_face(kind).cuda()(**inputs).logits
    assert float((whole - exact).norm() / exact.norm()) < 0.1


@pytest.mark.parametrize(
    "arguments",
    [{}, {"num_beams": 3}, {"do_sample": True}, {"decoder_input_ids": torch.tensor([[0, 5, 9]] * 3)}],
    ids=["greedy", "beams", "sampling", "prompt"],
)
def test_ways_to_decode_give_equal_tokens_in_every_run(arguments: dict[str, Any], store: Path) -> None:
    ours, results = cuda_model(make_hugging_face("t5-v1.1"), store, "int8"), []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(ours.generate(**on_gpu(batch(3)), max_new_tokens=20, **on_gpu(arguments)))
        assert ours.last_generation_path.loop == "device"
    assert torch.equal(*results) and results[0].shape[1] > 3


def test_overflowing_checkpoint_stays_in_range(store: Path) -> None:
    hugging_face = swollen(make_hugging_face("t5-v1.1"), 30.0, 1e3)
    ours = cuda_model(hugging_face, store, "int8")
    inputs = batch(3) | {"decoder_input_ids": torch.randint(2, VOCAB, (3, 1))}
    with torch.no_grad():
        expected, got = hugging_face(**inputs).logits, ours(**on_gpu(inputs)).logits.cpu()
    assert got.isfinite().all() and float((got - expected).norm() / expected.norm()) < 0.1


def test_matrices_of_a_step_take_half_of_the_memory(store: Path) -> None:
    taken = {}
    for precision in ("fp16", "int8"):
        ours = cuda_model(make_hugging_face("t5-v1.1", d_model=256, d_ff=1024), store, precision)
        taken[precision] = ours.session._steps.weights.nbytes
    assert 0.45 < taken["int8"] / taken["fp16"] < 0.6
