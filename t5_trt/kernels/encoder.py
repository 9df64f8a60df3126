"""The encoder between its matrix products as our own kernels: attention, residual sums with their norms, activations, K/V by heads.

    stream -> norm -> [ (q, k, v) -> attend -> (o) -> add and norm -> (wi) -> activate -> (wo) -> add and norm ] x layers -> (cross K/V) -> split

Round brackets mark matrix products, which cuBLAS computes. Nothing here waits for the GPU, so that an encoder can be captured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from t5_trt.graph.architecture import Architecture
from t5_trt.kernels.launching import LoadedModule, launch

SOURCE = "encoder.cu"
KERNELS = (
    "attend_encoder",
    "attend_encoder_wide",
    "list_keys",
    "list_queries",
    "add_and_norm",
    "activate_inner",
    "split_heads",
)
#: keys of a tile (``KEYS`` in ``encoder_attention.cuh``)
KEYS = 64
#: columns of the residual stream that a CTA can hold
MOST_COLUMNS = 8192
#: most CTAs along the second and third axis of a grid
MOST_CTAS = 65535


def refusal(arch: Architecture, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run a model's encoder, or None."""
    if dtype == torch.float32:
        return "the tensor cores' attention has half precision only"
    if arch.d_kv > 128 or any(size % 8 for size in (arch.d_kv, arch.d_model, arch.d_ff)):
        return f"d_kv is {arch.d_kv}, d_model {arch.d_model}, d_ff {arch.d_ff}; the kernels take multiples of 8, d_kv up to 128"
    if arch.d_model > MOST_COLUMNS:
        return f"d_model is {arch.d_model}; the kernels take up to {MOST_COLUMNS}"
    return None


@dataclass(frozen=True)
class KeyLists:
    """What attention reads of the masks, and of where sources lie.

    Attributes:
        hide: float32 [B, tiles * KEYS], 0 or -inf, where a source has a tile.
        lists: int32 [B, tiles + 2], which tiles of keys a source looks at.
        places: int32 [CTAs, 4], which queries of packed sources a CTA has; None for a batch [B, S].
        wide: whether such a CTA has as many queries as fit.
    """

    hide: torch.Tensor
    lists: torch.Tensor
    places: torch.Tensor | None = None
    wide: bool = False


class EncoderKernels:
    """The loaded kernels of one cubin, on torch's current stream of one GPU.

    Args:
        cubin: compiled from `SOURCE` with `t5_trt.kernels.decode_step.model_constants`.
        constants: as given to the compiler.
        device: the GPU, whose context is the current one.
    """

    def __init__(self, cubin: bytes, constants: Mapping[str, int], device: torch.device) -> None:
        self._module, self._device = LoadedModule(cubin, KERNELS), device
        self._functions = self._module.functions
        self._take_sizes(
            constants, self._module.numbers("geometry"), torch.cuda.get_device_properties(device).multi_processor_count
        )
        for name, (_, shared) in self._attention.items():
            self._module.allow_shared(name, shared)

    def _take_sizes(self, constants: Mapping[str, int], geometry: list[int], processors: int) -> None:
        narrow, wide, self._rows_of_cta = geometry[:2], geometry[2:4], geometry[4]
        self._attention = {"attend_encoder": narrow, "attend_encoder_wide": wide}  # queries of a CTA, bytes
        self._heads, self._width, self._inner = constants["H"], constants["D"], constants["FF"]
        self._gated, self._processors = bool(constants["GATED"]), processors

    def list_keys(self, mask: torch.Tensor) -> KeyLists:
        """The key lists that `attend` reads, from a mask, int64 [B, S] and contiguous: 0 hides a token, `NO_KEY` marks a place without one."""
        batch, length = mask.shape
        return KeyLists(*self._listed(mask, None, batch, length))

    def list_packed(self, mask: torch.Tensor, starts: torch.Tensor, *, wide: bool | None = None) -> KeyLists:
        """As `list_keys`, of sources that lie one behind another.

        Args:
            mask: int64 [T], contiguous.
            starts: int64 [B + 1], the first token of each source, and behind the last token of all; a source may have none.
            wide: see `attend`.
        """
        tokens, sources = len(mask), len(starts) - 1
        hide, lists = self._listed(mask, starts, sources, tokens)
        if wide is None:
            wide = self._keeps_busy(-(-tokens // self._attention["attend_encoder_wide"][0]))
        queries, _ = self._attention["attend_encoder_wide" if wide else "attend_encoder"]
        places = torch.empty((tokens // queries + sources, 4), dtype=torch.int32, device=mask.device)
        count = len(places)
        self._launch("list_queries", (-(-count // 128),), 128, starts, places, sources, count, queries)
        return KeyLists(hide, lists, places, wide)

    def _listed(
        self, mask: torch.Tensor, starts: torch.Tensor | None, sources: int, longest: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tiles = -(-longest // KEYS)
        hide = torch.empty((sources, tiles * KEYS), device=mask.device)
        lists = torch.empty((sources, tiles + 2), dtype=torch.int32, device=mask.device)
        self._launch("list_keys", (sources,), 256, mask, starts, hide, lists, longest, tiles)
        return hide, lists

    def attend(
        self, qkv: torch.Tensor, keys: KeyLists, bias: torch.Tensor, *, wide: bool | None = None
    ) -> torch.Tensor:
        """Attention of every token to the tokens of its source.

        Args:
            qkv: [B, S, 3 * H * D], contiguous; [T, 3 * H * D] of packed sources.
            keys: of `list_keys`, or of `list_packed`.
            bias: float32 [H, 2 * n + 1] of `relative_bias`.
            wide: whether a CTA takes as many queries as fit; None: if that keeps the GPU busy. Results are equal. Packed sources
                have it in `keys`.

        Returns:
            [B, S, H * D] or [T, H * D]; of packed sources, what belongs to none is not written.
        """
        out, length, places = qkv.new_empty((*qkv.shape[:-1], self._heads * self._width)), qkv.shape[-2], keys.places
        if places is not None:
            wide = keys.wide
        elif wide is None:
            wide = self._keeps_busy(-(-length // self._attention["attend_encoder_wide"][0]) * len(qkv))
        name = "attend_encoder_wide" if wide else "attend_encoder"
        queries, shared = self._attention[name]
        grid = (-(-length // queries), self._heads, len(qkv)) if places is None else (self._heads, len(places))
        sizes = (length, keys.hide.shape[1] // KEYS, bias.shape[1] // 2)
        self._launch(name, grid, 128, qkv, keys.hide, keys.lists, bias, out, places, *sizes, shared=shared)
        return out

    def _keeps_busy(self, tiles: int) -> bool:
        """Whether that many CTAs for each head are enough for the GPU."""
        return tiles * self._heads >= 2 * self._processors

    def add_and_norm(
        self,
        stream: torch.Tensor,
        branch: torch.Tensor | None,
        scale: float,
        epsilon: float,
        weight: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Add `scale` times a branch [rows, E] to the stream, float32 [rows, E], in place; return its RMSNorm in a type.

        Args:
            stream: contiguous.
            branch: contiguous; None adds nothing.
            scale: of the branch.
            epsilon: of the norm.
            weight: of the norm [E]; None if it is folded into the next matrix.
            dtype: of the result.
        """
        made = torch.empty_like(stream, dtype=dtype)
        grid = (-(-len(stream) // self._rows_of_cta),)
        self._launch("add_and_norm", grid, 128, stream, branch, weight, made, len(stream), scale, epsilon)
        return made

    def activate(self, inner: torch.Tensor) -> torch.Tensor:
        """The activation of [rows, FF], in place, or of [rows, 2 * FF] with its gate."""
        out = inner.new_empty((len(inner), self._inner)) if self._gated else inner
        self._launch("activate_inner", (len(inner), -(-self._inner // 1024)), 128, inner, out)
        return out

    def split_heads(self, made: torch.Tensor, matrices: int) -> torch.Tensor:
        """[B, S, matrices * H * D] as [matrices, B, H, S, D]."""
        batch, length = made.shape[:2]
        out = made.new_empty((matrices, batch, self._heads, length, self._width))
        grid = (-(-length * self._width // 2048), matrices * self._heads, batch)
        self._launch("split_heads", grid, 256, made, out, length)
        return out

    def _launch(self, name: str, grid: tuple[int, ...], threads: int, *arguments: Any, shared: int = 0) -> None:
        stream = torch.cuda.current_stream(self._device).cuda_stream
        launch(self._functions[name], grid, threads, stream, arguments, shared=shared)


def relative_bias(table: torch.Tensor, buckets: torch.Tensor) -> torch.Tensor:
    """What `EncoderKernels.attend` reads: a table [buckets, H] by the bucket of each distance [2 * n + 1], times log2(e), float32."""
    return (table.float()[buckets] * math.log2(math.e)).t().contiguous()
