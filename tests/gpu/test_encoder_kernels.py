"""The encoder's kernels against their references in float64, on fresh random inputs with poisoned buffers. No TensorRT is needed."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from t5_trt import TRTT5ForConditionalGeneration
from t5_trt.graph.architecture import ACTIVATIONS
from t5_trt.kernels import reference
from t5_trt.runtime.gpu_encoder import GpuEncoder
from t5_trt.runtime.torch_layers import TorchEncoder
from tests.conftest import ROOT, SHIPPED
from tests.gpu.cases import cuda_model
from tests.gpu.encoder_cases import (
    ROUNDED,
    check,
    check_residual_sum_and_norm,
    check_split_heads,
    error,
    kernels,
    random_mask,
)
from tests.gpu.step_cases import SMALL
from tests.tiny_models import KINDS, VOCAB, batch, make_hugging_face

pytestmark = pytest.mark.usefixtures("poisoned")
CASES = 24
SEED = int(os.environ.get("T5_TRT_TEST_SEED", "0"))


@pytest.mark.parametrize("dtype", list(ROUNDED))
@pytest.mark.parametrize("length", [1, 17, 64, 300, 513, 2048, 4096])
def test_attention_of_lengths(length: int, dtype: torch.dtype) -> None:
    rows = 3 if length < 2000 else 2
    chance = random.Random(f"{SEED} {length}")
    check(replace(SMALL, num_heads=2), dtype, random_mask(rows, length, chance), SEED)


@pytest.mark.parametrize("number", range(CASES))
def test_attention_of_drawn_shapes(number: int) -> None:
    chance = random.Random(f"{SEED} {number}")
    arch = replace(
        SMALL,
        num_heads=chance.choice((1, 1, 2, 3, 12)),
        d_kv=8 * chance.randint(1, 16),
        max_distance=chance.choice((20, 128)),
    )
    length = chance.choice((1, 2, 63, 65, 127, 129, chance.randint(1, 700)))
    dtype = (torch.float16, torch.bfloat16)[number % 2]
    check(arch, dtype, random_mask(chance.choice((1, 2, 5, 33)), length, chance), number)


def test_attention_of_a_large_batch() -> None:
    mask = torch.ones((16, 512), dtype=torch.int64, device="cuda")
    mask[3, 100:], mask[7, :300] = 0, 0
    check(replace(SMALL, num_heads=12), torch.float16, mask, 1)


@pytest.mark.parametrize("size", [8, 72, 768, 1024, 1536, 4096, 8192])
def test_residual_sum_and_norm(size: int) -> None:
    check_residual_sum_and_norm(size)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_activations(activation: str, gated: bool) -> None:
    own = kernels(replace(SMALL, activation=activation, gated=gated, d_ff=1032), torch.bfloat16)
    inner = torch.randn((777, 1032 * (1 + gated)), device="cuda").bfloat16()
    expected = reference.activate_inner(inner.double(), activation, gated=gated)
    assert error(own.activate(inner), expected) < 8e-3


def test_heads_are_split() -> None:
    check_split_heads()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_encoder_is_as_near_to_hugging_face_as_that_of_torch(kind: str, precision: str, store: Path) -> None:
    ours, inputs = cuda_model(make_hugging_face(kind), store, precision), batch(5, 300)
    inputs = {name: tensor.cuda() for name, tensor in inputs.items()}
    inputs["attention_mask"][1, 40:90] = 0
    expected = make_hugging_face(kind).cuda().encoder(**inputs).last_hidden_state.double()
    session = ours.session
    assert "encoder (kernels)" in session.loaded_graphs()
    by_torch = TorchEncoder(session.arch, session._weights, session.scaling, precision)
    given = inputs["input_ids"], None, inputs["attention_mask"]
    distances = [float((each.run(*given).double() - expected).norm()) for each in (session._encoder.form, by_torch)]
    assert distances[0] < 1.2 * distances[1]
    hidden = session._encoder.form.run(*given)
    assert error(session._encoder.form.cross(hidden), by_torch.cross(hidden)) < 1e-2
    for _ in range(3):  # the size's first call, its capture, a replay
        again, _ = session.encode(*given)
    assert error(again, hidden) < 1e-2


def test_captured_encoder_gives_the_same_bits_every_time(store: Path) -> None:
    session = cuda_model(make_hugging_face("t5-v1.1"), store, "fp16").session
    ids, mask = torch.randint(2, VOCAB, (3, 37), device="cuda"), torch.ones((3, 37), dtype=torch.int64, device="cuda")
    mask[1, 20:] = 0
    made = [session.encode(ids, None, mask)[0] for _ in range(6)]
    assert all(torch.equal(each, made[0]) for each in made)


def test_tokens_equal_those_of_the_torch_form(store: Path) -> None:
    """In half precision, of the shipped model: random weights have near ties that rounding decides."""
    from transformers import AutoTokenizer

    ours = TRTT5ForConditionalGeneration.from_pretrained(
        SHIPPED, backend="cuda", precision="fp16", engine_cache_dir=store
    )
    lines = (ROOT / "examples" / "data" / "kana.txt").read_text(encoding="utf-8").split("\n")[:24]
    inputs = AutoTokenizer.from_pretrained(SHIPPED)(lines, return_tensors="pt", padding=True).to("cuda")
    got = ours.generate(**inputs, num_beams=3, max_new_tokens=64)
    session = ours.session
    assert session.loaded_graphs()[0] == "encoder (kernels)"
    session._encoder = GpuEncoder(TorchEncoder(session.arch, session._weights, session.scaling, "fp16"), session.device)
    assert torch.equal(ours.generate(**inputs, num_beams=3, max_new_tokens=64), got)
