"""The encoder's kernels against their references, on the CPU by emulated warps. tests/gpu runs them on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from t5_trt import TRTT5ForConditionalGeneration
from t5_trt.engine.store import EngineStore
from t5_trt.graph.architecture import Architecture
from t5_trt.graph.fp16_scaling import Fp16Scaling, find_scaling
from t5_trt.graph.relative_positions import distance_buckets
from t5_trt.kernels import reference
from t5_trt.kernels.compile import compile_cubin
from t5_trt.kernels.decode_step import model_constants
from t5_trt.kernels.encoder import KERNELS, SOURCE, refusal, relative_bias
from t5_trt.runtime.captured_encoder import CapturedEncoder, CapturedSizes
from t5_trt.runtime.device_weights import DeviceWeights
from t5_trt.runtime.kernel_encoder import KernelEncoder, open_encoder
from t5_trt.runtime.torch_layers import NO_KEY, TorchEncoder
from tests.kernels.compiled import BASE, GATED, LARGE, ODD, WIDE, usage
from tests.kernels.emulation import EmulatedKernels
from tests.tiny_models import KINDS, batch, make_hugging_face, swollen

CPU = torch.device("cpu")
#: largest error of what half precision rounds once, beside the largest value
ROUNDED = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
#: few, as each one is compiled: what is tested of heads does not depend on `d_model`, and norms do on nothing else
SMALL = replace(BASE, d_model=72, d_ff=200, num_heads=2, d_kv=64)
NARROW, FORTY, EIGHTY, WIDEST = (
    replace(SMALL, num_heads=1, d_kv=width, d_model=size)
    for width, size in ((32, 72), (40, 1536), (80, 72), (128, 2056))
)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory for results holds NaN before a kernel writes it."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., EmulatedKernels]:
    """Kernels of an architecture, compiled once."""
    made: dict[Any, EmulatedKernels] = {}

    def make(arch: Architecture, dtype: torch.dtype = torch.float16) -> EmulatedKernels:
        key = tuple(model_constants(arch, dtype).items())
        if key not in made:
            made[key] = EmulatedKernels(arch, dtype, tmp_path_factory.mktemp("emulated"))
        return made[key]

    return make


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest one beside the largest value."""
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max())


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Of both, beside the length of what is expected."""
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def masks(length: int) -> torch.Tensor:
    """Rows that show their first fifth, some, their second half, nothing, one token, and all; the first and the fourth end early."""
    made = torch.ones((6, length), dtype=torch.int64)
    made[1] = torch.rand(length, generator=torch.Generator().manual_seed(0)) < 0.5
    made[2, : length // 2] = 0
    made[3:5] = 0
    made[4, length // 3] = 1
    made[3, length - length // 4 :] = NO_KEY
    made[0, length // 5 + 1 :] = NO_KEY
    return made if length < 100 else made[1::2].contiguous()  # what a short source shows too takes long


@pytest.mark.parametrize(
    ("arch", "dtype", "architecture"),
    [
        (BASE, torch.float16, "sm_80"), (BASE, torch.float16, "sm_89"), (BASE, torch.float16, "sm_90"), (BASE, torch.float16, "sm_120"),
        (WIDE, torch.bfloat16, "sm_86"), (WIDE, torch.bfloat16, "sm_90"), (WIDE, torch.bfloat16, "sm_100"),
        (GATED, torch.bfloat16, "sm_90"), (ODD, torch.bfloat16, "sm_80"), (LARGE, torch.float16, "sm_120"),
    ],
    ids=lambda value: f"d_model-{value.d_model}" if isinstance(value, Architecture) else str(value),
)  # fmt: skip
def test_compile_without_spills(arch: Architecture, dtype: torch.dtype, architecture: str) -> None:
    _, log = compile_cubin(SOURCE, model_constants(arch, dtype), architecture)
    used = usage(log)
    assert set(used) == set(KERNELS)
    assert {name: spilled for name, (_, spilled) in used.items() if spilled} == {}


@pytest.mark.parametrize("length", [1, 17, 64, 150, 200])
def test_attention_equals_its_reference(emulated: Callable[..., EmulatedKernels], length: int) -> None:
    check_attention(emulated(SMALL), SMALL, torch.float16, length)


@pytest.mark.parametrize(
    ("arch", "dtype"), [(NARROW, torch.bfloat16), (FORTY, torch.float16), (EIGHTY, torch.bfloat16), (WIDEST, torch.float16)],
    ids=lambda value: f"d_kv-{value.d_kv}" if isinstance(value, Architecture) else str(value),
)  # fmt: skip
def test_attention_of_other_widths(
    emulated: Callable[..., EmulatedKernels], arch: Architecture, dtype: torch.dtype
) -> None:
    check_attention(emulated(arch, dtype), arch, dtype, 70)


def check_attention(kernels: EmulatedKernels, arch: Architecture, dtype: torch.dtype, length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    mask, heads = masks(length), arch.num_heads
    qkv = torch.randn((len(mask), length, 3 * heads * arch.d_kv), generator=generator)
    qkv[..., : heads * arch.d_kv] *= 2 * arch.d_kv**-0.5
    behind = torch.full((1, *qkv.shape[1:]), torch.nan)  # which nothing may read
    qkv = torch.cat((qkv, behind)).to(dtype)[:-1]
    table = 3 * torch.randn((arch.num_buckets, heads), generator=generator)
    buckets = distance_buckets(arch.num_buckets, 20, bidirectional=True)
    keys, bias = kernels.list_keys(mask), relative_bias(table, buckets)
    expected = reference.attend_encoder(qkv.double(), mask, table.double()[buckets].t(), heads)
    made = [kernels.attend(qkv, keys, bias, wide=wide) for wide in (False, True)]
    assert error(made[0], expected) < ROUNDED[dtype]
    assert torch.equal(*made), "the number of a CTA's queries changes nothing"
    alone = kernels.attend(qkv[1:2].clone(), kernels.list_keys(mask[1:2].clone()), bias)
    assert torch.equal(alone, made[0][1:2]), "nor do other rows"


@pytest.mark.parametrize(
    ("arch", "dtype", "lengths"),
    [(SMALL, torch.float16, (0, 130, 1, 64, 33, 0, 128, 7)), (FORTY, torch.bfloat16, (70, 3)), (NARROW, torch.float16, (0, 0))],
    ids=["many", "two", "none"],
)  # fmt: skip
def test_packed_sources_get_the_bits_of_each_alone(
    emulated: Callable[..., EmulatedKernels], arch: Architecture, dtype: torch.dtype, lengths: tuple[int, ...]
) -> None:
    kernels, generator, room = emulated(arch, dtype), torch.Generator().manual_seed(0), sum(lengths) + 5
    qkv = torch.randn((room, 3 * arch.num_heads * arch.d_kv), generator=generator).to(dtype)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    qkv[starts[-1] :] = torch.nan  # which nothing may read
    mask = torch.ones(room, dtype=torch.int64)
    mask[starts[1] : starts[1] + 70] = 0  # a part of a source, or all of it
    table = 3 * torch.randn((arch.num_buckets, arch.num_heads), generator=generator)
    bias = relative_bias(table, distance_buckets(arch.num_buckets, 20, bidirectional=True))
    made = [kernels.attend(qkv, kernels.list_packed(mask, starts, wide=wide), bias) for wide in (False, True)]
    for begin, length in zip(starts.tolist(), lengths, strict=False):
        own = slice(begin, begin + length)
        if length:
            alone = kernels.attend(qkv[None, own].clone(), kernels.list_keys(mask[None, own].clone()), bias)[0]
            assert all(torch.equal(each[own], alone) for each in made), length
    assert all(each[starts[-1] :].isnan().all() for each in made), "nothing is written behind the last source"


def test_tiles_that_hide_all_are_left_out(emulated: Callable[..., EmulatedKernels]) -> None:
    mask = torch.zeros((2, 64 * 35 + 5), dtype=torch.int64)
    mask[0, 64:128], mask[0, 64 * 34 + 1] = 1, 1
    lists = emulated(SMALL).list_keys(mask).lists
    assert lists[0, :4].tolist() == [2, 0, 2, 2 * 34 + 1]
    assert lists[1].tolist() == [36, 1, *(2 * tile for tile in range(35)), 2 * 35 + 1]


@pytest.mark.parametrize("arch", [SMALL, FORTY, WIDEST], ids=lambda arch: str(arch.d_model))
@pytest.mark.parametrize("weighted", [False, True])
def test_residual_sum_and_norm(emulated: Callable[..., EmulatedKernels], arch: Architecture, weighted: bool) -> None:
    size = arch.d_model
    kernels, generator = emulated(arch), torch.Generator().manual_seed(size)
    stream, branch = (torch.randn((7, size), generator=generator) for _ in range(2))
    branch, weight = branch.half(), torch.rand(size, generator=generator).half() if weighted else None
    summed, expected = reference.add_and_norm(
        stream.double(), branch.double(), 4.0, 1e-6, None if weight is None else weight.double()
    )
    made = kernels.add_and_norm(stream, branch, 4.0, 1e-6, weight, torch.float16)
    assert error(stream, summed) < 1e-6 and error(made, expected) < 1e-3
    before = stream.clone()
    again = kernels.add_and_norm(stream, None, 4.0, 1e-6, weight, torch.float16)
    assert torch.equal(stream, before) and torch.equal(again, made)


@pytest.mark.parametrize("kind", ["t5-v1.0", "t5-v1.1", "few-buckets", "ul2"])
def test_activations(emulated: Callable[..., EmulatedKernels], kind: str) -> None:
    """relu, gated gelu_new, gelu, gated silu."""
    arch: Architecture = TRTT5ForConditionalGeneration.from_model(make_hugging_face(kind)).architecture
    inner = torch.randn((5, arch.d_ff * (1 + arch.gated)), generator=torch.Generator().manual_seed(0)).half()
    expected = reference.activate_inner(inner.double(), arch.activation, gated=arch.gated)
    assert error(emulated(arch).activate(inner), expected) < 1e-3


def test_heads_are_split(emulated: Callable[..., EmulatedKernels]) -> None:
    made = torch.randn((3, 37, 4 * 2 * 64), generator=torch.Generator().manual_seed(0)).half()
    assert torch.equal(emulated(SMALL).split_heads(made, 4), reference.split_heads(made, 4, 2))


class Encoders:
    """A Hugging Face model's encoder by kernels and by torch, in float16."""

    def __init__(self, hugging_face: Any, emulated: Callable[..., EmulatedKernels]) -> None:
        self.arch: Architecture = TRTT5ForConditionalGeneration.from_model(hugging_face).architecture
        weights = hugging_face.state_dict()
        parts = self.arch, DeviceWeights(self.arch, weights, torch.float16, CPU, find_scaling(self.arch, weights))
        self.kernels = KernelEncoder(emulated(self.arch), *parts, find_scaling(self.arch, weights), "fp16")
        self.torch = TorchEncoder(*parts, find_scaling(self.arch, weights), "fp16")


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_encoder_equals_hugging_face(emulated: Callable[..., EmulatedKernels], kind: str) -> None:
    hugging_face, inputs = make_hugging_face(kind), batch(3)
    ours = Encoders(hugging_face, emulated)
    inputs["attention_mask"][1, 1] = 0
    expected = hugging_face.encoder(**inputs).last_hidden_state
    hidden = ours.kernels.run(inputs["input_ids"], None, inputs["attention_mask"])
    assert hidden.dtype == torch.float16 and distance(hidden, expected) < 4e-3
    assert error(ours.kernels.cross(hidden), ours.torch.cross(hidden)) < 1e-3
    embeds = hugging_face.get_input_embeddings()(inputs["input_ids"])
    before = embeds.clone()
    assert distance(ours.kernels.run(None, embeds, inputs["attention_mask"]), expected) < 4e-3
    assert torch.equal(embeds, before), "given embeddings are the caller's"
    one, shown = embeds[:1], inputs["attention_mask"][:1]
    turned = one.mT.contiguous().mT  # columns lie side by side
    assert torch.equal(ours.kernels.run(None, turned, shown), ours.kernels.run(None, one, shown))


@torch.no_grad()
def test_packed_encoder_gives_what_a_batch_gives(emulated: Callable[..., EmulatedKernels]) -> None:
    encoder, lengths = Encoders(make_hugging_face("t5-v1.1"), emulated).kernels, (21, 1, 64, 40)
    starts = torch.tensor([0, *lengths, 0, 0]).cumsum(0)
    ids, mask = torch.randint(2, 90, (sum(lengths) + 6,)), torch.ones(sum(lengths) + 6, dtype=torch.int64)
    mask[23:50] = 0
    hidden = encoder.run_packed(ids, mask, starts)
    for begin, length in zip(starts.tolist(), lengths, strict=False):
        own = slice(begin, begin + length)
        expected = encoder.run(ids[None, own], None, mask[None, own])[0]
        assert hidden[own].isfinite().all() and error(hidden[own], expected) < 2e-3


@torch.no_grad()
def test_overflowing_checkpoint_stays_finite(emulated: Callable[..., EmulatedKernels]) -> None:
    hugging_face, inputs = swollen(make_hugging_face("t5-v1.1"), 30.0, 1e3), batch(3)
    ours = Encoders(hugging_face, emulated)
    hidden = ours.kernels.run(inputs["input_ids"], None, inputs["attention_mask"])
    assert distance(hidden, hugging_face.encoder(**inputs).last_hidden_state) < 0.02


@torch.no_grad()
def test_padded_size_gives_what_the_exact_one_gives(emulated: Callable[..., EmulatedKernels]) -> None:
    """A captured encoder is padded to a multiple of 16."""
    encoder, ids = Encoders(make_hugging_face("t5-v1.0"), emulated).kernels, torch.randint(2, 90, (2, 21))
    mask = torch.ones_like(ids)
    mask[1] = 0
    captured = CapturedEncoder(
        lambda *given: (encoder.run(given[0], None, given[1]), torch.empty(0, 0, 0, 0, 32, 0)),
        CapturedSizes(CPU),
    )
    assert error(captured.run(ids, mask)[0], encoder.run(ids, None, mask)) < 2e-3


def test_what_the_kernels_do_not_take_goes_to_torch(tmp_path: Path) -> None:
    assert "half precision only" in str(refusal(BASE, torch.float32))
    assert "d_kv is 20" in str(refusal(replace(BASE, d_kv=20), torch.float16))
    assert "d_model is 16384" in str(refusal(replace(BASE, d_model=16384), torch.float16))
    assert refusal(ODD, torch.bfloat16) is None
    hugging_face = make_hugging_face("t5-v1.0")
    arch: Architecture = TRTT5ForConditionalGeneration.from_model(hugging_face).architecture
    weights = DeviceWeights(arch, hugging_face.state_dict(), torch.float16, CPU)
    assert (
        type(open_encoder(arch, weights, Fp16Scaling(), "fp16", torch.float16, EngineStore(tmp_path))) is TorchEncoder
    )
