"""Decoder steps by the kernels on random weights and inputs, compared with the torch references in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from t5_trt.graph.architecture import Architecture
from t5_trt.kernels import reference
from t5_trt.kernels.compile import architecture_name, compile_cubin
from t5_trt.kernels.decode_step import CHUNK, DecodeKernels, DecodeStep, constants
from t5_trt.kernels.step_memory import LayerWeights, StepBuffers, StepInputs, StepWeights
from t5_trt.kernels.weights import pack_gated, pack_head, pack_matrix, pack_stack, unpack_int8

SMALL = Architecture(
    vocab_size=1003, d_model=256, d_kv=64, num_heads=4, d_ff=512, encoder_layers=1, decoder_layers=2, num_buckets=32,
    max_distance=128, activation="relu", gated=False, epsilon=1e-6, tied_head=False, output_scale=1.0, bias_per_layer=False,
)  # fmt: skip
#: how weights are stored -> largest relative error of logits after two layers; in int8 against the rounded weights
TOLERANCES = {torch.float32: 4e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2, torch.int8: 5e-3}
_cubins: dict[Any, bytes] = {}


@dataclass
class Case:
    """A step on random weights and inputs, and the matrices behind the packed weights."""

    step: DecodeStep
    matrices: list[dict[str, torch.Tensor]]
    head: torch.Tensor


def kernels(arch: Architecture, dtype: torch.dtype, rows: int, *, early: bool = True, **other: int) -> DecodeKernels:
    """With `other` constants in place of those that are chosen."""
    major, minor = torch.cuda.get_device_capability()
    wanted = constants(arch, real(dtype), rows, major, int8=dtype == torch.int8) | other
    key = tuple(sorted(wanted.items()))
    if key not in _cubins:
        _cubins[key] = compile_cubin("decode_step.cu", wanted, architecture_name(major, minor))[0]
    return DecodeKernels(_cubins[key], wanted, torch.device("cuda"), early=early and major >= 9)


def real(dtype: torch.dtype) -> torch.dtype:
    """Of caches and activations."""
    return torch.float16 if dtype == torch.int8 else dtype


def rounded(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A matrix as the kernels have it."""
    return unpack_int8(pack_matrix(matrix, dtype), *matrix.shape) if dtype == torch.int8 else matrix


def buffers_of(arch: Architecture, dtype: torch.dtype, rows: int, chunks: int) -> StepBuffers:
    device = torch.device("cuda")
    return StepBuffers.allocate(arch, real(dtype), rows, chunks, device, int8=dtype == torch.int8)


def make(
    arch: Architecture,
    dtype: torch.dtype,
    positions: list[int],
    lengths: list[int],
    beams: int,
    *,
    seed: int = 0,
    early: bool = True,
) -> Case:
    """Rows at these positions (of caches just as long as the next power of two), sources of these lengths."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, device="cuda", generator=generator) * scale).to(real(dtype))

    size, inner, rows = arch.d_model, arch.num_heads * arch.d_kv, len(positions)
    capacity, width = 1 << max(positions).bit_length(), max(lengths) + 3
    matrices, layers = [], []
    for _ in range(arch.decoder_layers):
        own = {
            "qkv": random(3 * inner, size, scale=size**-0.5), "self_out": random(size, inner, scale=inner**-0.5),
            "query": random(inner, size, scale=size**-0.5), "cross_out": random(size, inner, scale=inner**-0.5),
            "wi": random((1 + arch.gated) * arch.d_ff, size, scale=size**-0.5), "wo": random(size, arch.d_ff, scale=arch.d_ff**-0.5),
        }  # fmt: skip
        wi = pack_gated(*own["wi"].chunk(2), dtype) if arch.gated else pack_matrix(own["wi"], dtype)
        packed = {name: pack_matrix(own[name], dtype) for name in ("self_out", "query", "cross_out", "wo")}
        bias = random(arch.num_heads, arch.max_distance + 1).float()
        qkv = pack_stack(list(own["qkv"].chunk(3)), dtype)
        layers.append(LayerWeights(qkv=qkv, wi=wi, bias=bias, self_scale=0.5, cross_scale=2.0, wo_scale=1.5, **packed))
        matrices.append({name: rounded(matrix, dtype) for name, matrix in own.items()})
    head = random(arch.vocab_size, size, scale=size**-0.5)
    mask = torch.zeros(len(lengths), width, device="cuda")
    mask[:, 1::3] = -1e30  # hidden, but for the first
    inputs = StepInputs(
        tokens=torch.randint(0, arch.vocab_size, (rows,), device="cuda", dtype=torch.int32, generator=generator),
        position=torch.tensor(positions, device="cuda", dtype=torch.int32),
        kv=random(arch.decoder_layers, 2, rows, arch.num_heads, capacity, arch.d_kv),
        cross=random(arch.decoder_layers, 2, len(lengths), arch.num_heads, width, arch.d_kv),
        mask=mask,
        lengths=torch.tensor(lengths, device="cuda", dtype=torch.int32),
        beams=beams,
        logits=torch.full((rows, arch.vocab_size), float("nan"), device="cuda"),
    )
    for row, position in enumerate(positions):  # nothing behind a row's position may be read
        inputs.kv[:, :, row, :, position:] = float("nan")
    for source, length in enumerate(lengths):
        inputs.cross[:, :, source, :, length:] = float("nan")
    buffers = buffers_of(arch, dtype, rows, -(-max(capacity, width) // CHUNK))
    for buffer in (buffers.parts, buffers.copy):
        buffer.fill_(float("nan"))
    for buffer in (buffers.stream, buffers.query, buffers.squares):
        buffer[:rows, : {id(buffers.stream): size, id(buffers.query): inner}.get(id(buffer), 0)] = float("nan")
    weights = StepWeights(random(arch.vocab_size, size), tuple(layers), pack_head(head, dtype), 0.25)
    if beams > 1:
        inputs.ancestors = ancestors(inputs, generator)
    step = DecodeStep(arch, kernels(arch, dtype, rows, early=early), weights, buffers, inputs, arch.epsilon, 0.5)
    return Case(step, matrices, rounded(head, dtype))


def ancestors(inputs: StepInputs, generator: torch.Generator) -> torch.Tensor:
    """Any of an entry's beams that has the token; its own where a row stands."""
    rows, capacity, beams = len(inputs.tokens), inputs.kv.shape[4], inputs.beams
    own = (torch.arange(rows, device="cuda") % beams)[:, None].expand(rows, capacity + 1)
    drawn = torch.randint(0, beams, own.shape, device="cuda", generator=generator)
    places = torch.arange(capacity + 1, device="cuda")
    first = torch.arange(rows, device="cuda")[:, None] // beams * beams
    there = (places < inputs.position[first + drawn]) & (places < inputs.position[:, None])
    return torch.where(there, drawn, own).byte()


def run(case: Case) -> torch.Tensor:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    case.step.buffers.best.zero_()
    torch.cuda.synchronize()
    case.step.enqueue(stream.cuda_stream, wants_best=True)
    case.step.enqueue(stream.cuda_stream)
    torch.cuda.synchronize()
    return case.step.inputs.logits.clone()


def expected(case: Case) -> torch.Tensor:
    """Logits by the references, in float64."""
    step, given, arch = case.step, case.step.inputs, case.step.arch
    rows, shape = len(given.tokens), (len(given.tokens), arch.num_heads, arch.d_kv)
    stream = reference.embed(step.weights.embedding.double(), given.tokens, step.embedding_scale)
    for layer, (m, own) in enumerate(zip(case.matrices, step.weights.layers, strict=True)):
        query, *new = (part.view(shape) for part in reference.project_qkv(m["qkv"].double(), stream, arch.epsilon))
        keys, values = given.kv[layer].double()
        for row in range(rows):
            keys[row, :, given.position[row]], values[row, :, given.position[row]] = new[0][row], new[1][row]
        if given.ancestors is not None:
            places = torch.arange(keys.shape[2], device="cuda")
            holders = torch.arange(rows, device="cuda")[:, None] // given.beams * given.beams + given.ancestors[:, :-1]
            keys, values = (part.transpose(1, 2)[holders, places].transpose(1, 2) for part in (keys, values))
        attended = reference.attend_self(query, keys, values, own.bias.double(), given.position)
        stream = reference.add_attention(m["self_out"].double(), attended, stream, own.self_scale)
        query = reference.project_query(m["query"].double(), stream, arch.epsilon).view(shape)
        attended = reference.attend_cross(
            query, *given.cross[layer].double(), given.mask.double(), given.lengths, given.beams
        )
        stream = reference.add_attention(m["cross_out"].double(), attended, stream, own.cross_scale)
        inner = reference.feed_forward_in(m["wi"].double(), stream, arch.epsilon, arch.activation, gated=arch.gated)
        stream = reference.feed_forward_out(m["wo"].double(), inner, stream, own.wo_scale)
    return reference.output_head(case.head.double(), stream, arch.epsilon, step.weights.head_scale)


def check(case: Case, dtype: torch.dtype, slack: float = 1.0) -> None:
    wanted, got = expected(case), run(case)
    assert got.isfinite().all(), "every logit is written, and nothing poisoned is read"
    assert float((got.double() - wanted).norm() / wanted.norm()) < slack * TOLERANCES[dtype]
    assert torch.equal(~case.step.buffers.best & 0xFFFFFFFF, got.argmax(-1)), "the best token"
    assert int(case.step.buffers.arrived.abs().max()) == 0
    hidden, until = (
        torch.zeros(got.shape[1], device="cuda", dtype=torch.uint8),
        case.step.inputs.position.double().median()[None] + 1,
    )
    hidden[got.argmax(-1)] = 1
    case.step.buffers.best.zero_()
    torch.cuda.synchronize()
    case.step.enqueue(torch.cuda.Stream().cuda_stream, wants_best=True, hidden=hidden, until=until)
    torch.cuda.synchronize()
    short = (case.step.inputs.position + 1 < until)[:, None]
    assert torch.equal(
        ~case.step.buffers.best & 0xFFFFFFFF, got.masked_fill(hidden.bool() & short, -torch.inf).argmax(-1)
    ), "hidden"
