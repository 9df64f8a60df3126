"""The encoder's kernels on random inputs, compared with the torch references in float64."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from t5_trt.graph.architecture import Architecture
from t5_trt.graph.relative_positions import distance_buckets
from t5_trt.kernels import reference
from t5_trt.kernels.compile import architecture_name, compile_cubin
from t5_trt.kernels.decode_step import model_constants
from t5_trt.kernels.encoder import SOURCE, EncoderKernels, relative_bias
from t5_trt.runtime.torch_layers import NO_KEY
from tests.gpu.step_cases import SMALL

#: largest error beside the largest value: weights and results are rounded once each
ROUNDED = {torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
CUDA = torch.device("cuda", 0)
_cubins: dict[Any, bytes] = {}


def kernels(arch: Architecture, dtype: torch.dtype) -> EncoderKernels:
    wanted = model_constants(arch, dtype)
    key = tuple(wanted.items())
    major, minor = torch.cuda.get_device_capability()
    if key not in _cubins:
        _cubins[key] = compile_cubin(SOURCE, wanted, architecture_name(major, minor))[0]
    torch.cuda.current_stream().synchronize()
    return EncoderKernels(_cubins[key], wanted, CUDA)


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


def check_packed(arch: Architecture, dtype: torch.dtype, lengths: Sequence[int], chance: random.Random) -> torch.Tensor:
    """Sources of some lengths one behind another, in a drawn order, of which the last one shows nothing.

    Returns:
        What attention has left behind the last source.
    """
    own, order = kernels(arch, dtype), chance.sample(lengths, len(lengths))
    room = sum(order) + 77
    starts = torch.tensor([0, *order]).cumsum(0)
    qkv = random_qkv(1, room, arch, dtype, len(lengths))[0]
    qkv[starts[-1] :] = torch.nan  # which nothing may read
    mask = torch.tensor([int(chance.random() < 0.9) for _ in range(room)]).cuda()
    mask[starts[-2] :] = 0  # the last source shows nothing
    table = 3 * torch.randn((arch.num_buckets, arch.num_heads), device="cuda")
    buckets = distance_buckets(arch.num_buckets, arch.max_distance, bidirectional=True).cuda()
    bias, given = relative_bias(table, buckets), starts.cuda()
    made = [own.attend(qkv, own.list_packed(mask, given, wide=wide), bias) for wide in (False, True, None)]
    for begin, length in zip(starts.tolist(), order, strict=False):
        part = slice(begin, begin + length)
        if length:
            alone = own.attend(qkv[None, part].clone(), own.list_keys(mask[None, part].clone()), bias)[0]
            assert all(torch.equal(each[part], alone) for each in made), length
    expected = reference.attend_packed(qkv.double(), mask, starts, table.double()[buckets].t(), arch.num_heads)
    used = int(starts[-1])
    assert error(made[0][:used], expected[:used]) < ROUNDED[dtype]
    return torch.stack(made)[:, used:]


def check_residual_sum_and_norm(size: int) -> None:
    own, generator = kernels(replace(SMALL, d_model=size), torch.float16), torch.Generator("cuda").manual_seed(size)
    stream, branch = (torch.randn((1001, size), device="cuda", generator=generator) for _ in range(2))
    branch, weight = branch.half(), torch.rand(size, device="cuda", generator=generator).half()
    for given in (weight, None):
        summed, expected = reference.add_and_norm(
            stream.double(), branch.double(), 4.0, 1e-6, None if given is None else given.double()
        )
        made = own.add_and_norm(stream, branch, 4.0, 1e-6, given, torch.float16)
        assert error(stream, summed) < 1e-6 and error(made, expected) < 1e-3


def check_split_heads() -> None:
    made = torch.randn((5, 301, 6 * SMALL.num_heads * SMALL.d_kv), device="cuda").half()
    assert torch.equal(
        kernels(SMALL, torch.float16).split_heads(made, 6), reference.split_heads(made, 6, SMALL.num_heads)
    )
