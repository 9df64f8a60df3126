"""The decoder on a CPU by our own C code (`t5_trt/kernels/cpu`): its weights, and calls for rows at positions of their own.

Matrices in float32 and bfloat16 are read where the model has them, or are rounded to bfloat16. Those in 8 bits are laid out anew, in tiles
of 16 outputs.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch

from t5_trt.errors import BackendError, InputError
from t5_trt.graph.architecture import ACTIVATIONS, Architecture
from t5_trt.graph.int8 import MATRIX, SCALE
from t5_trt.graph.parameters import EMBEDDING, LM_HEAD, Weights, parameters, step_groups, step_matrices
from t5_trt.graph.relative_positions import distance_buckets

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 2}
_TILE = 16
_long, _int, _float, _address = ctypes.c_int64, ctypes.c_int32, ctypes.c_float, ctypes.c_void_p


class _Part(ctypes.Structure):
    _fields_ = [("weights", _address), ("scales", _address), ("outputs", _long)]


class _Group(ctypes.Structure):
    _fields_ = [("parts", _Part * 3), ("count", _int), ("type", _int), ("inputs", _long), ("outputs", _long)]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Group) for name in ("qkv", "self_o", "cross_q", "cross_o", "wi", "wo")),
        *((name, _address) for name in ("self_norm", "cross_norm", "feed_forward_norm", "bias")),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, _long) for name in ("d_model", "d_kv", "heads", "d_ff", "layers", "vocabulary", "longest_distance")),
        *((name, _int) for name in ("activation", "gated", "embedding_type")),
        *((name, _float) for name in ("epsilon", "output_scale")),
        *((name, _address) for name in ("embedding", "buckets", "final_norm")),
        ("head", _Group),
        ("layers_of", ctypes.POINTER(_Layer)),
        ("rough", _address),
    ]


class _Cache(ctypes.Structure):
    _fields_ = [("memory", _address), *((name, _long) for name in ("layer", "kind", "row", "head"))]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, _long) for name in ("rows", "queries", "beams")),
        *(("tokens", _address), ("positions", _address), ("position_step", _long)),
        ("cache", _Cache),
        *(("ancestors", _address), ("ancestors_row", _long), ("key_bias", _address), ("key_bias_row", _long)),
        ("cross", _Cache),
        *(("cross_bias", _address), ("cross_bias_row", _long), ("source_length", _long)),
        *(("logits", _address), ("logits_row", _long)),
        *(("best_only", _long), ("hidden_count", _long), ("hidden", _address)),
    ]


class _RoughHead(ctypes.Structure):
    _fields_ = [("group", _Group), ("errors", _address), ("lengths", _address)]


@dataclass(frozen=True)
class Call:
    """The memory of a step of R rows with Q new tokens each; all tensors are on the CPU.

    Attributes:
        tokens: int64 [R, Q], contiguous.
        positions: int64 [R] or [1], of the first new token.
        kv: float32 [L, 2, R, H, T, D], whose places of a head are contiguous; K and V of the new tokens are written into it.
        cross: float32 [L, 2, B, H, S, D], likewise; R / B rows after one another read the same entry.
        cross_bias: float32 [B, 1, 1, S].
        key_bias: float32 [R, T], added to the scores of the decoder's own tokens; None for none.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    kv: torch.Tensor
    cross: torch.Tensor
    cross_bias: torch.Tensor
    key_bias: torch.Tensor | None = None


class CpuDecoder:
    """Runs the decoder of one model. Calls of several threads wait for one another.

    Args:
        library: of `t5_trt.kernels.cpu_compile.load`.
        arch: of the model.
        weights: state-dict key -> CPU tensor; the memory of float32 and bfloat16 is read by every call.
        quantized: what `t5_trt.graph.int8.quantize` makes; None multiplies by `weights`.
        matrices: torch.bfloat16 multiplies by matrices in bfloat16, rounded where they have another type; None by those of `quantized`
            and `weights` as they are. What is looked up or added keeps its type.
        threads: of a call, the calling one among them.
        spinning: whether they may wait busily for one another.
        after_packing: called with the name of each matrix of `quantized` that is not read any more.

    Raises:
        BackendError: memory ran out.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        arch: Architecture,
        weights: Weights,
        quantized: Mapping[str, torch.Tensor] | None,
        *,
        matrices: torch.dtype | None = None,
        threads: int,
        spinning: bool,
        after_packing: Callable[[str], None] | None = None,
    ) -> None:
        self._library, self._arch, self._weights, self._quantized = library, arch, weights, quantized or {}
        self._after_packing = after_packing
        self._groups = parameters(arch)
        self._kept: dict[str, torch.Tensor] = {}  # memory that the structures point to
        self._packed = self._room_for_bytes()
        self._rounded = {} if matrices is None else self._room_for_rounded(matrices)
        self._rough: _RoughHead | None = None
        self._rounding = threading.Lock()
        self._layers = (_Layer * arch.decoder_layers)(*(self._layer(layer) for layer in range(arch.decoder_layers)))
        model = self._model()
        self._decoder = _address(library.t5_open(ctypes.byref(model), threads, int(spinning)))
        if not self._decoder:
            raise BackendError("memory ran out while the decoder was opened on the CPU.")

    def __del__(self) -> None:
        if getattr(self, "_decoder", None):
            self._library.t5_close(self._decoder)

    def update(self, changed: Collection[str]) -> None:
        """Read weights that have changed in their places, and matrices of them that were rounded anew.

        Args:
            changed: state-dict keys.
        """
        for name, parameter in self._groups.items():
            if set(changed).isdisjoint(parameter.parts):
                continue
            if name in self._packed:
                self._pack(name)
                continue
            for key in parameter.parts:
                if key in self._kept:
                    self._refresh(key)
        for key in set(changed) & self._kept.keys():
            self._refresh(key)
        for key in set(changed) & self._rounded.keys():
            self._round(key)
        if self._rough is not None and self._arch.head_weight in changed:
            self._make_rough_head()

    def prepare(self, call: Call) -> _Step:
        """The addresses of a call, which may be run as long as its memory stays where it is."""
        rows, queries = call.tokens.shape
        step = _Step(rows=rows, queries=queries, beams=rows // call.cross.shape[2])
        step.tokens, step.positions = call.tokens.data_ptr(), call.positions.data_ptr()
        step.position_step = int(len(call.positions) > 1)
        step.cache, step.cross = _cache(call.kv), _cache(call.cross)
        step.cross_bias, step.cross_bias_row = call.cross_bias.data_ptr(), call.cross_bias.stride(0)
        step.source_length = call.cross.shape[4]
        step.logits_row = self._arch.vocab_size
        if call.key_bias is not None:
            step.key_bias, step.key_bias_row = call.key_bias.data_ptr(), call.key_bias.stride(0)
        return step

    def run(
        self,
        step: _Step,
        logits: torch.Tensor,
        ancestors: torch.Tensor | None = None,
        *,
        best_only: bool = False,
        hidden: torch.Tensor | None = None,
    ) -> None:
        """Decode the tokens of a call and write their K and V.

        Args:
            step: of `prepare`.
            logits: float32 [R, Q, V], contiguous, written.
            best_only: only the largest logit of each row is wanted: others may be off, but stay smaller. In float32 a quarter of the
                output matrix is read then (`t5_trt/kernels/cpu/rough_head.h`).
            hidden: int64, tokens that are then not to be the largest; None for none.
            ancestors: uint8 [R, T + 1], where beams have moved: token t of row i lies in row ``ancestors[i, t]`` of i's batch entry.
                None where rows read their own cache.

        Raises:
            InputError: a token is not in the vocabulary.
            BackendError: memory ran out.
        """
        step.logits = logits.data_ptr()
        step.best_only, step.hidden_count = int(best_only), 0 if hidden is None else len(hidden)
        step.hidden = None if hidden is None else hidden.data_ptr()
        if best_only and self._rough is None and self._has_float32_head:
            with self._rounding:
                if self._rough is None:  # or another thread has made it meanwhile
                    self._make_rough_head()
        step.ancestors = None if ancestors is None else ancestors.data_ptr()
        step.ancestors_row = 0 if ancestors is None else ancestors.stride(0)
        done = self._library.t5_decode(self._decoder, ctypes.byref(step))
        if done < 0:
            raise InputError(
                f"a decoder token is out of range; expected 0 to {self._arch.vocab_size - 1}, the model's vocabulary."
            )
        if not done:
            raise BackendError("memory ran out in a decoder step on the CPU. Use a smaller batch or fewer beams.")

    @property
    def _has_float32_head(self) -> bool:
        key = self._arch.head_weight
        return LM_HEAD not in self._packed and key not in self._rounded and self._kept[key].dtype == torch.float32

    def _make_rough_head(self) -> None:
        """Round the output matrix for steps that want only the largest logit; its exact rows stay where they are."""
        outputs, inputs = self._arch.vocab_size, self._arch.d_model
        tiles = torch.empty(-(-outputs // _TILE) * _TILE * (-(-inputs // 4) * 4), dtype=torch.uint8)
        self._library.t5_large_pages(_address(tiles.data_ptr()), _long(tiles.nbytes))
        scales, errors, lengths = torch.empty((3, outputs), dtype=torch.float32)
        made = (tiles, scales, errors, lengths)
        for name, tensor in zip(("tiles", "scales", "errors", "lengths"), made, strict=True):
            self._keep(f"rough.{name}", tensor)
        head = _address(self._kept[self._arch.head_weight].data_ptr())
        self._library.t5_round_head(head, _long(inputs), _long(outputs), *(_address(each.data_ptr()) for each in made))
        group = _Group(count=1, type=_TYPES[torch.int8], inputs=inputs, outputs=outputs)
        group.parts[0] = _Part(tiles.data_ptr(), scales.data_ptr(), outputs)
        self._rough = _RoughHead(group, errors.data_ptr(), lengths.data_ptr())
        self._library.t5_use_rough_head(self._decoder, ctypes.byref(self._rough))

    def _model(self) -> _Model:
        arch = self._arch
        embedding = self._in_place(EMBEDDING)
        buckets = distance_buckets(arch.num_buckets, arch.max_distance, bidirectional=False).to(torch.int32)
        model = _Model(
            d_model=arch.d_model,
            d_kv=arch.d_kv,
            heads=arch.num_heads,
            d_ff=arch.d_ff,
            layers=arch.decoder_layers,
            vocabulary=arch.vocab_size,
            longest_distance=len(buckets) - 1,
            activation=ACTIVATIONS.index(arch.activation),
            gated=int(arch.gated),
            embedding_type=_TYPES[embedding.dtype],
            epsilon=arch.epsilon,
            output_scale=self._groups[LM_HEAD].scale,
        )
        model.embedding, model.buckets = embedding.data_ptr(), self._keep("buckets", buckets)
        model.final_norm = self._vector(self._groups[LM_HEAD].norm)
        model.head = self._group(LM_HEAD)
        model.layers_of = ctypes.cast(self._layers, ctypes.POINTER(_Layer))
        return model

    def _layer(self, layer: int) -> _Layer:
        block = f"decoder.block.{layer}.layer"
        names = {
            "qkv": f"{block}.0.SelfAttention.qkv",
            "self_o": f"{block}.0.SelfAttention.o",
            "cross_q": f"{block}.1.EncDecAttention.q",
            "cross_o": f"{block}.1.EncDecAttention.o",
            "wi": f"{block}.2.DenseReluDense.wi",
            "wo": f"{block}.2.DenseReluDense.wo",
        }
        norms = {"self_norm": "qkv", "cross_norm": "cross_q", "feed_forward_norm": "wi"}
        return _Layer(
            **{field: self._group(name) for field, name in names.items()},
            **{field: self._vector(self._groups[names[group]].norm) for field, group in norms.items()},
            bias=self._vector(self._arch.bias_weight("decoder", layer)),
        )

    def _group(self, name: str) -> _Group:
        parameter = self._groups[name]
        made = _Group(inputs=parameter.inputs, outputs=sum(parameter.widths))
        if name in self._packed:
            matrix, scales = self._quantized[MATRIX.format(name)], self._quantized[SCALE.format(name)]
            made.count, made.type = 1, _TYPES[matrix.dtype]
            self._keep(SCALE.format(name), scales.clone())
            self._pack(name)
            made.parts[0] = _Part(
                self._packed[name].data_ptr(), self._kept[SCALE.format(name)].data_ptr(), made.outputs
            )
            return made
        matrices = [self._round(key) if key in self._rounded else self._in_place(key) for key in parameter.parts]
        made.count, made.type = len(matrices), _TYPES[matrices[0].dtype]
        for part, matrix in enumerate(matrices):
            made.parts[part] = _Part(matrix.data_ptr(), None, len(matrix))
        return made

    def _room_for_bytes(self) -> dict[str, torch.Tensor]:
        """Memory for the decoder's matrices in 8 bits."""
        sizes = {}
        for name in sorted(step_groups(self._arch)):
            if MATRIX.format(name) in self._quantized:
                inputs, columns = self._quantized[MATRIX.format(name)].shape
                sizes[name] = -(-columns // _TILE) * _TILE * (-(-inputs // 4) * 4)
        return self._one_piece(sizes, torch.uint8)

    def _room_for_rounded(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Memory for the decoder's matrices in a type that they do not have."""
        others = [key for key in sorted(step_matrices(self._arch)) if self._weights[key].dtype != dtype]
        shapes = {key: self._weights[key].shape for key in others}
        room = self._one_piece({key: shape.numel() for key, shape in shapes.items()}, dtype)
        return {key: memory.view(shapes[key]) for key, memory in room.items()}

    def _one_piece(self, sizes: Mapping[str, int], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Tensors of some numbers of elements, all in one piece of memory, so that the system can give large pages."""
        room = torch.empty(sum(sizes.values()), dtype=dtype)
        self._library.t5_large_pages(_address(room.data_ptr()), _long(room.nbytes))
        return dict(zip(sizes, torch.split(room, list(sizes.values())), strict=True))

    def _round(self, key: str) -> torch.Tensor:
        return self._rounded[key].copy_(self._weights[key].detach())

    def _pack(self, name: str) -> None:
        matrix, scales = self._quantized[MATRIX.format(name)], self._quantized[SCALE.format(name)]
        inputs, columns = matrix.shape
        shifted = int(matrix.dtype == torch.uint8)
        to = _address(self._packed[name].data_ptr())
        self._library.t5_pack(_address(matrix.data_ptr()), _long(inputs), _long(columns), shifted, to)
        self._kept[SCALE.format(name)].copy_(scales)
        if self._after_packing is not None:
            self._after_packing(MATRIX.format(name))

    def _refresh(self, key: str) -> None:
        """Bring a weight up to date where its memory is not read itself."""
        weight, kept = self._weights[key].detach(), self._kept[key]
        if weight.data_ptr() != kept.data_ptr():
            kept.copy_(weight)

    def _in_place(self, key: str, dtypes: Collection[torch.dtype] = (torch.float32, torch.bfloat16)) -> torch.Tensor:
        """A weight in one of some types, in its own memory if that will do."""
        if key not in self._kept:
            weight = self._weights[key].detach()
            self._kept[key] = (weight if weight.dtype in dtypes else weight.float()).contiguous()
        return self._kept[key]

    def _vector(self, key: str | None) -> int:
        assert key is not None
        return self._in_place(key, (torch.float32,)).data_ptr()

    def _keep(self, name: str, tensor: torch.Tensor) -> int:
        self._kept[name] = tensor
        return tensor.data_ptr()


def _cache(kv: torch.Tensor) -> _Cache:
    return _Cache(kv.data_ptr(), *kv.stride()[:4])
