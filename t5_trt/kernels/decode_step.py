"""One decoder step of R rows as a chain of kernels: compile-time constants, shared memory, and launches.

    tokens -> embed -> [ project_qkv -> attend_self -> add_attention -> project_query -> attend_cross -> add_attention
                         -> feed_forward_in -> feed_forward_out ] x layers -> output_head -> logits (, best token)

Nothing here waits for the GPU or allocates memory, so that a step can be captured in a CUDA graph with the token selection.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from t5_trt.graph.architecture import ACTIVATIONS, Architecture
from t5_trt.kernels.compile import bindings, checked
from t5_trt.kernels.division import LARGE_SHARED, SHARED_PERCENT, divide_attention, divide_products, shared_memory
from t5_trt.kernels.launching import LoadedModule, launch
from t5_trt.kernels.step_memory import LayerWeights, StepBuffers, StepInputs, StepWeights, padded, tiles

STORAGE = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
#: keys of one head that a CTA of an attention kernel takes (``CHUNK`` in ``attention.cuh``)
CHUNK = 128
KERNELS = (
    "embed", "project_qkv", "attend_self", "attend_moved", "add_attention", "project_query", "attend_cross", "feed_forward_in",
    "feed_forward_out", "output_head",
)  # fmt: skip
#: d_kv of models whose attention is ``tile_attention.cuh``'s, in half precision; the others have no ``attend_shared``
TILE_WIDTHS = (64, 128)
#: kernels in the order of ``geometry`` in ``decode_step.cu``
PRODUCTS = ("project_qkv", "add_attention", "project_query", "feed_forward_in", "feed_forward_out", "output_head")
#: those of a layer; of output_head two CTAs need all shared memory of a multiprocessor
LAYER_PRODUCTS = PRODUCTS[:-1]


def refusal(arch: Architecture, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run a model, or None."""
    vector = 16 // dtype.itemsize
    if arch.d_kv > 128 or arch.d_kv % vector:
        return f"d_kv is {arch.d_kv}; the kernels take multiples of {vector} up to 128"
    return None


def constants(
    arch: Architecture,
    dtype: torch.dtype,
    rows: int,
    capability: int = 8,
    *,
    int8: bool = False,
) -> dict[str, int]:
    """Compile-time constants of the kernels for a model and a number of rows.

    Args:
        arch: of the model.
        dtype: of weights and caches.
        rows: of a step.
        capability: the GPU's compute capability, its major number.
        int8: matrices are in 8 bits, and all else is float16.
    """
    model = model_constants(arch, dtype)
    return (
        model
        | ({"INT8": 1} if int8 else {})
        | {"V": arch.vocab_size}
        | divide_products(arch, dtype, rows, capability, int8=int8)
        | divide_attention(
            arch.num_heads * rows,
            capability,
            wide=arch.d_kv * dtype.itemsize > 128,
            tiled=has_tile_attention(model),
        )
    )


def model_constants(arch: Architecture, dtype: torch.dtype) -> dict[str, int]:
    """The constants that encoder kernels have too."""
    return {
        "STORAGE": STORAGE[dtype],
        "E": arch.d_model,
        "H": arch.num_heads,
        "D": arch.d_kv,
        "FF": arch.d_ff,
        "GATED": int(arch.gated),
        "ACTIVATION": ACTIVATION_NUMBERS[arch.activation],
    }


def has_tile_attention(constants: Mapping[str, int]) -> bool:
    """Whether attention is made by the tensor cores, ``tile_attention.cuh``, and so there is ``attend_shared``."""
    return constants["STORAGE"] != STORAGE[torch.float32] and constants["D"] in TILE_WIDTHS


ACTIVATION_NUMBERS = {name: ("relu", "gelu", "gelu_new", "silu").index(name) for name in ACTIVATIONS}


@dataclass(frozen=True)
class Geometry:
    """How a product kernel divides its work, see ``layers.cuh``.

    Attributes:
        wide: tiles of outputs of a CTA.
        rows: of a CTA.
        shared: bytes of dynamic shared memory.
        cluster: CTAs of a cluster, which make the same outputs, each of a part of k.
    """

    wide: int
    rows: int
    shared: int
    cluster: int

    @classmethod
    def of_products(cls, numbers: Sequence[int]) -> dict[str, Geometry]:
        """By product, from the entries of ``geometry``."""
        return {name: cls(*numbers[4 * i : 4 * i + 4]) for i, name in enumerate(PRODUCTS)}

    def grid(self, outputs: int, rows: int) -> tuple[int, int]:
        """CTAs along both axes, for tiles of outputs in all and rows."""
        return -(-outputs // self.wide) * self.cluster, -(-rows // self.rows)


class DecodeKernels:
    """The loaded kernels of one cubin.

    Args:
        cubin: compiled with `constants`.
        constants: as given to the compiler.
        device: the GPU, whose context is the current one.
        early: start each kernel before the one before it has ended (sm_90 and newer).
    """

    def __init__(self, cubin: bytes, constants: Mapping[str, int], device: torch.device, *, early: bool) -> None:
        driver = bindings("driver")
        names = (*KERNELS, "attend_shared") if has_tile_attention(constants) else KERNELS
        self._module = LoadedModule(cubin, names)
        self._functions = self._module.functions
        self.threads = {
            name: checked(
                driver.cuFuncGetAttribute(driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK, function)
            )
            for name, function in self._functions.items()
        }
        self.constants = dict(constants)
        self.early = early
        numbers = self._module.numbers("geometry")
        self.geometry = Geometry.of_products(numbers)
        #: most rows of one source that a CTA of ``attend_shared`` takes; 1: there is no such kernel
        self.sharers = numbers[-1]
        gpu = torch.cuda.get_device_properties(device)
        self._gpu = gpu.major, gpu.multi_processor_count
        for name in PRODUCTS:
            self._module.allow_shared(name, self._shared(name, 1))
            if self._gpu[0] in LARGE_SHARED and name in LAYER_PRODUCTS:
                self._module.prefer_shared(name, SHARED_PERCENT)

    def _shared(self, name: str, ctas: int) -> int:
        """Bytes of dynamic shared memory of a kernel."""
        own = self.geometry[name].shared if name in self.geometry else 0
        return shared_memory(own, ctas, *self._gpu) if name in LAYER_PRODUCTS else own

    def launch(self, name: str, grid: tuple[int, ...], stream: int, *arguments: Any, early: bool = True) -> None:
        """Start a kernel, see `t5_trt.kernels.launching.launch`; `early` where the GPU can."""
        shared = self._shared(name, math.prod(grid))
        # the first kernel starts after all earlier work: later kernels read positions and lengths before their wait
        early = early and self.early and name != "embed"
        launch(self._functions[name], grid, self.threads[name], stream, arguments, shared=shared, early=early)


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
    _chunks: tuple[int, int] = field(init=False)
    _grids: dict[str, tuple[int, ...]] = field(init=False)
    _cross: str = field(init=False)

    def __post_init__(self) -> None:
        self._chunks = tuple(-(-memory.shape[4] // CHUNK) for memory in (self.inputs.kv, self.inputs.cross))  # type: ignore[assignment]

        arch = self.arch
        sizes = (arch.d_model, arch.num_heads * arch.d_kv, arch.d_ff)
        model, inner, hidden = (padded(size, int8=self.weights.int8) // 16 for size in sizes)
        out_tiles = zip(PRODUCTS, (3 * inner, model, inner, hidden, model, tiles(arch.vocab_size)), strict=True)
        rows, geometry = len(self.inputs.tokens), self.kernels.geometry
        self._grids = {name: geometry[name].grid(count, rows) for name, count in out_tiles}
        beams, sharers = self.inputs.beams, self.kernels.sharers
        shared = beams > 1 and sharers > 1
        self._cross = "attend_shared" if shared else "attend_cross"
        ctas = rows // beams * -(-beams // sharers) if shared else rows
        self._grids[self._cross] = (arch.num_heads, ctas, self._chunks[1])

    def enqueue(
        self,
        stream: int,
        *,
        wants_best: bool = False,
        hidden: torch.Tensor | None = None,
        until: torch.Tensor | None = None,
    ) -> None:
        """Start all kernels of a step on a CUDA stream.

        Args:
            stream: a CUstream.
            wants_best: leave the best token of each row in ``buffers.best``, which must hold zeros, and no logits.
            hidden: uint8 [V], 1 for tokens that a short row must not choose.
            until: float64 [1], length from which a row is not short.
        """
        self.enqueue_layers(stream)
        logits, best = (None, self.buffers.best) if wants_best else (self.inputs.logits, None)
        self._head(stream, logits, best, hidden, until)

    def enqueue_layers(self, stream: int) -> None:
        """Start the kernels before the output matrix."""
        given, b, weights = self.inputs, self.buffers, self.weights
        rows = len(given.tokens)
        scales, next_scales = b.scales
        self.kernels.launch("embed", (rows,), stream, weights.embedding, given.tokens, b.stream, b.copy, b.squares, scales,
                            self.embedding_scale)  # fmt: skip
        for layer, own in enumerate(weights.layers):
            self._layer(layer, own, rows, stream, scales, next_scales)
            scales, next_scales = next_scales, scales  # three kernels of each layer include a norm

    def enqueue_head(self, stream: int, logits: torch.Tensor) -> None:
        """Start the output matrix's kernel after `enqueue_layers`, which a CUDA graph may have started: float32 [R, V] in any memory."""
        self._head(stream, logits, None, None, None, early=False)

    def _head(self, stream: int, *out: torch.Tensor | None, early: bool = True) -> None:
        given, b, weights = self.inputs, self.buffers, self.weights
        scales = b.scales[len(weights.layers) % 2]
        self.kernels.launch("output_head", self._grids["output_head"], stream, weights.head, b.copy, b.squares, scales, *out,
                            given.position, len(given.tokens), self.epsilon, weights.head_scale, early=early)  # fmt: skip

    def _layer(
        self,
        layer: int,
        own: LayerWeights,
        rows: int,
        stream: int,
        scales: torch.Tensor,
        other: torch.Tensor,
    ) -> None:
        given, b, grids, start, epsilon = self.inputs, self.buffers, self._grids, self.kernels.launch, self.epsilon
        keys, values = given.kv[layer]
        cross_keys, cross_values = given.cross[layer]
        heads, room, width = self.arch.num_heads, keys.shape[2], cross_keys.shape[2]
        moved: tuple[Any, ...] = ()  # where beams' keys and values lie, if they move
        if given.ancestors is not None:
            moved = (given.ancestors, given.neighbours or given.beams, given.ancestors.shape[1])
        places = given.position if given.places is None else given.places
        start("project_qkv", grids["project_qkv"], stream, own.qkv, b.copy, b.squares, scales, other, b.query, keys, values,
               places, rows, room, epsilon)  # fmt: skip
        # it reads all keys but its row's newest one before its wait, and other rows may have written some of them just now
        start("attend_moved" if moved else "attend_self", (heads, rows, self._chunks[0]), stream, b.query, keys, values, own.bias, given.position,
               b.attended, b.parts, b.arrived, room, own.bias.shape[1], *moved, early=given.places is None)  # fmt: skip
        start("add_attention", grids["add_attention"], stream, own.self_out, b.attended, b.stream, b.copy, b.squares, other, rows,
               own.self_scale)  # fmt: skip
        start("project_query", grids["project_query"], stream, own.query, b.copy, b.squares, other, scales, b.query, rows,
               epsilon)  # fmt: skip
        start(self._cross, grids[self._cross], stream, b.query, cross_keys, cross_values, given.mask, given.lengths,
               b.attended, b.parts, b.arrived, width, given.mask.shape[1], given.beams)  # fmt: skip
        start("add_attention", grids["add_attention"], stream, own.cross_out, b.attended, b.stream, b.copy, b.squares, scales, rows,
               own.cross_scale)  # fmt: skip
        start("feed_forward_in", grids["feed_forward_in"], stream, own.wi, b.copy, b.squares, scales, other, b.inner, rows,
               epsilon)  # fmt: skip
        start("feed_forward_out", grids["feed_forward_out"], stream, own.wo, b.inner, b.stream, b.copy, b.squares, other, rows,
               own.wo_scale)  # fmt: skip
