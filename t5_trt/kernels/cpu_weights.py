"""What our C code for a CPU (`t5_trt/kernels/cpu`) reads: a model's weights, and the threads of a call.

Matrices in float32 and bfloat16 are read where the model has them, or are rounded to bfloat16. Those in 8 bits are laid out anew, in tiles
of 16 outputs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Mapping

import torch

from t5_trt.errors import BackendError, InputError
from t5_trt.graph.architecture import ACTIVATIONS, Architecture
from t5_trt.graph.int8 import MATRIX, SCALE
from t5_trt.graph.parameters import EMBEDDING, Weights, parameters

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 2}
TILE = 16
#: bytes of matrices up to which each thread reads all of them for rows of its own, as they stay in the processor's caches; above, each
#: reads a part of them for all rows
CACHED_BYTES = 8 << 20
_long, _int, _float, _address = ctypes.c_int64, ctypes.c_int32, ctypes.c_float, ctypes.c_void_p


#: field of `Layer` for a norm -> the group behind it
_NORMS = {"self_norm": "qkv", "cross_norm": "cross_q", "feed_forward_norm": "wi"}


def stay_cached(
    arch: Architecture,
    groups: Collection[str],
    quantized: Mapping[str, torch.Tensor] | None,
    matrices: torch.dtype | None = None,
) -> bool:
    """Whether the matrices of some groups stay in the processor's caches from call to call, see `CACHED_BYTES`; arguments as of `CpuWeights`."""
    known = parameters(arch)
    size = 1 if quantized else (matrices or torch.float32).itemsize
    return size * sum(known[name].inputs * sum(known[name].widths) for name in groups) <= CACHED_BYTES


def packed_bytes(inputs: int, outputs: int) -> int:
    """Bytes of a matrix in 8 bits as `t5_pack` lays it out: outputs in tiles, inputs in fours."""
    return -(-outputs // TILE) * TILE * (-(-inputs // 4) * 4)


class Part(ctypes.Structure):
    """A matrix of a group."""

    _fields_ = [("weights", _address), ("scales", _address), ("outputs", _long)]


class Group(ctypes.Structure):
    """Matrices that multiply the same rows."""

    _fields_ = [("parts", Part * 3), ("count", _int), ("type", _int), ("inputs", _long), ("outputs", _long)]


class Layer(ctypes.Structure):
    """A layer of the decoder, or of the encoder, which has no cross-attention."""

    _fields_ = [
        *((name, Group) for name in ("qkv", "self_o", "cross_q", "cross_o", "wi", "wo")),
        *((name, _address) for name in ("self_norm", "cross_norm", "feed_forward_norm", "bias")),
    ]


class Model(ctypes.Structure):
    """A decoder or an encoder."""

    _fields_ = [
        *((name, _long) for name in ("d_model", "d_kv", "heads", "d_ff", "layers", "vocabulary", "longest_distance")),
        *((name, _int) for name in ("activation", "gated", "embedding_type", "by_rows")),
        *((name, _float) for name in ("epsilon", "output_scale")),
        *((name, _address) for name in ("embedding", "buckets", "final_norm")),
        ("head", Group),
        ("layers_of", ctypes.POINTER(Layer)),
        ("rough", _address),
        ("cross_kv", ctypes.POINTER(Group)),
        ("cross_groups", _long),
    ]


class CpuTeam:
    """The threads of calls, which run one after the other, also those of several decoders and encoders.

    Args:
        library: of `t5_trt.kernels.cpu_compile.load_library`.
        threads: of a call, the calling one among them.
        spinning: whether they may wait busily for one another.

    Raises:
        BackendError: memory ran out.
    """

    def __init__(self, library: ctypes.CDLL, threads: int, spinning: bool) -> None:
        self.library = library
        self.address = _address(library.t5_open_team(threads, int(spinning)))
        if not self.address:
            raise BackendError("memory ran out while threads were started on the CPU.")

    def __del__(self) -> None:
        if getattr(self, "address", None):
            self.library.t5_close_team(self.address)

    def open(self, model: Model) -> ctypes.c_void_p:
        """A decoder or an encoder for `t5_close`.

        Raises:
            BackendError: memory ran out.
        """
        made = _address(self.library.t5_open(ctypes.byref(model), self.address))
        if not made:
            raise BackendError("memory ran out while a decoder or an encoder was opened on the CPU.")
        return made

    @staticmethod
    def check(done: int, what: str, vocabulary: int) -> None:
        """Check what a call gave.

        Args:
            done: 1, 0 or -1.
            what: ran, "encoder" or "decoder".
            vocabulary: V.

        Raises:
            InputError: -1, a token is not in the vocabulary.
            BackendError: 0, memory ran out.
        """
        if done < 0:
            raise InputError(
                f"a token for the {what} is out of range; expected 0 to {vocabulary - 1}, the model's vocabulary."
            )
        if not done:
            raise BackendError(
                f"memory ran out in the {what} on the CPU. Use a smaller batch, fewer beams or shorter sources."
            )


class CpuWeights:
    """The weights that one decoder or encoder reads.

    Args:
        library: of `t5_trt.kernels.cpu_compile.load_library`.
        arch: of the model.
        weights: state-dict key -> CPU tensor; the memory of float32 and bfloat16 is read by every call.
        quantized: what `t5_trt.graph.int8.quantize` makes; None multiplies by `weights`.
        groups: names of the groups of matrices that are multiplied by, see `t5_trt.graph.parameters.parameters`.
        matrices: torch.bfloat16 multiplies by matrices in bfloat16, rounded where they have another type; None by those of `quantized`
            and `weights` as they are. What is looked up or added keeps its type.
        after_packing: called with the name of each matrix of `quantized` that is not read any more.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        arch: Architecture,
        weights: Weights,
        quantized: Mapping[str, torch.Tensor] | None,
        groups: Collection[str],
        *,
        matrices: torch.dtype | None = None,
        after_packing: Callable[[str], None] | None = None,
    ) -> None:
        self._library, self._arch, self._weights, self._quantized = library, arch, weights, quantized or {}
        self._after_packing = after_packing
        self._stay_cached = stay_cached(arch, groups, quantized, matrices)
        self.groups = parameters(arch)
        self.kept: dict[str, torch.Tensor] = {}  # memory that the structures point to
        self.packed = self._room_for_bytes(groups)
        self.rounded = {} if matrices is None else self._room_for_rounded(groups, matrices)

    def update(self, changed: Collection[str]) -> None:
        """Read weights that have changed in their places, and matrices of them that were rounded anew.

        Args:
            changed: state-dict keys.
        """
        for name, parameter in self.groups.items():
            if set(changed).isdisjoint(parameter.parts):
                continue
            if name in self.packed:
                self._pack(name)
                continue
            for key in parameter.parts:
                if key in self.kept:
                    self._refresh(key)
        for key in set(changed) & self.kept.keys():
            self._refresh(key)
        for key in set(changed) & self.rounded.keys():
            self._round(key)

    def model(self, layers: int, buckets: torch.Tensor, final_norm: str | None) -> Model:
        """What a decoder and an encoder have in common.

        Args:
            layers: their number.
            buckets: of distances, see `t5_trt.graph.relative_positions.distance_buckets`.
            final_norm: state-dict key.
        """
        arch, embedding = self._arch, self.in_place(EMBEDDING)
        made = Model(
            d_model=arch.d_model,
            d_kv=arch.d_kv,
            heads=arch.num_heads,
            d_ff=arch.d_ff,
            layers=layers,
            vocabulary=arch.vocab_size,
            activation=ACTIVATIONS.index(arch.activation),
            gated=int(arch.gated),
            embedding_type=TYPES[embedding.dtype],
            by_rows=int(self._stay_cached),
            epsilon=arch.epsilon,
            output_scale=1.0,
        )
        made.embedding, made.buckets = embedding.data_ptr(), self.keep("buckets", buckets.to(torch.int32))
        made.final_norm = self.vector(final_norm)
        return made

    def group(self, name: str) -> Group:
        """The matrices of a group as products read them, at most 3."""
        (made,) = self.split_group(name, len(self.groups[name].parts))
        return made

    def split_group(self, name: str, each: int) -> list[Group]:
        """A group in groups of some matrices each, for products one after the other; in 8 bits it may stay whole."""
        parameter = self.groups[name]
        if name in self.packed:
            return self._split_packed(name, sum(parameter.widths[:each]))
        matrices = [self._round(key) if key in self.rounded else self.in_place(key) for key in parameter.parts]
        made = []
        for first in range(0, len(matrices), each):
            some = matrices[first : first + each]
            group = Group(count=len(some), type=TYPES[some[0].dtype], inputs=parameter.inputs)
            group.outputs = sum(len(matrix) for matrix in some)
            for part, matrix in enumerate(some):
                group.parts[part] = Part(matrix.data_ptr(), None, len(matrix))
            made.append(group)
        return made

    def _split_packed(self, name: str, outputs: int) -> list[Group]:
        parameter, scales = self.groups[name], self._quantized[SCALE.format(name)]
        inputs, total = parameter.inputs, sum(parameter.widths)
        first_scale = self.keep(SCALE.format(name), scales.clone())
        self._pack(name)
        made = []
        for first in range(0, total, outputs := total if outputs % TILE else outputs):
            group = Group(count=1, type=TYPES[torch.int8], inputs=inputs, outputs=outputs)
            weights = self.packed[name].data_ptr() + packed_bytes(inputs, first)
            group.parts[0] = Part(weights, first_scale + first * scales.element_size(), outputs)
            made.append(group)
        return made

    def layer(self, groups: Mapping[str, str], bias: str) -> Layer:
        """A layer.

        Args:
            groups: field of `Layer` -> name of the group.
            bias: state-dict key of its table of relative biases.
        """
        norms = {field: self.groups[groups[group]].norm for field, group in _NORMS.items() if group in groups}
        return Layer(
            **{field: self.group(name) for field, name in groups.items()},
            **{field: self.vector(key) for field, key in norms.items()},
            bias=self.vector(bias),
        )

    def room(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory for so many numbers that nothing is written to yet, for which the system can give large pages."""
        made = torch.empty(count, dtype=dtype)
        self._library.t5_large_pages(_address(made.data_ptr()), _long(made.nbytes))
        return made

    def vector(self, key: str | None) -> int:
        """The address of a vector or a table in float32."""
        assert key is not None
        return self.in_place(key, (torch.float32,)).data_ptr()

    def in_place(self, key: str, dtypes: Collection[torch.dtype] = (torch.float32, torch.bfloat16)) -> torch.Tensor:
        """A weight in one of some types, in its own memory if that will do."""
        if key not in self.kept:
            weight = self._weights[key].detach()
            self.kept[key] = (weight if weight.dtype in dtypes else weight.float()).contiguous()
        return self.kept[key]

    def keep(self, name: str, tensor: torch.Tensor) -> int:
        """The address of a tensor that lives as long as these weights."""
        self.kept[name] = tensor
        return tensor.data_ptr()

    def _room_for_bytes(self, groups: Collection[str]) -> dict[str, torch.Tensor]:
        """Memory for matrices in 8 bits."""
        sizes = {}
        for name in sorted(groups):
            if MATRIX.format(name) in self._quantized:
                inputs, columns = self._quantized[MATRIX.format(name)].shape
                sizes[name] = packed_bytes(inputs, columns)
        return self._one_piece(sizes, torch.uint8)

    def _room_for_rounded(self, groups: Collection[str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Memory for matrices in a type that they do not have."""
        keys = sorted({key for name in groups for key in self.groups[name].parts})
        others = [key for key in keys if self._weights[key].dtype != dtype]
        shapes = {key: self._weights[key].shape for key in others}
        room = self._one_piece({key: shape.numel() for key, shape in shapes.items()}, dtype)
        return {key: memory.view(shapes[key]) for key, memory in room.items()}

    def _one_piece(self, sizes: Mapping[str, int], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Tensors of some numbers of elements, all in one piece of `room`."""
        memory = torch.split(self.room(sum(sizes.values()), dtype), list(sizes.values()))
        return dict(zip(sizes, memory, strict=True))

    def _round(self, key: str) -> torch.Tensor:
        return self.rounded[key].copy_(self._weights[key].detach())

    def _pack(self, name: str) -> None:
        matrix, scales = self._quantized[MATRIX.format(name)], self._quantized[SCALE.format(name)]
        inputs, columns = matrix.shape
        shifted = int(matrix.dtype == torch.uint8)
        to = _address(self.packed[name].data_ptr())
        self._library.t5_pack(_address(matrix.data_ptr()), _long(inputs), _long(columns), shifted, to)
        self.kept[SCALE.format(name)].copy_(scales)
        if self._after_packing is not None:
            self._after_packing(MATRIX.format(name))

    def _refresh(self, key: str) -> None:
        """Bring a weight up to date where its memory is not read itself."""
        weight, kept = self._weights[key].detach(), self.kept[key]
        if weight.data_ptr() != kept.data_ptr():
            kept.copy_(weight)
