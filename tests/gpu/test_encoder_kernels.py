"""The encoder's kernels against their references in float64, on fresh random inputs with poisoned buffers. No TensorRT is needed."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from t5_trt import TRTT5ForConditionalGeneration
from t5_trt.graph.architecture import ACTIVATIONS, Architecture
from t5_trt.graph.relative_positions import distance_buckets
from t5_trt.kernels import reference
from t5_trt.kernels.compile import compile_cubin
from t5_trt.kernels.decode_step import model_constants
from t5_trt.kernels.encoder import SOURCE, EncoderKernels, relative_bias
from t5_trt.runtime.gpu_encoder import GpuEncoder
from t5_trt.runtime.torch_layers import NO_KEY, TorchEncoder
from tests.conftest import ROOT, SHIPPED
from tests.gpu.test_cuda_backend import model
from tests.gpu.test_kernels import SMALL
from tests.tiny_models import KINDS, VOCAB, batch, make_stock

CASES = 24
SEED = int(os.environ.get("T5_TRT_TEST_SEED", "0"))
#: largest error beside the largest value: weights and results are rounded once each
ROUNDED = {torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
CUDA = torch.device("cuda", 0)
_cubins: dict[Any, bytes] = {}


def kernels(arch: Architecture, dtype: torch.dtype) -> EncoderKernels:
    wanted = model_constants(arch, dtype)
    key = tuple(wanted.items())
    major, minor = torch.cuda.get_device_capability()
    if key not in _cubins:
        _cubins[key] = compile_cubin(SOURCE, wanted, f"sm_{major}{minor}")[0]
    torch.cuda.current_stream().synchronize()
    return EncoderKernels(_cubins[key], wanted, CUDA)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory for results holds NaN before a kernel writes it."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def random_qkv(batch_size: int, length: int, arch: Architecture, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    inner = arch.num_heads * arch.d_kv
    qkv = torch.randn((batch_size, length, 3 * inner), device="cuda", generator=generator)
    qkv[..., :inner] *= 2 * arch.d_kv**-0.5
    behind = torch.full((1, *qkv.shape[1:]), torch.nan, device="cuda")  # which nothing may read
    return torch.cat((qkv, behind)).to(dtype)[:-1]


def random_mask(rows: int, length: int, chance: random.Random) -> torch.Tensor:
    made = torch.ones((rows, length), dtype=torch.int64)
    for row in range(rows):
        kind, cut = chance.choice(("all", "end", "start", "holes", "one", "none")), chance.randint(0, length - 1)
        if kind == "end":
            made[row, cut + 1 :] = 0
        elif kind == "start":
            made[row, :cut] = 0
        elif kind == "holes":
            made[row] = torch.tensor([chance.random() < 0.5 for _ in range(length)])
        elif kind in ("one", "none"):
            made[row] = 0
            made[row, cut] = int(kind == "one")
    if chance.random() < 0.5:
        made[:, chance.randint(1, length) :] = NO_KEY
    return made.cuda()


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest one beside the largest value."""
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max())


def check(arch: Architecture, dtype: torch.dtype, mask: torch.Tensor, seed: int) -> None:
    own, rows, length = kernels(arch, dtype), *mask.shape
    qkv = random_qkv(rows, length, arch, dtype, seed)
    generator = torch.Generator("cuda").manual_seed(seed)
    table = 3 * torch.randn((arch.num_buckets, arch.num_heads), device="cuda", generator=generator)
    buckets = distance_buckets(arch.num_buckets, arch.max_distance, bidirectional=True).cuda()
    keys, bias = own.list_keys(mask), relative_bias(table, buckets)
    made = [own.attend(qkv, keys, bias, wide=wide) for wide in (False, True, True)]
    expected = reference.attend_encoder(qkv.double(), mask, table.double()[buckets].t(), arch.num_heads)
    assert error(made[0], expected) < ROUNDED[dtype]
    assert torch.equal(made[0], made[1]), "the number of a CTA's queries changes nothing"
    assert torch.equal(made[1], made[2]), "nor does another run"
    last = own.attend(qkv[-1:].clone(), own.list_keys(mask[-1:].clone()), bias)
    assert torch.equal(last, made[0][-1:]), "nor do other rows"


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
    own, generator = kernels(replace(SMALL, d_model=size), torch.float16), torch.Generator("cuda").manual_seed(size)
    stream, branch = (torch.randn((1001, size), device="cuda", generator=generator) for _ in range(2))
    branch, weight = branch.half(), torch.rand(size, device="cuda", generator=generator).half()
    for given in (weight, None):
        summed, expected = reference.add_and_norm(
            stream.double(), branch.double(), 4.0, 1e-6, None if given is None else given.double()
        )
        made = own.add_and_norm(stream, branch, 4.0, 1e-6, given, torch.float16)
        assert error(stream, summed) < 1e-6 and error(made, expected) < 1e-3


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_activations(activation: str, gated: bool) -> None:
    own = kernels(replace(SMALL, activation=activation, gated=gated, d_ff=1032), torch.bfloat16)
    inner = torch.randn((777, 1032 * (1 + gated)), device="cuda").bfloat16()
    expected = reference.activate_inner(inner.double(), activation, gated=gated)
    assert error(own.activate(inner), expected) < 8e-3


def test_heads_are_split() -> None:
    made = torch.randn((5, 301, 6 * SMALL.num_heads * SMALL.d_kv), device="cuda").half()
    assert torch.equal(
        kernels(SMALL, torch.float16).split_heads(made, 6), reference.split_heads(made, 6, SMALL.num_heads)
    )


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_encoder_is_as_near_to_hugging_face_as_that_of_torch(kind: str, precision: str, store: Path) -> None:
    ours, inputs = model(make_stock(kind), store, precision), batch(5, 300)
    inputs = {name: tensor.cuda() for name, tensor in inputs.items()}
    inputs["attention_mask"][1, 40:90] = 0
    expected = make_stock(kind).cuda().encoder(**inputs).last_hidden_state.double()
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
    session = model(make_stock("t5-v1.1"), store, "fp16").session
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
