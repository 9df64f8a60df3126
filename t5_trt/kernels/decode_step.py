"""One decoder step of R rows as a chain of kernels: what they are compiled with, the memory they share, and their launches.

    tokens -> embed -> [ project_qkv -> attend_self -> add_attention -> project_query -> attend_cross -> add_attention
                         -> feed_forward_in -> feed_forward_out ] x layers -> output_head -> logits (, best token)

Nothing here waits for the GPU or allocates, so that a step can be captured in a CUDA graph with whatever follows it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from t5_trt.architecture import ACTIVATIONS, Architecture
from t5_trt.kernels.compile import bindings, checked

STORAGE = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
#: keys of one head that a CTA of an attention kernel takes (``CHUNK`` in ``attention.cuh``)
CHUNK = 256
#: output tiles of a CTA of ``output_head`` (``ends.cuh``)
HEAD_WARPS = 8
#: shared memory that a CTA of ``output_head`` may take for its rows; every GPU from compute capability 8.0 on has 99 KB
SHARED_BYTES = 64 * 1024
KERNELS = (
    "embed", "project_qkv", "attend_self", "add_attention", "project_query", "attend_cross", "feed_forward_in",
    "feed_forward_out", "output_head",
)  # fmt: skip


def tiles(size: int) -> int:
    """Tiles of 16 that a size takes."""
    return -(-size // 16)


def refusal(arch: Architecture, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run a model, or None."""
    vector = 16 // dtype.itemsize
    if arch.d_kv > 128 or arch.d_kv % vector:
        return f"d_kv is {arch.d_kv}; the kernels take multiples of {vector} up to 128"
    return None


def constants(arch: Architecture, dtype: torch.dtype, rows: int) -> dict[str, int]:
    """What the kernels for a model and a number of rows are compiled with."""
    most = 2 if dtype == torch.float32 else 4  # accumulators of more rows do not fit into registers
    while most > 1 and most * tiles(arch.d_model) * 256 > SHARED_BYTES:
        most //= 2
    row_tiles = next(count for count in (1, 2, 4) if count >= min(most, -(-rows // 8)))
    return {
        "STORAGE": STORAGE[dtype],
        "E": arch.d_model,
        "H": arch.num_heads,
        "D": arch.d_kv,
        "FF": arch.d_ff,
        "V": arch.vocab_size,
        "ROW_TILES": row_tiles,
        "GATED": int(arch.gated),
        "ACTIVATION": ACTIVATION_NUMBERS[arch.activation],
    }


ACTIVATION_NUMBERS = {name: ("relu", "gelu", "gelu_new", "silu").index(name) for name in ACTIVATIONS}


@dataclass(frozen=True)
class LayerWeights:
    """Packed matrices of one decoder layer (`t5_trt.kernels.weights`), its bias table, and what undoes fp16 scaling.

    Attributes:
        qkv, self_out, query, cross_out, wi, wo: packed.
        bias: float32 [H, distances].
        self_scale, cross_scale, wo_scale: what the products that are added to the stream are multiplied by.
    """

    qkv: torch.Tensor
    self_out: torch.Tensor
    query: torch.Tensor
    cross_out: torch.Tensor
    wi: torch.Tensor
    wo: torch.Tensor
    bias: torch.Tensor
    self_scale: float = 1.0
    cross_scale: float = 1.0
    wo_scale: float = 1.0


@dataclass(frozen=True)
class StepWeights:
    """All that a step reads of a model: the embedding [V, E], its layers, the packed output matrix and what undoes its factor."""

    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    head: torch.Tensor
    head_scale: float = 1.0

    @property
    def nbytes(self) -> int:
        """GPU memory that they take, the embedding left out: the encoder reads it too."""
        fields = (field for layer in self.layers for field in vars(layer).values())
        return self.head.nbytes + sum(tensor.nbytes for tensor in fields if isinstance(tensor, torch.Tensor))


@dataclass
class StepBuffers:
    """What the kernels of a step hand on, for R rows. Padding rows are zeros and stay so."""

    stream: torch.Tensor  # float32 [rows, E_PAD]
    squares: torch.Tensor  # float32 [rows, PARTIALS]
    query: torch.Tensor  # float32 [rows, HD_PAD]
    attended: torch.Tensor
    inner: torch.Tensor
    parts: torch.Tensor
    arrived: torch.Tensor
    best: torch.Tensor  # int64 [rows]

    @classmethod
    def allocate(
        cls, arch: Architecture, dtype: torch.dtype, rows: int, chunks: int, device: torch.device
    ) -> StepBuffers:
        """Zeros for R rows, and for keys in up to `chunks` chunks."""
        padded = -(-rows // 32) * 32
        inner = arch.num_heads * arch.d_kv

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            stream=zeros(padded, tiles(arch.d_model) * 16),
            squares=zeros(padded, tiles(tiles(arch.d_model)) * 16),
            query=zeros(padded, tiles(inner) * 16),
            attended=zeros(padded, tiles(inner) * 16, dtype=dtype),
            inner=zeros(padded, tiles(arch.d_ff) * 16, dtype=dtype),
            parts=zeros(rows, arch.num_heads, chunks, arch.d_kv + 2),
            arrived=zeros(rows, arch.num_heads, dtype=torch.int32),
            best=zeros(rows, dtype=torch.int64),
        )


@dataclass
class StepInputs:
    """The memory of a request that a step reads and writes.

    Attributes:
        tokens: int32 [R]. position: int32 [R], of those tokens.
        kv: [L, 2, R, H, T, D]. cross: [L, 2, B, H, S, D]. mask: float32 [B, S], additive. lengths: int32 [B], keys of each source.
        beams: rows that share a source.
        logits: float32 [R, V], or None where only the best token is wanted.
    """

    tokens: torch.Tensor
    position: torch.Tensor
    kv: torch.Tensor
    cross: torch.Tensor
    mask: torch.Tensor
    lengths: torch.Tensor
    beams: int
    logits: torch.Tensor | None


class DecodeKernels:
    """The loaded kernels of one cubin.

    Args:
        cubin: compiled with `constants`.
        constants: as given to the compiler.
        early: start each kernel before the one before it has ended (sm_90 and newer).
    """

    def __init__(self, cubin: bytes, constants: Mapping[str, int], *, early: bool) -> None:
        driver = bindings("driver")
        self._module = checked(driver.cuModuleLoadData(cubin))
        self._functions = {name: checked(driver.cuModuleGetFunction(self._module, name.encode())) for name in KERNELS}
        self.threads = {
            name: checked(
                driver.cuFuncGetAttribute(driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK, function)
            )
            for name, function in self._functions.items()
        }
        self.constants = dict(constants)
        self.early = early
        #: output tiles that a CTA of the wide products makes (``WIDE`` in ``layers.cuh``)
        self.wide = 2 if constants["ROW_TILES"] >= 4 and constants["STORAGE"] != STORAGE[torch.float32] else 1
        self._shared = {}
        if constants["STORAGE"] != STORAGE[torch.float32]:
            size = constants["ROW_TILES"] * tiles(constants["E"]) * 256
            self._shared["output_head"] = size
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            checked(driver.cuFuncSetAttribute(self._functions["output_head"], attribute, size))

    def launch(self, name: str, grid: tuple[int, ...], stream: int, *arguments: Any) -> None:
        """Start a kernel: tensors are passed by address (None as 0), ints as int32, floats as float32."""
        driver = bindings("driver")
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = (*grid, 1, 1)[:3]
        config.blockDimX, config.blockDimY, config.blockDimZ = self.threads[name], 1, 1
        config.hStream = stream
        config.sharedMemBytes = self._shared.get(name, 0)
        # the first kernel starts when all before it is done: those behind it read positions and lengths before their wait
        if self.early and name != "embed":
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [attribute], 1
        values: list[Any] = []
        types: list[Any] = []
        for argument in arguments:
            if isinstance(argument, float):
                values.append(argument)
                types.append(ctypes.c_float)
            elif isinstance(argument, int):
                values.append(argument)
                types.append(ctypes.c_int)
            else:
                values.append(0 if argument is None else argument.data_ptr())
                types.append(ctypes.c_void_p)
        checked(driver.cuLaunchKernelEx(config, self._functions[name], (tuple(values), tuple(types)), 0))


@dataclass
class DecodeStep:
    """A step of R rows over fixed memory.

    Attributes:
        epsilon: of every RMSNorm, in terms of the stream as it is stored.
    """

    arch: Architecture
    kernels: DecodeKernels
    weights: StepWeights
    buffers: StepBuffers
    inputs: StepInputs
    epsilon: float
    embedding_scale: float = 1.0
    wants_best: bool = False
    _chunks: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        self._chunks = tuple(-(-memory.shape[4] // CHUNK) for memory in (self.inputs.kv, self.inputs.cross))  # type: ignore[assignment]

    def enqueue(self, stream: int) -> None:
        """Start all kernels of a step on a CUDA stream."""
        given, buffers, weights = self.inputs, self.buffers, self.weights
        rows = len(given.tokens)
        groups = -(-rows // (self.kernels.constants["ROW_TILES"] * 8))
        launch = self.kernels.launch
        launch("embed", (rows,), stream, weights.embedding, given.tokens, buffers.stream, buffers.squares,
               self.embedding_scale)  # fmt: skip
        for layer, own in enumerate(weights.layers):
            self._layer(layer, own, rows, groups, stream)
        per_cta = 2 if self.kernels.constants["STORAGE"] == STORAGE[torch.float32] else HEAD_WARPS
        out_tiles = -(-tiles(self.arch.vocab_size) // per_cta)
        best = buffers.best if self.wants_best else None
        launch("output_head", (out_tiles, groups), stream, weights.head, buffers.stream, buffers.squares, given.logits, best, rows,
               self.epsilon, weights.head_scale)  # fmt: skip

    def _layer(self, layer: int, own: LayerWeights, rows: int, groups: int, stream: int) -> None:
        given, b, arch, launch, epsilon = self.inputs, self.buffers, self.arch, self.kernels.launch, self.epsilon
        keys, values = given.kv[layer]
        cross_keys, cross_values = given.cross[layer]
        heads, out, inner = arch.num_heads, tiles(arch.d_model), tiles(arch.num_heads * arch.d_kv)
        wide = self.kernels.wide
        wi_tiles = -(-tiles(arch.d_ff) // (1 if arch.gated else wide))
        room, width = keys.shape[2], cross_keys.shape[2]
        launch("project_qkv", (-(-3 * inner // wide), groups), stream, own.qkv, b.stream, b.squares, b.query, keys, values,
               given.position, rows, room, epsilon)  # fmt: skip
        launch("attend_self", (heads, rows, self._chunks[0]), stream, b.query, keys, values, own.bias, given.position, b.attended, b.parts,
               b.arrived, room, own.bias.shape[1])  # fmt: skip
        launch("add_attention", (out, groups), stream, own.self_out, b.attended, b.stream, b.squares, rows,
               own.self_scale)  # fmt: skip
        launch("project_query", (inner, groups), stream, own.query, b.stream, b.squares, b.query, rows, epsilon)
        launch("attend_cross", (heads, rows, self._chunks[1]), stream, b.query, cross_keys, cross_values, given.mask, given.lengths,
               b.attended, b.parts, b.arrived, width, given.mask.shape[1], given.beams)  # fmt: skip
        launch("add_attention", (out, groups), stream, own.cross_out, b.attended, b.stream, b.squares, rows,
               own.cross_scale)  # fmt: skip
        launch("feed_forward_in", (wi_tiles, groups), stream, own.wi, b.stream, b.squares, b.inner, rows, epsilon)
        launch("feed_forward_out", (out, groups), stream, own.wo, b.inner, b.stream, b.squares, rows, own.wo_scale)
