"""How the kernels of a decoder step divide their work among CTAs, by what was fastest on an H200 (docs/performance.md).

Results do not depend on any of it.
"""

from __future__ import annotations

import torch

from t5_trt.graph.architecture import Architecture
from t5_trt.kernels.step_memory import tiles

#: major compute capabilities whose GPUs have 227 KB of shared memory for a CTA; the others that are supported have 99 KB
LARGE_SHARED = (9, 10)
#: from how many rows on such a GPU makes the widest products of a layer by ``tiled_product.cuh``
TILED_ROWS = 33
#: d_model from which weights count for more than what follows them
LARGE_MODEL = 1024
#: multiprocessors of an H200, which each run one CTA of a product at a time
PROCESSORS = 132
#: largest d_model of ``streamed_product.cuh``: rows fit into shared memory, and a tile's weights into registers
STREAMED_MODEL = 2048
#: most tiles of outputs that a CTA makes one after the other
MOST_TILES = 8
#: the compute capability whose tensor cores multiply for warp groups (``group_product.cuh``)
GROUPS = 9
#: parts of k that are summed by themselves, and most k tiles of one that are copied together
PARTS, MOST_IN_STEP = 16, 6
#: k tiles of several tiles of outputs whose weights a warp can hold in registers (``product.cuh``)
HELD_TILES = 24
KILOBYTE = 1024
#: the compute capability on which products are split among the CTAs of a cluster (``split_product.cuh``). An H200 has room for 30 clusters of four
CLUSTERS = 9
NOT_SPLIT = {"ADD_SPLIT": 0, "OUT_SPLIT": 0, "SPLIT_ROW_TILES": 1, "SPLIT_CTAS": 1}
#: k from which it pays to split a product with 1,024 outputs, for 9 to 32 rows and for others
LONG_K, VERY_LONG_K = 4096, 16384
#: bytes of shared memory of which no two CTAs fit on a multiprocessor of such a GPU
ALONE = 116 * KILOBYTE
#: percent of the shared memory of such a multiprocessor (196 of 228 KB) that all products of a layer ask for: a change of the division between shared
#: memory and L1 cache may need a synchronization, and so keeps a kernel from starting early. With all of it the L1 cache, through which weights come, is
#: too small
SHARED_PERCENT = 85


def divide_products(
    arch: Architecture, dtype: torch.dtype, rows: int, capability: int, *, int8: bool = False
) -> dict[str, int]:
    """The constants of ``common.cuh`` that say how many outputs and rows a CTA of each product takes.

    Args:
        arch: of the model.
        dtype: of weights and caches.
        rows: of a step.
        capability: the GPU's compute capability, its major number.
        int8: matrices are in 8 bits.
    """
    half = dtype != torch.float32
    large = half and capability in LARGE_SHARED
    row_tiles = _row_tiles(arch, rows, half=half, large=large)
    model, inner, hidden = tiles(arch.d_model), tiles(arch.num_heads * arch.d_kv), tiles(arch.d_ff)
    qkv = 3 * inner

    split = _split(arch, rows, int8=int8) if half and capability == CLUSTERS else NOT_SPLIT

    def own_row_tiles(count: int) -> int:
        """Two row tiles a CTA instead of four, and so twice as many CTAs, where half of the processors would have none."""
        return 2 if large and row_tiles == 4 and 2 * count * _groups(rows, row_tiles) <= PROCESSORS else row_tiles

    # in half precision it is worth more that the next kernel finds processors without work, and loads its weights meanwhile
    beside_split = row_tiles if rows <= 64 else 2
    add_row_tiles = beside_split if split["OUT_SPLIT"] and not int8 else own_row_tiles(model)
    query_row_tiles = own_row_tiles(inner) if int8 or arch.d_model < LARGE_MODEL else row_tiles

    def outputs(count: int, own_row_tiles: int) -> int:
        """Two tiles of outputs a CTA where processors would have a second CTA to run."""
        return 2 if large and row_tiles > 1 and count * _groups(rows, own_row_tiles) > PROCESSORS else 1

    tiled = large and rows >= TILED_ROWS
    groups = _group_row_tiles(rows, qkv) if tiled and capability == GROUPS and not int8 and _in_whole_steps(arch) else 0
    streamed = large and not tiled and min(qkv, hidden) > 2 * PROCESSORS and arch.d_model <= STREAMED_MODEL
    wide = 4 if groups else _wide_tiles(arch, rows, row_tiles, half=half, tiled=tiled, int8=int8)
    if streamed:
        qkv_tiles, in_tiles = _evenly(qkv), _evenly(hidden)
    elif large and not tiled:
        qkv_tiles, in_tiles = _tiles_at_once(arch, rows, row_tiles, wide, int8=int8)
    else:
        qkv_tiles, in_tiles = wide, max(wide // (1 + arch.gated), 1)
    own = {
        "ROW_TILES": row_tiles,
        "TILED": int(tiled),
        "STREAMED": int(streamed),
        "WARPGROUPS": groups,
        "QKV_TILES": qkv_tiles,
        "QKV_TOGETHER": _together(qkv_tiles, row_tiles, int8=int8),
        "IN_TILES": in_tiles,
        "IN_TOGETHER": 1 if arch.gated else _together(in_tiles, row_tiles, int8=int8),
        "QUERY_TILES": _query_tiles(inner, int8=int8) if large and row_tiles == 1 else outputs(inner, query_row_tiles),
        "QUERY_ROW_TILES": query_row_tiles,
        "ADD_TILES": outputs(model, add_row_tiles),
        "ADD_ROW_TILES": add_row_tiles,
    }
    return own | split | _divide_head(arch, rows, row_tiles, half=half, large=large, int8=int8)


def _split(arch: Architecture, rows: int, *, int8: bool) -> dict[str, int]:
    """Where CTAs of a cluster share k of the products that add to the stream: how many of them, and outputs and rows of each.

    That is where CTAs with all of k would read many more bytes out of the L2 cache, and all clusters find room at once.
    """
    wide, parts = tiles(arch.d_model), PARTS * (32 if int8 else 16)
    inner = arch.num_heads * arch.d_kv
    inner, ff = (k if k % parts == 0 else 0 for k in (inner, arch.d_ff))  # parts have whole k tiles
    row_tiles = next(count for count in (1, 2, 4, 8) if rows <= 8 * count or count == 8)
    ctas, add, out = 4, 0, 0
    if 48 <= wide < 64:
        out = 4 if not int8 and rows >= TILED_ROWS and ff >= (3072 if rows <= 64 else 2048) else 0
    elif wide == 64 and 8 < rows <= 64:
        few = not int8 and (rows <= 16 or 24 < rows <= 32)  # clusters find room beside attention's CTAs
        add = (4 if few else 3) if inner >= LONG_K else 0
        out = (4 if rows <= 16 and ff < VERY_LONG_K else 3) if ff >= (LONG_K if rows <= 32 else VERY_LONG_K) else 0
    elif wide == 64 and rows <= 8 and (int8 or rows > 1) and ff >= VERY_LONG_K:
        ctas, out = 8, 5
    if not add + out:
        return NOT_SPLIT
    return {"ADD_SPLIT": add, "OUT_SPLIT": out, "SPLIT_ROW_TILES": row_tiles, "SPLIT_CTAS": ctas}


def _evenly(count: int) -> int:
    """Tiles of outputs of a CTA if all processors have as many, in as few rounds as can be."""
    rounds = -(-count // (PROCESSORS * MOST_TILES))
    return -(-count // (PROCESSORS * rounds))


def _together(count: int, row_tiles: int, *, int8: bool) -> int:
    """Of `count` tiles of outputs of a CTA, those that are made at the same time: half of them, but two for many rows; in 8 bits all for one row tile."""
    if int8:
        return count if row_tiles == 1 else 2 - count % 2
    most = min(count // 2, 4) if row_tiles <= 2 else 2
    return next(part for part in (4, 3, 2, 1) if part <= max(most, 1) and count % part == 0)


def _tiles_at_once(arch: Architecture, rows: int, row_tiles: int, wide: int, *, int8: bool) -> tuple[int, int]:
    """Tiles of outputs of a CTA of ``project_qkv`` and of ``feed_forward_in`` that makes all of them at the same time, from registers."""
    qkv_tiles, in_tiles = wide, max(wide // (1 + arch.gated), 1)
    if row_tiles == 1:
        in_tiles = _leaving_half(arch, int8=int8)
        if wide == 1 and rows > 4:
            qkv_tiles = max(1, min(3, _held(arch, int8=int8)))
    elif row_tiles == 4 and arch.d_model == LARGE_MODEL and not (int8 or arch.gated):
        in_tiles = 3
    return qkv_tiles, in_tiles


def _query_tiles(count: int, *, int8: bool) -> int:
    """Tiles of outputs of a CTA of ``project_query``, of `count`, for up to 8 rows: two where that leaves processors to the next products."""
    return 2 if count >= 48 and int8 == (16 * count >= LONG_K) else 1


def _leaving_half(arch: Architecture, *, int8: bool) -> int:
    """Tiles of outputs (gate and up count as one) of a CTA of ``feed_forward_in`` if half of the processors are left to ``feed_forward_out``, which then
    loads its weights meanwhile, or more than half, as long as there are 32 CTAs; fewer tiles if a CTA could not hold their weights.
    """
    count = tiles(arch.d_ff)
    least = 1 if int8 else min(3 if arch.gated else 4, count // 32)
    return max(1, min(max(-(-count // (PROCESSORS // 2)), least), _held(arch, int8=int8) // (1 + arch.gated)))


def _held(arch: Architecture, *, int8: bool) -> int:
    """Tiles of outputs whose weights a warp can hold in registers, of its part of d_model."""
    return HELD_TILES // -(-arch.d_model // (PARTS * (32 if int8 else 16)))


def _groups(rows: int, row_tiles: int) -> int:
    return -(-rows // (8 * row_tiles))


def _row_tiles(arch: Architecture, rows: int, *, half: bool, large: bool) -> int:
    """Sizes at which sharing a load of the weights among rows beats more CTAs."""
    if rows <= 8:
        return 1
    if large and 16 < rows <= (64 if arch.d_model >= LARGE_MODEL else 32):
        return 4
    return 2 if rows <= 64 or not half else 4


def _group_row_tiles(rows: int, qkv: int) -> int:
    """Tiles of 8 rows of a CTA of ``group_product.cuh``: half as many where most processors would have nothing to do."""
    return 4 if rows <= 64 and qkv // 4 < PROCESSORS // 2 else 8


def _in_whole_steps(arch: Architecture) -> bool:
    """Whether every step of a warp group has as many k tiles, see ``tiled_copies.cuh``."""
    part, rest = divmod(arch.d_model, PARTS * 16)
    return rest == 0 and part % -(-part // MOST_IN_STEP) == 0


def _wide_tiles(arch: Architecture, rows: int, row_tiles: int, *, half: bool, tiled: bool, int8: bool) -> int:
    """Tiles of outputs of a CTA of ``project_qkv`` and ``feed_forward_in``: the stream is read as seldom as registers allow."""
    if tiled:  # four, unless most processors would have nothing to do
        return 4 if 3 * tiles(arch.num_heads * arch.d_kv) // 4 * _groups(rows, 8) >= PROCESSORS // 2 else 2
    if not half or (row_tiles == 1 and not int8 and arch.d_model >= LARGE_MODEL):
        return 1
    return 4 if row_tiles == 2 else 2  # sums of four row tiles would not fit into shared memory


def _divide_head(
    arch: Architecture, rows: int, row_tiles: int, *, half: bool, large: bool, int8: bool
) -> dict[str, int]:
    head_row_tiles = 1 if rows <= 8 else 2 if rows <= 16 else 4 if rows <= 32 or not large else 8 if rows <= 64 else 16
    return {
        "HEAD_ROW_TILES": head_row_tiles if half else row_tiles,
        "HEAD_ASKS": int(rows <= 8 if arch.d_model < LARGE_MODEL else rows == 1 and arch.d_model == LARGE_MODEL),
        # 16 warps leave too few registers to convert 8-bit weights
        "HEAD_WARPS": 16 if head_row_tiles > 8 and half and not int8 else 8,
        # two CTAs on a processor, unless the rows of one fill it
        "HEAD_ROOM": (200 if rows > 64 else 100 if rows > 16 else 64) * KILOBYTE if large else 64 * KILOBYTE,
    }


def divide_attention(heads: int, capability: int, *, wide: bool, tiled: bool) -> dict[str, int]:
    """Warps for the keys of one head of one row, and how many such CTAs a processor must have room for.

    As many warps as can be if all heads are to be at work at once.

    Args:
        heads: of all rows together.
        capability: the GPU's compute capability, its major number.
        wide: a key takes more than 128 bytes, and so more registers.
        tiled: by the tensor cores, ``tile_attention.cuh``.
    """
    if tiled:
        choices = [(8, 2), (4, 4)] if wide else [(8, 2), (4, 5), (4, 6), (2, 10), (2, 12)]
    else:
        few = 4 if capability in LARGE_SHARED and not wide else 2
        choices = [(8, 2), (8, few), (4, 5), (4, 6)] + ([] if wide else [(2, 10), (2, 12)])
    warps, ctas = next((choice for choice in choices if heads <= choice[1] * PROCESSORS), choices[-1])
    return {"ATTENTION_WARPS": warps, "ATTENTION_CTAS": ctas}


def shared_memory(needed: int, ctas: int, capability: int, processors: int) -> int:
    """Bytes of shared memory for each CTA of a layer's product.

    Where every CTA can have a multiprocessor of its own, it takes so much that no other product's CTA fits beside it. Otherwise those that start
    early would share the few multiprocessors that the kernel before leaves free, while others stand idle.

    Args:
        needed: bytes that it uses.
        ctas: of the kernel.
        capability: the GPU's compute capability, its major number.
        processors: the GPU's multiprocessors.
    """
    return max(needed, ALONE) if capability in LARGE_SHARED and ctas <= processors else needed
